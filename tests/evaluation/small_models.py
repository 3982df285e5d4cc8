"""Models of the released classes and file formats, small enough to make here, random where nothing is said.

What such a model shows is that pictures, masks and words get where they should, not what released weights would see.
"""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, Dinov2Config, Dinov2Model

from kontext_train.evaluation.metrics.lpips import alexnet_features
from quickstart import scenes
from quickstart.benchmark import caption
from tests.runs import ENCODERS

FACE_AT = (30, 20)  # anchor point, in strides of 16, that the detector below finds if there is red in the image
LANDMARKS = np.array([(-2.0, -1.5), (2.0, -1.5), (0.0, 0.5), (-1.5, 2.5), (1.5, 2.5)])  # from there, in strides
CLIP_SIDE, CLIP_TOKENS = 48, 32


def noise(seed: int, height: int = 96, width: int = 128) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def alexnet(folder: Path) -> str:
    """A file with torchvision's names."""
    torch.manual_seed(0)
    state = {f"features.{name}": value for name, value in alexnet_features().state_dict().items()}
    torch.save(state | {"classifier.1.weight": torch.zeros(2, 2)}, folder / "alexnet.pth")
    return str(folder / "alexnet.pth")


def dino(folder: Path) -> str:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return str(folder)


def clip(folder: Path) -> str:
    """With the quickstart's tokenizer."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ENCODERS / "tokenizer")
    tokenizer.save_pretrained(folder)
    _clip_model(tokenizer, width=32, side=32, tokens=16).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def clip_of_scenes(folder: Path, steps: int = 200) -> str:
    """A CLIP that was trained here, on scenes and their captions: it knows the quickstart's colours and shapes."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ENCODERS / "tokenizer", model_max_length=CLIP_TOKENS)
    tokenizer.save_pretrained(folder)
    size = {"height": CLIP_SIDE, "width": CLIP_SIDE}
    processor = CLIPImageProcessor(size=size, do_center_crop=False)
    processor.save_pretrained(folder)
    drawn = [scenes.sample_scene(np.random.default_rng(i), columns=2 + i % 2) for i in range(1500)]
    pixels = processor(images=[scenes.draw(scene) for scene in drawn], return_tensors="pt")["pixel_values"]
    words = [caption(scene) for scene in drawn]
    tokens = tokenizer(words, padding="max_length", max_length=CLIP_TOKENS, return_tensors="pt")
    model = _clip_model(tokenizer, width=48, side=CLIP_SIDE, tokens=CLIP_TOKENS)
    model.logit_scale.data.fill_(2.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    for _ in range(steps):
        chosen = torch.randint(0, len(drawn), (64,))
        batch = {"input_ids": tokens["input_ids"][chosen], "attention_mask": tokens["attention_mask"][chosen]}
        model(**batch, pixel_values=pixels[chosen], return_loss=True).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return str(folder)


def _clip_model(tokenizer: CLIPTokenizer, width: int, side: int, tokens: int) -> CLIPModel:
    common = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 4}
    of_text = {"vocab_size": len(tokenizer), "max_position_embeddings": tokens, "eos_token_id": tokenizer.eos_token_id}
    of_images = {"image_size": side, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=of_text | common, vision_config=of_images | common, projection_dim=16))


class Pooled(nn.Module):
    """In Inception's place, features of any image: its mean colours on a grid of 4 x 4."""

    def forward(self, images: torch.Tensor, return_features: bool = True) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images.to(torch.float64) / 64, 4).flatten(1)


def inception(folder: Path) -> str:
    torch.jit.script(Pooled()).save(str(folder / "inception.pt"))
    return str(folder / "inception.pt")


# Faces ----------------------------------------------------------------------------------------------------------------


def _constant(name: str, value: np.ndarray) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value, name))


def _write_model(file: Path, nodes: list[onnx.NodeProto], side: int, outputs: list[str]) -> None:
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, side, side])
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "graph", [given], made)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), file)


def faces(folder: Path) -> str:
    """An SCRFD that finds one face, at a known place, where an image has a patch of red; a recogniser that gives mean
    colours.
    """
    nodes = [
        _constant("red_only", np.array([1, -1, -1], np.float32).reshape(1, 3, 1, 1)),
        _constant("channels", np.array([1], np.int64)),
        helper.make_node("AveragePool", ["input"], ["patches"], kernel_shape=[32, 32], strides=[32, 32]),
        helper.make_node("Mul", ["patches", "red_only"], ["weighed"]),
        helper.make_node("ReduceSum", ["weighed", "channels"], ["redness"], keepdims=0),
        helper.make_node("ReduceMax", ["redness"], ["reddest"], keepdims=0),
    ]
    for stride in (8, 16, 32):
        count = (640 // stride) ** 2 * 2
        score, box, point = (np.zeros((count, n), np.float32) for n in (1, 4, 10))
        if stride == 16:
            i = (FACE_AT[1] * (640 // stride) + FACE_AT[0]) * 2 + 1
            score[i], box[i], point[i] = 0.3, (3, 3, 3, 4), LANDMARKS.reshape(-1)
        nodes += [_constant(f"s{stride}", score), _constant(f"box{stride}", box), _constant(f"point{stride}", point)]
        nodes += [helper.make_node("Mul", [f"s{stride}", "reddest"], [f"score{stride}"])]
    outputs = [f"{kind}{stride}" for kind in ("score", "box", "point") for stride in (8, 16, 32)]
    _write_model(folder / "scrfd_test.onnx", nodes, 640, outputs)
    mean = helper.make_node("ReduceMean", ["input"], ["embedding"], axes=[2, 3], keepdims=0)
    _write_model(folder / "glintr_test.onnx", [mean], 112, ["embedding"])
    return str(folder)


def portrait(colour: tuple[int, int, int], around: tuple[int, int, int] = (0, 0, 0)) -> Image.Image:
    """Of 320 x 320, so half the detector's scale: a patch of one colour where it finds a face."""
    image = Image.new("RGB", (320, 320), around)
    x, y = (16 * FACE_AT[0] / 2, 16 * FACE_AT[1] / 2)
    ImageDraw.Draw(image).rectangle((x - 70, y - 70, x + 70, y + 70), fill=colour)
    return image
