"""Can the text be read that was asked for. RapidOCR (PP-OCR on onnxruntime) has its models in its package."""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from statistics import fmean
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from rapidocr import RapidOCR
from torchmetrics.functional.text import char_error_rate

from kontext_train.evaluation.benchmark import Case
from kontext_train.evaluation.metrics.base import Better, LeftOut, Shown

TEXT_EDITING = "Text Editing"
# KontextBench has no column for the text: it stands in quotes in the instruction. A single quote inside a word is none.
QUOTED = re.compile(
    r"""["“”„]([^"“”„]+)["“”]|«([^»]+)»|(?<!\w)['‘]((?:[^'‘’]|(?<=\w)['’](?=\w))+)['’](?!\w)""",
)
# What stands before a quote says whether it is to be there. A verb governs its clause: what one that changes something
# names is old until the word that leads to the new.
LEADS = {"change": r"to|into", "replace": r"with|by|for|to|into", "remove": ""}
WORDS = re.compile(
    r"""(?P<arrow>->|→)
    |(?P<remove>\b(?:remov\w+|delet\w+|eras\w+|get(?:ting)?\srid|hid(?:e|ing)|cross(?:ing)?\b[^"“'‘«„]*?\bout|cover\w*
        |omit\w*|clear\w*|strip\w*|drop|take\s(?:out|off|away)|wipe|scrub|eliminat\w+|strike|blank|blur|keep\w*|leav\w+
        |preserv\w+|(?:do\snot|don['’]t|never)\s\w+)\b)
    |(?P<replace>\b(?:replac\w+|swap\w*|substitut\w+|exchang\w+)\b)
    |(?P<change>\b(?:chang\w+|translat\w+|fix\w*|correct\w*|turn\w*|updat\w+|modif\w+|convert\w*|edit\w*|switch\w*
        |alter\w*|transform\w*|renam\w+|from)\b)
    |(?P<aside>\b(?:instead\sof|rather\sthan|without|next\sto|close\sto|above|below|under|beneath|after|before|beside|near
        |between|behind|around|over|through|across|where)\b|\b(?:in|on|of)\s*$)
    |(?P<new>\b(?:writ\w+|add(?:ing)?|put|insert\w*|typ(?:e|ing)|print|paint|draw|engrave|create|include|display|mak(?:e|ing)\san?
        |becomes?|(?:it|now|should|must|will|to)\s(?:now\s)?(?:says?|reads?|be|spells?|shows?)
        |(?<!that\s)(?<!which\s)(?:say|read|spell))\b
        |(?:^|[.;,]\s*|\b(?:and|then)\s)(?:label|title|name|call)\b)
    |\b(?P<lead>to|into|with|by|for)\b""",
    re.IGNORECASE | re.VERBOSE,
)
JOINED = re.compile(r"\s*(?:,|&|;|(?:,\s*)?\b(?:and|or)\b)\s*", re.IGNORECASE)
OPENING = """["“„«'‘]"""


class Ocr:
    name = "ocr"
    workers = 1
    about = f"RapidOCR {version('rapidocr')}"
    numbers: ClassVar[Mapping[str, Better]] = {"text_found": Better.higher, "text_similarity": Better.higher}
    needs: ClassVar[Mapping[str, str]] = dict.fromkeys(numbers, "a text that is asked for")

    def __init__(self) -> None:
        self.engine = RapidOCR(params={"Global.log_level": "error"})

    def measure(self, shown: Shown) -> dict[str, float]:
        """text_found: the text stands there, apart from case and spaces. text_similarity: 1 - character error rate."""
        wanted = expected_texts(shown.case)
        if wanted is None:
            raise LeftOut("its instruction puts no new text in quotes; `text` in metadata.jsonl can say what it is")
        return compared(wanted, self.read(shown.image)) if wanted else {}

    def read(self, image: Image.Image) -> list[str]:
        """Lines, from top to bottom."""
        found: Any = self.engine(np.asarray(image)[:, :, ::-1])  # BGR
        return list(found.txts or ())


def expected_texts(case: Case) -> tuple[str, ...] | None:
    """All that should be legible; nothing where none is asked for, None where that is not known.

    Without `text`, of Text Editing alone: the quotes that the instruction clearly says are to be there.
    """
    if case.text is not None or case.category != TEXT_EDITING:
        return (case.text,) if case.text else ()
    return tuple(dict.fromkeys(_new_quotes(case.instruction))) or None


def _new_quotes(instruction: str) -> Iterator[str]:
    verb, clause_is_new, is_new, end = "", False, False, 0
    for number, quote in enumerate(QUOTED.finditer(instruction)):
        if number == 0 or not JOINED.fullmatch(instruction, end, quote.start()):
            is_new = clause_is_new
            for word in WORDS.finditer(instruction, end, quote.start()):
                kind = word.lastgroup or ""
                if kind in LEADS:
                    verb, clause_is_new = kind, False
                elif kind in ("new", "arrow") or (kind == "lead" and _leads(verb, word.group())):
                    clause_is_new = True
                elif kind == "lead":
                    continue
                is_new = clause_is_new and kind != "aside"
        end = quote.end()
        if (after := re.compile(rf"\s*(\w+|->|→)[^.;]*?{OPENING}").match(instruction, end)) is not None:
            is_new &= not (after[1] in ("->", "→") or _leads(verb, after[1]))  # the next pair of an old and a new
        text = next(group for group in quote.groups() if group is not None).strip()
        if text and is_new:
            yield text


def _leads(verb: str, word: str) -> bool:
    return re.fullmatch(LEADS.get(verb, ""), word, re.IGNORECASE) is not None


def compared(wanted: Sequence[str], lines: list[str]) -> dict[str, float]:
    """All texts found or not; similarity is their mean."""
    each = [_compared(text, lines) for text in wanted]
    return {"text_found": float(all(found for found, _ in each)), "text_similarity": fmean(like for _, like in each)}


def _compared(wanted: str, lines: list[str]) -> tuple[bool, float]:
    """Against the run of lines that is nearest: other things in a picture may have text too."""
    runs = list(_runs(lines, 2 * len(wanted)))
    errors = [float(char_error_rate(run.lower(), wanted.lower())) for run in runs]
    return any(_letters(wanted) in _letters(run) for run in runs), 1 - min([1.0, *errors])


def _runs(lines: list[str], most_characters: int) -> Iterator[str]:
    """Every line, and lines in a row that are together not much longer than what is looked for."""
    for i, line in enumerate(lines):
        yield line
        for j in range(i + 2, len(lines) + 1):
            run = " ".join(lines[i:j])
            if len(run) > most_characters:
                break
            yield run


def _letters(text: str) -> str:
    return "".join(text.lower().split())
