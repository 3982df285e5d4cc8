"""Is it the same face: cosine of the embeddings of the largest face in the image and in its context.

The detector is an SCRFD with five landmarks (Guo et al. 2021, arXiv 2105.04714), the recogniser any ArcFace-like ONNX:
112 x 112 RGB in [-1, 1] to one vector. AuraFace's folder has both. A case whose context shows no face is left out, by
name; a lost face counts as similarity 0, or models that lose faces would look good.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnxruntime
from PIL import Image

from kontext_train.errors import ConfigError
from kontext_train.evaluation.metrics.base import CONTEXT, Better, LeftOut, Shown, cosine, digest

SIDE = 640  # pixels that the detector sees
STRIDES, ANCHORS = (8, 16, 32), 2  # of SCRFD's maps; anchors at each of their points
LEAST_SCORE = 0.5
# Where eyes, nose and corners of the mouth lie in an aligned face of 112 x 112, (x, y): ArcFace's template, as in
# github.com/deepinsight/insightface, utils/face_align.py.
TEMPLATE = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
)
ALIGNED = 112


class Face:
    name = "face"
    workers = 1
    numbers: ClassVar[Mapping[str, Better]] = {"face_similarity": Better.higher, "face_found": Better.higher}
    needs: ClassVar[Mapping[str, str]] = dict.fromkeys(numbers, CONTEXT)

    def __init__(self, folder: str) -> None:
        detector, recogniser = (
            _one(folder, "scrfd*.onnx"),
            _one(folder, "glintr*.onnx", "w600k*.onnx", "recogniser*.onnx"),
        )
        self.detector, self.recogniser = _session(detector), _session(recogniser)
        self.about = f"{recogniser.name} on faces of {detector.name}, {digest(detector, recogniser)}"

    def measure(self, shown: Shown) -> dict[str, float]:
        if shown.context is None:
            return {}
        wanted = self.embed(shown.context)
        if wanted is None:
            raise LeftOut("its context shows no face")
        found = self.embed(shown.image)
        if found is None:
            return {"face_similarity": 0.0, "face_found": 0.0}
        return {"face_similarity": cosine(found, wanted), "face_found": 1.0}

    def embed(self, image: Image.Image) -> np.ndarray | None:
        """Of the largest face; None if there is none."""
        landmarks = self.landmarks(image)
        if landmarks is None:
            return None
        pixels = np.asarray(aligned(image, landmarks), np.float32) / 127.5 - 1
        (embedding,) = self.recogniser.run(
            None, {self.recogniser.get_inputs()[0].name: pixels.transpose(2, 0, 1)[None]}
        )
        return embedding[0]

    def landmarks(self, image: Image.Image) -> np.ndarray | None:
        """(x, y) [5, 2] of the largest face, in the image's pixels."""
        scale = SIDE / max(image.size)
        small = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
        canvas = Image.new("RGB", (SIDE, SIDE))
        canvas.paste(small)
        pixels = (np.asarray(canvas, np.float32) - 127.5) / 128
        outputs = self.detector.run(None, {self.detector.get_inputs()[0].name: pixels.transpose(2, 0, 1)[None]})
        scores, boxes, points = (outputs[i * len(STRIDES) : (i + 1) * len(STRIDES)] for i in range(3))
        best, largest = None, 0.0
        for stride, score_A, box_A4, point_A10 in zip(STRIDES, scores, boxes, points, strict=True):
            likely = score_A.reshape(-1) >= LEAST_SCORE
            centre_A2 = _centres(stride)[likely]
            box = box_A4.reshape(-1, 4)[likely]  # distances from the centre to the four sides, in strides
            area = (box[:, 0] + box[:, 2]) * (box[:, 1] + box[:, 3]) * stride**2
            if len(area) and area.max() > largest:
                largest, i = area.max(), area.argmax()
                best = centre_A2[i] + point_A10.reshape(-1, 5, 2)[likely][i] * stride
        return None if best is None else best / scale


def _centres(stride: int) -> np.ndarray:
    """(x, y) of all anchors, row by row."""
    y, x = np.mgrid[: SIDE // stride, : SIDE // stride] * stride
    return np.repeat(np.stack([x, y], -1).reshape(-1, 2), ANCHORS, axis=0).astype(np.float64)


def aligned(image: Image.Image, landmarks: np.ndarray) -> Image.Image:
    """The face turned, scaled and cut so that its landmarks lie on the template as well as they can.

    x' = a x - b y + c, y' = b x + a y + d by least squares, from the image to the template.
    """
    ones, none = np.ones(5), np.zeros(5)
    x, y = landmarks.T
    rows = np.concatenate([np.stack([x, -y, ones, none], 1), np.stack([y, x, none, ones], 1)])
    a, b, c, d = np.linalg.lstsq(rows, TEMPLATE.T.reshape(-1), rcond=None)[0]
    back = np.linalg.inv([[a, -b, c], [b, a, d], [0, 0, 1]])  # Pillow asks where each new pixel comes from
    return image.transform(
        (ALIGNED, ALIGNED), Image.Transform.AFFINE, tuple(back[:2].reshape(-1)), Image.Resampling.BILINEAR
    )


def _one(folder: str, *patterns: str) -> Path:
    found = sorted(file for pattern in patterns for file in Path(folder).glob(pattern))
    if len(found) != 1:
        rule = f"must hold one of {' or '.join(patterns)}, and holds {len(found)}"
        raise ConfigError("metrics.face", folder, rule, "Give AuraFace's folder, for example")
    return found[0]


def _session(file: Path) -> onnxruntime.InferenceSession:
    try:
        return onnxruntime.InferenceSession(str(file), providers=onnxruntime.get_available_providers())
    except Exception as error:  # onnxruntime's own kinds
        rule = f"is no ONNX model that runs here ({str(error).splitlines()[0]})"
        raise ConfigError("metrics.face", str(file), rule, "Download it again") from error
