"""What Hydra refuses of a command line, said in one line of ours: the key, what was given, the rule, what to do."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches

from hydra import compose, initialize_config_module
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from kontext_train.errors import ConfigError


def check_overrides(name: str, arguments: Sequence[str]) -> None:
    """ConfigError if Hydra would refuse these key=value arguments to the config `name`, for @hydra.main would exit.

    With options of Hydra's own, such as -m, the words are left to it.
    """
    if any(argument.startswith("-") for argument in arguments):
        return
    try:
        with initialize_config_module("kontext_train.conf", version_base="1.3"):
            compose(name, overrides=list(arguments))
    except HydraException as error:
        raise refusal(error, arguments) from error


def refusal(error: HydraException, arguments: Sequence[str]) -> ConfigError:
    """arguments: those it was composed with."""
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return _unknown_key(cause, arguments)
    if isinstance(cause, OmegaConfBaseException):
        return ConfigError(cause.full_key or "", cause.value, _first_line(cause), "Correct it")
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        return ConfigError(group, choice, f"is none of {', '.join(error.options)}", _meant(choice, error.options))
    if isinstance(error, OverrideParseException):
        hint = "It must be key=value; quote a value that has = , [ ] { } or spaces: \"key='a=b'\""
        return ConfigError("argument", error.override, _first_line(error), hint)
    return ConfigError("arguments", " ".join(arguments), str(error).replace("\n", " "), "Correct it")


def _unknown_key(error: ConfigAttributeError | ConfigKeyError, arguments: Sequence[str]) -> ConfigError:
    unknown = error.full_key or ""
    given = (argument.partition("=") for argument in arguments)
    key, value = next(((k, v) for k, _, v in given if f"{k}.".startswith(f"{unknown}.")), (unknown, None))
    kind = error.object_type
    if not (isinstance(kind, type) and is_dataclass(kind)):  # a dict, such as data.sources
        return ConfigError(key, value, f"{error.key} is not there yet", f"To add it: +{key}={value}")
    known = sorted(f.name for f in fields(kind))
    rule = f"{error.key} is no option. Known here: {', '.join(known)}"
    return ConfigError(key, value, rule, _meant(str(error.key), known))


def _meant(given: str, known: Sequence[str]) -> str:
    close = get_close_matches(given, known, n=1)
    return f"Did you mean {close[0]}?" if close else "Check the spelling"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
