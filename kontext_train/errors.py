"""The one way this package says that what a user gave cannot work."""


class ConfigError(ValueError):
    """A configuration value that breaks a rule. Entries print it without a traceback and exit with status 2."""

    def __init__(self, key: str, value: object, rule: str, hint: str) -> None:
        """key: dotted config key; value: what was given; rule: what must hold; hint: what to do."""
        super().__init__(f"{key}={value!r}: {rule}. {hint}")
        self.key = key
