"""Lists of words and regular expressions that prompts are held against."""

import re
import unicodedata
from pathlib import Path

_REGEX = "re:"


class WordList:
    """One entry a line: words, which match whole words whatever their case, or `re:` and a regular expression.

    Empty lines and those that begin with # say nothing. Text is compared without case, marks on letters and invisible
    characters, in Unicode's compatibility form: full-width letters, ligatures and a zero-width space hide nothing, nor
    do hyphens and underscores in or between listed words. Letters of other alphabets that look alike do.
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
        plain = _folded(text)
        return any(pattern.search(plain) for pattern in self._patterns)


def _pattern(where: str, entry: str) -> re.Pattern[str]:
    if not entry.startswith(_REGEX):
        words = [[re.escape(letter) for letter in word] for word in re.split(r"[\s_-]+", _folded(entry)) if word]
        if not words:
            raise ValueError(f"{where}: {entry!r} has no letters")
        joined = r"[\s_-]+".join("[_-]*".join(letters) for letters in words)
        return re.compile(rf"(?<![^\W_]){joined}(?![^\W_])")
    try:
        return re.compile(_seen(entry.removeprefix(_REGEX)), re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"{where}: {entry!r} is not a regular expression ({error})") from error


def _folded(text: str) -> str:
    return _seen(_seen(text).casefold())  # twice: the case folding of some letters has marks


def _seen(text: str) -> str:
    """Without marks on letters (é is e) and characters that are not seen; every dash is a hyphen."""
    kinds = ((letter, unicodedata.category(letter)) for letter in unicodedata.normalize("NFKD", text))
    kept = "".join("-" if kind == "Pd" else letter for letter, kind in kinds if kind not in ("Mn", "Me", "Cf"))
    return unicodedata.normalize("NFC", kept)
