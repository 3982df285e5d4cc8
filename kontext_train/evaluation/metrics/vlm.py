"""A vision-language model as judge, behind an OpenAI-compatible endpoint (vLLM, SGLang and others serve one).

It sees the images before and after and the instruction, and gives two marks from 0 to 10, reported as 0 to 1.
"""

import base64
import hashlib
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, ClassVar

from PIL import Image

from kontext_train.evaluation.config import VlmConfig
from kontext_train.evaluation.metrics.base import CONTEXT, Better, Shown, Unmeasured, open_rgb

QUESTION = """\
You judge an image editing system. The first images are what it was given, the last one is what it made of them.
The instruction was: {instruction}
Give two integers from 0 to 10. "follows": how completely the last image does what the instruction says, and nothing \
else. "keeps": how well everything that the instruction does not mention is as it was before.
Answer with one JSON object and nothing else, for example {{"follows": 7, "keeps": 9}}."""
MAKE_QUESTION = """\
You judge an image generation system. It was asked for: {instruction}
Give an integer from 0 to 10. "follows": how completely the image shows what was asked for.
Answer with one JSON object and nothing else, for example {{"follows": 7}}."""
MOST, RETRIED, BACKOFF_S = 10, (408, 409, 429, 500, 502, 503, 504), 1.0
SHOWN_CHARACTERS = 200  # of an answer that is none, in a message


class Vlm:
    name = "vlm"
    numbers: ClassVar[Mapping[str, Better]] = {"vlm_follows": Better.higher, "vlm_keeps": Better.higher}
    needs: ClassVar[Mapping[str, str]] = {"vlm_keeps": CONTEXT}

    def __init__(self, config: VlmConfig) -> None:
        assert config.url is not None
        self.config, self.workers = config, config.concurrency
        self.url = f"{config.url.rstrip('/')}/chat/completions"
        asked = hashlib.sha256((QUESTION + MAKE_QUESTION).encode()).hexdigest()[:8]
        self.about = f"{config.model} at {config.url}, question {asked}"
        self.backoff_s = BACKOFF_S

    def measure(self, shown: Shown) -> dict[str, float]:
        contexts = [open_rgb(file) for file in shown.case.contexts]
        question = (QUESTION if contexts else MAKE_QUESTION).format(instruction=shown.case.instruction)
        marks = _json_in(self._answer(question, [*contexts, shown.image]))
        found = {}
        for name in ("follows", "keeps") if contexts else ("follows",):
            mark = marks.get(name)
            if isinstance(mark, bool) or not isinstance(mark, int | float) or not 0 <= mark <= MOST:
                raise Unmeasured(f"the judge's {name} is {mark!r}, not a number from 0 to {MOST}")
            found[f"vlm_{name}"] = mark / MOST
        return found

    def _answer(self, question: str, images: list[Image.Image]) -> str:
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images
        ]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
        body = json.dumps({"model": self.config.model, "temperature": 0, "max_tokens": 200, "messages": [message]})
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.config.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        for attempt in range(self.config.retries + 1):
            if attempt:
                time.sleep(self.backoff_s * 2 ** (attempt - 1))
            try:
                request = urllib.request.Request(self.url, body.encode(), headers)
                with urllib.request.urlopen(request, timeout=self.config.timeout_s) as response:
                    return json.load(response)["choices"][0]["message"]["content"]
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}"
                if error.code not in RETRIED:
                    break
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
                reason = f"{type(error).__name__}: {error}"
        raise Unmeasured(f"the judge at {self.config.url} does not answer ({reason})")


def _json_in(answer: str) -> dict[str, Any]:
    """The last object in an answer, which may stand in words, behind others or in a code block."""
    decoder, found, start = json.JSONDecoder(), None, 0
    while isinstance(answer, str) and (start := answer.find("{", start)) >= 0:
        try:
            found, start = decoder.raw_decode(answer, start)
        except ValueError:
            start += 1
    if found is None:
        raise Unmeasured(f"the judge gave no JSON object: {str(answer)[:SHOWN_CHARACTERS]!r}")
    return found


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
