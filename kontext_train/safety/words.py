"""Lists of words and regular expressions that prompts are held against."""

import re
import unicodedata
from pathlib import Path

_REGEX = "re:"


class WordList:
    """One entry a line: words, which match whole words whatever their case, or `re:` and a regular expression.

    Empty lines and those that begin with # say nothing. Text is compared in Unicode's NFKC form without case, so that
    full-width letters and ligatures hide nothing; letters of other alphabets that look alike do.
    """

    def __init__(self, path: Path) -> None:
        """ValueError, with the line, for a bad expression or an empty list."""
        self._patterns = list[re.Pattern[str]]()
        for number, line in enumerate(path.read_text().splitlines(), start=1):
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
        words = r"\s+".join(re.escape(word) for word in _folded(entry).split())
        return re.compile(rf"(?<!\w){words}(?!\w)")
    try:
        return re.compile(entry.removeprefix(_REGEX), re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"{where}: {entry!r} is not a regular expression ({error})") from error


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
