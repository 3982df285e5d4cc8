"""Can the text be read that was asked for. RapidOCR (PP-OCR on onnxruntime) has its models in its package."""

import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from rapidocr import RapidOCR
from torchmetrics.functional.text import char_error_rate

from kontext_train.evaluation.benchmark import Case
from kontext_train.evaluation.metrics.base import Better, Shown

TEXT_EDITING = "Text Editing"
# KontextBench has no column for the text: it is what stands in quotes at the end of an instruction, after such a word.
QUOTED = re.compile(
    r"""\b(?:to|with|by|into|says?|saying|reads?)\s*:?\s*["“”'‘]([^"“”]+?)["“”'’]\s*[.!]?$""", re.IGNORECASE
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
        wanted = expected_text(shown.case)
        return {} if wanted is None else compared(wanted, self.read(shown.image))

    def read(self, image: Image.Image) -> list[str]:
        """Lines, from top to bottom."""
        found: Any = self.engine(np.asarray(image)[:, :, ::-1])  # BGR
        return list(found.txts or ())


def expected_text(case: Case) -> str | None:
    if case.text is not None or case.category != TEXT_EDITING:
        return case.text
    found = QUOTED.search(case.instruction.strip())
    return found[1] if found else None


def compared(wanted: str, lines: list[str]) -> dict[str, float]:
    """Against the run of lines that is nearest: other things in a picture may have text too."""
    runs = list(_runs(lines, 2 * len(wanted)))
    errors = [float(char_error_rate(run.lower(), wanted.lower())) for run in runs]
    found = any(_letters(wanted) in _letters(run) for run in runs)
    return {"text_found": float(found), "text_similarity": 1 - min([1.0, *errors])}


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
