"""How this package says that what a user gave cannot work, and that storage failed."""


class ConfigError(ValueError):
    """A configuration value that breaks a rule. Entries print it without a traceback and exit with status 2."""

    def __init__(self, key: str, value: object, rule: str, hint: str) -> None:
        """key: dotted config key; value: what was given; rule: what must hold; hint: what to do."""
        super().__init__(key, value, rule, hint)  # all of them, so that it can be pickled
        self.key = key

    def __str__(self) -> str:
        key, value, rule, hint = self.args
        return f"{key}={value!r}: {rule}. {hint}"


class StorageError(OSError):
    """Storage failed for good, or a shard is not the one that was indexed. The message names the file or URL.

    It takes one string and nothing else, so that a DataLoader worker can hand it to the parent unchanged.
    """


class MissingFile(StorageError, FileNotFoundError):
    """A remote file is not there, or may not be seen."""
