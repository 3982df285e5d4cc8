"""Lists of words and regular expressions that prompts are held against."""

import re
import unicodedata
from pathlib import Path

_REGEX = "re:"
_HIDDEN = ("Cc", "Cf", "Cn", "Co", "Cs")  # control, format, unassigned and private characters, and halves of pairs
_BLANKS = "\u115f\u1160\u2800\U0001d159"  # fillers for Hangul (in their compatibility form), Braille and notes
_SPACES = "\t\n\v\f\r\x85"  # white space among the control characters
_UNSEEN = "\0"  # what stands for all that is hidden


class WordList:
    """One entry a line: words, which match whole words whatever their case, or `re:` and a regular expression.

    Empty lines and those that begin with # say nothing. Text is compared without case and marks on letters, in
    Unicode's compatibility form: full-width letters and ligatures hide nothing, nor do hyphens and underscores in or
    between listed words. Characters that show nothing (zero-width, control, private, fillers) count as nothing and as a
    space. Letters of other alphabets that look alike do hide words.
    """

    def __init__(self, path: Path) -> None:
        """ValueError, with the line, for a bad expression or an empty list."""
        self._patterns = list[re.Pattern[str]]()
        for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), start=1):
            entry = line.strip()
            if entry and not entry.startswith("#"):
                self._patterns.append(_pattern(f"{path}, line {number}", entry))
        if not self._patterns:
            raise ValueError(f"{path} holds no words. Give one a line")

    def matches(self, text: str) -> bool:
        folded = _folded(text)
        # "_" does, in listed words, for any mixture of both; expressions see no mixture
        readings = {_read(folded, unseen) for unseen in ("", " ", "_")}
        return any(pattern.search(reading) for reading in readings for pattern in self._patterns)


def _pattern(where: str, entry: str) -> re.Pattern[str]:
    if not entry.startswith(_REGEX):
        plain = _read(_folded(entry))
        words = [[re.escape(letter) for letter in word] for word in re.split(r"[\s_-]+", plain) if word]
        if not words:
            raise ValueError(f"{where}: {entry!r} has no letters")
        joined = r"[\s_-]+".join("[_-]*".join(letters) for letters in words)
        return re.compile(rf"(?<![^\W_]){joined}(?![^\W_])")
    try:
        return re.compile(_read(_seen(entry.removeprefix(_REGEX))), re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"{where}: {entry!r} is not a regular expression ({error})") from error


def _folded(text: str) -> str:
    return _seen(_seen(text).casefold())  # twice: the case folding of some letters has marks


def _seen(text: str) -> str:
    """Without marks on letters (é is e); every dash is a hyphen, and every character that shows nothing `_UNSEEN`."""
    return "".join(_shown(letter, unicodedata.category(letter)) for letter in unicodedata.normalize("NFKD", text))


def _shown(letter: str, kind: str) -> str:
    if letter in _BLANKS or (kind in _HIDDEN and letter not in _SPACES):
        return _UNSEEN
    if kind in ("Mn", "Me"):
        return ""
    return "-" if kind == "Pd" else letter


def _read(seen: str, unseen: str = "") -> str:
    """With `unseen` for what shows nothing. Composed only now: what shows nothing may stand in a Hangul syllable."""
    return unicodedata.normalize("NFC", seen.replace(_UNSEEN, unseen))
