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
# What the last of these says of the quote that follows it: is it to be there, to go, or only to be found?
ROLES = re.compile(
    r"""(?P<place>\b(?:next\sto|close\sto|above|below|under|beneath|after|before|beside|near|between)\b)
    |(?P<old>\b(?:replac\w+|remov\w+|delet\w+|eras\w+|chang\w+|swap\w*|from|instead\sof|rather\sthan|without)\b)
    |(?P<new>\b(?:to|with|by|into|for|be|becomes?|says?|saying|reads?|reading|writ\w+|add\w*|put\w*|insert\w*|typ\w+
        |spell\w*|titled|label\w*|named|called|shows?|showing)\b|->|→)""",
    re.IGNORECASE | re.VERBOSE,
)


class Ocr:
    name = "ocr"
    workers = 1
    about = f"RapidOCR {version('rapidocr')}"
    numbers: ClassVar[Mapping[str, Better]] = {"text_found": Better.higher, "text_similarity": Better.higher}

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

    Without `text`, of Text Editing alone: the quotes that the instruction says are to be there, or, where it says
    nothing of any, those that it names.
    """
    if case.text is not None or case.category != TEXT_EDITING:
        return (case.text,) if case.text else ()
    by_role: dict[str, list[str]] = {}
    end = 0
    for quote in QUOTED.finditer(case.instruction):
        roles = [found.lastgroup for found in ROLES.finditer(case.instruction, end, quote.start())]
        text = next(group for group in quote.groups() if group is not None).strip()
        if text:
            by_role.setdefault(roles[-1] or "" if roles else "named", []).append(text)
        end = quote.end()
    wanted = by_role.get("new") or ([] if "old" in by_role else by_role.get("named", []))
    return tuple(dict.fromkeys(wanted)) or None


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
