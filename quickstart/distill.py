"""Distillation on the quickstart's world, shown to work: its data, its control, and its numbers.

    python -m quickstart.distill data --out DIR           shards of one-thing pictures, and of edits alone
    python -m quickstart.distill regress --out DIR ...    the controls: regression onto the pictures LADD learns from
    python -m quickstart.distill evaluate --out DIR ...   summary.json, table.md and pictures.png

"a red circle on gray" has four right answers: the thing may stand in any of four cells, each of them one token. Before
it has looked, a network can only expect a quarter of a circle in each; a sampler of many steps makes up its mind on the
way, one of a single step cannot. That gap is what distillation for few steps is about, and edits do not have it.

Legend: B samples, M target tokens of a sample, C channels.
"""

import argparse
import copy
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset
from safetensors.torch import load_file, save_file
from torch import Tensor

from kontext_train.data.encode import conditioning, image_tokens
from kontext_train.data.index import ShardIndex
from kontext_train.data.sample import RawSample, SampleReader
from kontext_train.evaluation.trained import Trained, load_trained
from kontext_train.flow.config import SamplerConfig, ShiftConfig
from kontext_train.flow.path import interpolate
from kontext_train.flow.timesteps import mu_for_tokens, sampling_schedule
from kontext_train.generate import Request
from kontext_train.models.kontext import predict_velocity
from kontext_train.models.sequence import SampleShape, build_layout
from kontext_train.randomness import VisitRandom
from kontext_train.training.pictures import save_grid
from quickstart import scenes, scoring
from quickstart.benchmark import held_out_examples, picture
from quickstart.make_dataset import SAMPLES_PER_SHARD, to_sample, write_shards
from quickstart.scenes import EDIT_KINDS, Edit, Example, Kind, Split

COLUMNS = 2  # so that a thing has four places
TEACHER_STEPS, STUDENT_STEPS = (28, 8, 4, 2, 1), (4, 2, 1)
SCALES = (2.0, 3.0, 4.0)  # at which the guidance-distilled student is compared with guidance
CONTROLS = ("regression", "regression_same_noise")  # files, and rows of the table
AT_ONCE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description="Distillation on the quickstart's world")
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="write the shards")
    regress = commands.add_parser("regress", help="train a control")
    regress.add_argument(
        "--same-noise", action="store_true", help="the stronger one: start from each picture's own noise"
    )
    regress.add_argument("--targets", type=Path, required=True, help="shards of data_tools.generate_targets")
    regress.add_argument("--mu", type=float, required=True, help="of the student's times: their shift's logarithm")
    regress.add_argument("--steps", type=int, default=1000)
    judge = commands.add_parser("evaluate", help="write the numbers and pictures")
    judge.add_argument("--student", type=Path, required=True, help="the run of stage ladd")
    judge.add_argument("--dev", type=Path, required=True, help="the run of stage guidance_distillation")
    judge.add_argument("--samples", type=int, default=512)
    judge.add_argument("--guidance", type=float, required=True, help="of the teacher, as its targets were made")
    for command in (regress, judge):
        command.add_argument("--teacher", type=Path, required=True)
    for command in (data, regress, judge):
        command.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    match arguments.command:
        case "data":
            write_one_thing(arguments.out / "one_thing", 12_000)
            write_one_thing(arguments.out / "asked", 4096)  # the first of them: what the teacher is asked to draw
            write_shards(arguments.out / "edits", 6144, seed=2, describe_fraction=0.0)
        case "regress":
            trained = load_trained(arguments.teacher)
            trained.shift = ShiftConfig(base_mu=arguments.mu, max_mu=arguments.mu)
            control = regressed(trained, arguments.targets, arguments.steps, arguments.same_noise)
            save_file(control, arguments.out / f"{CONTROLS[arguments.same_noise]}.safetensors")
        case "evaluate":
            summary = evaluate(arguments)
            print(json.dumps(summary, indent=2))


# Data ---------------------------------------------------------------------------------------------------------------


def one_thing(seed: int, split: Split, index: int) -> Example:
    """A picture of one thing, anywhere, and the words for it."""
    rng = scenes.example_rng(seed, split, index)
    scene = scenes.sample_scene(rng, COLUMNS, max_things=1)
    return Example(scenes.describe(scene, rng), Edit(Kind.DESCRIBE), (), scene)


def write_one_thing(out: Path, samples: int) -> None:
    out.mkdir(parents=True)
    with webdataset.ShardWriter(str(out / "%05d.tar"), maxcount=SAMPLES_PER_SHARD, verbose=0, mtime=0) as writer:
        for i in range(samples):
            writer.write(to_sample(one_thing(3, Split.TRAIN, i), f"{i:08d}"))


# The control --------------------------------------------------------------------------------------------------------


def regressed(trained: Trained, targets: Path, steps: int, same_noise: bool, batch: int = 64) -> dict[str, Tensor]:
    """Weights of a student that learns by squared error, in one step, what LADD learns from its heads. trained: the
    teacher, where it begins, with the student's shift.

    Plain: from a picture that was noised to one of the student's times; where several are right, its best answer is
    between them. same_noise: from the very noise of which the teacher's sampler made the picture, whose seed
    `generate_targets` notes; then one is right, which is a distillation of its own (Luhman & Luhman 2021, 2101.02388).
    """
    model = trained.model.requires_grad_(True)
    index = ShardIndex.open(targets)
    reader = SampleReader(index, trained.transform)
    noise_NMC, x_NMC, prompts = pairs(trained, [reader.read(i) for i in range(len(index))])
    shape = SampleShape(trained.encoders.text.t5_tokens, (2, COLUMNS))  # type: ignore[union-attr]
    layout = build_layout([shape] * batch)
    mu = mu_for_tokens(torch.tensor(x_NMC.shape[1]), trained.shift)
    times = sampling_schedule(max(STUDENT_STEPS), mu)[:-1]
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    warmed = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1 - step / steps))
    for _ in range(steps):
        chosen = torch.randint(len(prompts), (batch,), generator=random)
        x_MC, noise_MC, t_S = x_NMC[chosen].flatten(0, 1), noise_NMC[chosen].flatten(0, 1), torch.ones(batch)
        if not same_noise:
            noise_MC = torch.randn(noise_MC.shape, generator=random)
            t_S = times[torch.randint(len(times), (batch,), generator=random)]
        t_M1 = t_S[layout.sample_of_target_M][:, None]
        z_MC = interpolate(x_MC, noise_MC, t_M1)
        cond = conditioning([prompts[i] for i in chosen.tolist()], [], layout, trained.encoders, z_MC)
        made_MC = z_MC - t_M1 * predict_velocity(model, z_MC, t_S, cond).float()
        (made_MC - x_MC).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warmed.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def pairs(trained: Trained, samples: Sequence[RawSample]) -> tuple[Tensor, Tensor, list[str]]:
    """(noise [N, M, C], tokens [N, M, C], prompts) of what the teacher made from that noise."""
    images = [torch.as_tensor(raw.target).permute(2, 0, 1) for raw in samples]
    x_NMC = torch.stack(image_tokens(images, trained.encoders.autoencoder, None, [], ""))
    seeds = [raw.metadata["generated"]["seed"] for raw in samples]
    tokens, channels = x_NMC.shape[1:]
    noise = VisitRandom(0, trained.device).normal("sample", seeds, [tokens] * len(seeds), channels)
    return noise.view_as(x_NMC), x_NMC, [raw.prompt for raw in samples]


# Numbers ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Result:
    """Pictures of one sampler: how many of `count` were right, and in which cells the things of those stand."""

    right: int
    count: int
    places: Counter[int]

    @property
    def accuracy(self) -> float:
        return self.right / self.count

    @property
    def entropy(self) -> float:
        """Of the places, in nats."""
        return sum(n / self.right * math.log(self.right / n) for n in self.places.values())

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's, of 95 %."""
        p, n = self.accuracy, self.count
        middle, width = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - width) / (1 + z * z / n), (middle + width) / (1 + z * z / n)


def generate(trained: Trained, examples: Sequence[Example], sampler: SamplerConfig) -> list[Tensor]:
    """[3, H, W] uint8 for each example; the noise of the i-th is the same for every model and sampler."""
    images, numbered = [], iter(enumerate(examples))
    while some := list(islice(numbered, AT_ONCE)):
        requests = []
        for i, example in some:
            height, width, _ = scenes.draw(example.target).shape
            requests.append(Request(example.prompt, [picture(c) for c in example.contexts], height, width, seed=i))
        images += trained.generate(requests, sampler)
    return images


def judged(images: Sequence[Tensor], examples: Sequence[Example]) -> Result:
    places, right = Counter[int](), 0
    for image, example in zip(map(image_HWC, images), examples, strict=True):
        if scoring.text_to_image_right(image, example.target):
            right += 1
            places[next(i for i, cell in enumerate(scoring.read_cells(image)) if cell.shape is not None)] += 1
    return Result(right, len(examples), places)


def edits_right(trained: Trained, examples: Sequence[Example], sampler: SamplerConfig) -> float:
    images = generate(trained, examples, sampler)
    return float(np.mean([scoring.score_example(image_HWC(i), e).right for i, e in zip(images, examples, strict=True)]))


def evaluate(arguments: argparse.Namespace) -> dict[str, object]:
    """Writes summary.json, table.md and pictures.png into --out; returns the summary."""
    out, count = arguments.out, arguments.samples
    teacher, student = load_trained(arguments.teacher), load_trained(arguments.student)
    things = [one_thing(4, Split.HELDOUT_SCENES, i) for i in range(count)]
    guided, plain = SamplerConfig(guidance=arguments.guidance), SamplerConfig(guidance=1.0)
    own = {("teacher, own times", n): generate(teacher, things, replace(guided, steps=n)) for n in TEACHER_STEPS}
    teacher.shift = student.shift  # all stop at the same times, so that steps compare
    pictures = {("teacher", n): generate(teacher, things, replace(guided, steps=n)) for n in TEACHER_STEPS} | own
    pictures |= {("student", n): generate(student, things, replace(plain, steps=n)) for n in STUDENT_STEPS}
    control = replace(teacher, model=copy.deepcopy(teacher.model))
    for name in CONTROLS:
        control.model.load_state_dict(load_file(out / f"{name}.safetensors"))
        pictures |= {(name, n): generate(control, things, replace(plain, steps=n)) for n in STUDENT_STEPS}
    results = {key: judged(images, things) for key, images in pictures.items()}

    edits = held_out_examples(Split.HELDOUT_SCENES, count, EDIT_KINDS)
    enough = results["teacher", 28].accuracy - 0.05
    steps = min((n for n in STUDENT_STEPS if results["student", n].accuracy >= enough), default=4)
    places = Counter(
        example.target.cells().index((t.row, t.column)) for example in things for t in example.target.things
    )
    edit_accuracy = edits_right(teacher, edits, replace(plain, steps=28))
    errors = guidance_errors(teacher, load_trained(arguments.dev), edits[: count // 4])
    dev_error, unguided_error = np.mean(list(errors.values()), axis=0).tolist()
    summary: dict[str, object] = {
        "teacher": {str(n): results["teacher", n].accuracy for n in TEACHER_STEPS},
        "student": {str(n): results["student", n].accuracy for n in STUDENT_STEPS},
        "regression_student": max(results[name, n].accuracy for name in CONTROLS for n in STUDENT_STEPS),
        "edit_accuracy_teacher": edit_accuracy,
        "edit_accuracy_student": edits_right(student, edits, replace(plain, steps=steps)),
        "position_entropy_ratio": results["student", steps].entropy / Result(count, count, places).entropy,
        "dev_guidance_error": dev_error,
        "unguided_guidance_error": unguided_error,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (out / "table.md").write_text(table(results) + "\n" + table_of_guidance(errors))
    chosen = [pictures["teacher", 28], pictures["student", 4], pictures["student", 1]]
    rows = [(e.prompt, list(row)) for e, *row in islice(zip(things, *chosen, strict=True), 12)]
    save_grid(out / "pictures.png", rows, scale=3)
    return summary


def guidance_errors(teacher: Trained, dev: Trained, edits: Sequence[Example]) -> dict[float, tuple[float, float]]:
    """Mean absolute difference, pictures in [0, 1], to what guidance makes at each of SCALES: of dev, told the scale,
    and of no guidance. The same noise for all.
    """
    teacher.shift = dev.shift
    unguided = generate(teacher, edits, SamplerConfig(steps=8))
    errors = {}
    for scale in SCALES:
        goal = generate(teacher, edits, SamplerConfig(steps=8, guidance=scale))
        told = generate(dev, edits, SamplerConfig(steps=8, embedded_guidance=scale))
        errors[scale] = (difference(told, goal), difference(unguided, goal))
    return errors


def image_HWC(image: Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def difference(images: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    pairs = zip(images, others, strict=True)
    return float(np.mean([(a.float() - b.float()).abs().mean().item() / 255 for a, b in pairs]))


def table(results: dict[tuple[str, int], Result]) -> str:
    """Markdown: accuracy with its 95 % interval, and the entropy of places relative to four equal ones."""
    lines = ["| model | steps | right | 95 % interval | entropy of places |", "|---|---|---|---|---|"]
    for (name, steps), result in results.items():
        low, high = result.interval()
        entropy = result.entropy / math.log(4)
        lines.append(f"| {name} | {steps} | {result.accuracy:.3f} | {low:.3f} to {high:.3f} | {entropy:.3f} |")
    return "\n".join(lines) + "\n"


def table_of_guidance(errors: dict[float, tuple[float, float]]) -> str:
    lines = ["| guidance | difference of dev to it | of no guidance to it |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {w:g} | {dev:.4f} | {none:.4f} |" for w, (dev, none) in errors.items())]) + "\n"


if __name__ == "__main__":
    main()
