"""Distillation on the quickstart's world, shown to work: its data, its control, and its numbers.

    python -m quickstart.distill data --out DIR           shards of one-thing pictures, and of edits alone
    python -m quickstart.distill regress --out DIR ...    the controls: regression onto pictures
    python -m quickstart.distill evaluate --out DIR ...   summary.json, table.md and pictures.png

"a red circle on gray" has four right answers: the thing may stand in any of four cells, each of them one token. Before
it has looked, a network can only expect a quarter of a circle in each; a sampler of many steps makes up its mind on the
way, one of a single step cannot. That gap is what distillation for few steps is about, and edits do not have it.
The world has 192 such prompts, and training sees them all: they are asked again with noise that is new. Edits are of
scenes that training has not seen.

Legend: B samples, M target tokens of a sample, C channels.
"""

import argparse
import copy
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from safetensors import safe_open
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
from quickstart import bars, scenes, scoring
from quickstart.bars import Bar, at_least, at_most
from quickstart.benchmark import held_out_examples, picture
from quickstart.make_dataset import SAMPLES_PER_SHARD, to_sample, write_shards
from quickstart.scenes import EDIT_KINDS, Edit, Example, Kind, Split

COLUMNS = 2  # so that a thing has four places
TEACHER_STEPS, STUDENT_STEPS = (28, 8, 4, 2, 1), (4, 2, 1)
NEW_NOISE = ", new noise"  # rows: sampled with new noise at every step
SCALES = (2.0, 3.0, 4.0)  # at which the guidance-distilled student is compared with guidance
# Rows: at the times of its own schedule, and at the student's; there with new noise too.
TEACHERS, TEACHER_NEW = ("teacher, own times", "teacher"), "teacher" + NEW_NOISE
# A row: two passes a step, at the student's times. At a scale of 2 it draws two things more often than at 1.5.
GUIDED, GUIDANCE, GUIDED_STEPS = "teacher, guided", 1.5, (28, 2, 1)
CONTROLS = ("regression", "regression_same_noise")  # files, and rows of the table
NOISES = 4  # of each prompt, so that its places can differ; few, because prompts differ in how hard they are
ASKED = 4096  # of the pictures of one thing: what the teacher is asked to draw, for the control of the same noise
AT_ONCE = 256
# Of the controls, as LADD has them: updates, and the shares of the student's times.
CONTROL_STEPS, PROBABILITIES = 1100, (0.45, 0.05, 0.45, 0.05)

Row = tuple[str, int]  # of the table: model, steps


def main() -> None:
    parser = argparse.ArgumentParser(description="Distillation on the quickstart's world")
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="write the shards")
    regress = commands.add_parser("regress", help="train a control")
    regress.add_argument(
        "--same-noise", action="store_true", help="the stronger one: start from each picture's own noise"
    )
    regress.add_argument(
        "--pictures", type=Path, required=True, help="shards; of data_tools.generate_targets for --same-noise"
    )
    regress.add_argument("--mu", type=float, required=True, help="of the student's times: their shift's logarithm")
    regress.add_argument("--steps", type=int, default=CONTROL_STEPS)
    judge = commands.add_parser("evaluate", help="write the numbers and pictures")
    judge.add_argument("--student", type=Path, required=True, help="the run of stage ladd")
    judge.add_argument("--dev", type=Path, required=True, help="the run of stage guidance_distillation")
    judge.add_argument("--samples", type=int, default=768, help="768: every prompt, with 4 noises")
    for command in (regress, judge):
        command.add_argument("--teacher", type=Path, required=True)
    for command in (data, regress, judge):
        command.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    match arguments.command:
        case "data":
            write_one_thing(arguments.out / "one_thing", 12_000)
            write_one_thing(arguments.out / "asked", ASKED)  # the first of them
            write_shards(arguments.out / "edits", 24_576, seed=2, describe_fraction=0.0)
        case "regress":
            path = arguments.out / f"{CONTROLS[arguments.same_noise]}.safetensors"
            digest = hashlib.sha256(arguments.teacher.read_bytes()).hexdigest()
            made_of = {"mu": str(arguments.mu), "steps": str(arguments.steps), "teacher": digest}
            if not is_made_of(path, made_of):
                trained = load_trained(arguments.teacher)
                trained.shift = ShiftConfig(base_mu=arguments.mu, max_mu=arguments.mu)
                control = regressed(trained, arguments.pictures, arguments.steps, arguments.same_noise)
                write_whole(control, path, made_of)
        case "evaluate":
            summary = evaluate(arguments)
            print(json.dumps(summary, indent=2))


# Data ---------------------------------------------------------------------------------------------------------------


def one_thing(seed: int, split: Split, index: int) -> Example:
    """A picture of one thing, anywhere, and the words for it."""
    rng = scenes.example_rng(seed, split, index)
    scene = scenes.sample_scene(rng, COLUMNS, max_things=1)
    return Example(scenes.describe(scene, rng), Edit(Kind.DESCRIBE), (), scene)


def trained_thing(index: int) -> Example:
    return one_thing(3, Split.TRAIN, index)


def write_one_thing(out: Path, samples: int) -> None:
    out.mkdir(parents=True)
    with webdataset.ShardWriter(str(out / "%05d.tar"), maxcount=SAMPLES_PER_SHARD, verbose=0, mtime=0) as writer:
        for i in range(samples):
            writer.write(to_sample(trained_thing(i), f"{i:08d}"))


# The control --------------------------------------------------------------------------------------------------------


def regressed(trained: Trained, pictures: Path, steps: int, same_noise: bool, batch: int = 64) -> dict[str, Tensor]:
    """Weights of a student that learns pictures by squared error, in one step. trained: the teacher, where it begins,
    with the student's shift.

    Plain: from a picture that was noised to one of the student's times; where several are right, its best answer is
    between them. same_noise: from the very noise of which the teacher's sampler made the picture, whose seed
    `generate_targets` notes; then one is right, which is a distillation of its own (Luhman & Luhman 2021, 2101.02388).
    """
    model = trained.model.requires_grad_(True)
    index = ShardIndex.open(pictures)
    reader = SampleReader(index, trained.transform)
    samples = [reader.read(i) for i in range(len(index))]
    x_NMC, prompts = tokens(trained, samples), [raw.prompt for raw in samples]
    noise_NMC = noise_of(trained, samples, x_NMC) if same_noise else x_NMC.new_empty(0)
    shape = SampleShape(trained.encoders.text.t5_tokens, (2, COLUMNS))  # type: ignore[union-attr]
    layout = build_layout([shape] * batch)
    mu = mu_for_tokens(torch.tensor(x_NMC.shape[1]), trained.shift)
    times, shares = sampling_schedule(max(STUDENT_STEPS), mu)[:-1], torch.tensor(PROBABILITIES)
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    warmed = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 20, 1 - step / steps))
    for _ in range(steps):
        chosen = torch.randint(len(prompts), (batch,), generator=random)
        x_MC = x_NMC[chosen].flatten(0, 1)
        if same_noise:
            noise_MC, t_S = noise_NMC[chosen].flatten(0, 1), torch.ones(batch)
        else:
            noise_MC = torch.randn(x_MC.shape, generator=random)
            t_S = times[torch.multinomial(shares, batch, replacement=True, generator=random)]
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


def is_made_of(path: Path, made_of: dict[str, str]) -> bool:
    """Whether there is a finished control of the same teacher and settings, which need not be trained again."""
    if not path.exists():
        return False
    with safe_open(path, "pt") as file:
        return bool(file.metadata() == made_of)


def write_whole(weights: dict[str, Tensor], path: Path, made_of: dict[str, str]) -> None:
    part = path.with_suffix(".part")
    save_file(weights, part, made_of)
    part.replace(path)


def tokens(trained: Trained, samples: Sequence[RawSample]) -> Tensor:
    """[N, M, C] of pictures of one size."""
    images = [torch.as_tensor(raw.target).permute(2, 0, 1) for raw in samples]
    return torch.stack(image_tokens(images, trained.encoders.autoencoder, None, [], ""))


def noise_of(trained: Trained, samples: Sequence[RawSample], x_NMC: Tensor) -> Tensor:
    """[N, M, C] of which the teacher's sampler made the pictures x."""
    seeds = [raw.metadata["generated"]["seed"] for raw in samples]
    length, channels = x_NMC.shape[1:]
    return VisitRandom(0, trained.device).normal("sample", seeds, [length] * len(seeds), channels).view_as(x_NMC)


# Numbers ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Result:
    """Pictures of one sampler: how many of `count` were right, and in which cells the things of those stand.

    off: the share of all of them whose background is no colour that its name has in the data.
    """

    right: int
    count: int
    places: dict[str, Counter[int]] = field(default_factory=dict)  # by prompt
    off: float = math.nan
    right_N: list[bool] = field(default_factory=list)  # in the order of the questions

    @property
    def accuracy(self) -> float:
        return self.right / self.count

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's, of 95 %: over noise, for the same prompts."""
        p, n = self.accuracy, self.count
        middle, width = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - width) / (1 + z * z / n), (middle + width) / (1 + z * z / n)

    def entropy_ratio(self, frequencies: Sequence[float]) -> tuple[float, float, float]:
        """Entropy of the places that one prompt is given by many noises, over that of as many draws from the data's
        `frequencies`, and its 95 % interval over prompts. 0 where nothing was right.

        Of one prompt, because a model that has one place for each prompt uses all of them as well. As many draws,
        because few have less entropy than what they are drawn from.
        """
        found = np.array([entropy(places) for places in self.places.values()])
        expected = np.array([expected_entropy(places.total(), frequencies) for places in self.places.values()])
        if not expected.sum():
            return 0.0, 0.0, 0.0
        rows = resampled(len(found))
        low, high = np.quantile(found[rows].sum(1) / np.maximum(expected[rows].sum(1), 1e-9), (0.025, 0.975))
        return float(found.sum() / expected.sum()), float(low), float(high)


def entropy(counts: Counter[int]) -> float:
    """In nats."""
    return sum(n / counts.total() * math.log(counts.total() / n) for n in counts.values())


def expected_entropy(draws: int, frequencies: Sequence[float]) -> float:
    """The mean of `entropy` over all that so many independent draws can give: how often each is drawn is binomial."""
    return sum(
        math.comb(draws, n) * p**n * (1 - p) ** (draws - n) * n / draws * math.log(draws / n)
        for p in frequencies
        for n in range(1, draws + 1)
    )


def resampled(count: int) -> np.ndarray:
    """[2000, count] numbers of those that each resample of a bootstrap holds."""
    return np.random.default_rng(0).integers(count, size=(2000, count))


def mean_interval(value_N: np.ndarray) -> tuple[float, float]:
    """Of 95 %, by the bootstrap."""
    low, high = np.quantile(value_N[resampled(len(value_N))].mean(1), (0.025, 0.975))
    return float(low), float(high)


@dataclass(slots=True)
class Cost:
    """Of one picture. Seconds are of the machine as busy as it was."""

    passes: float
    seconds: float


@dataclass(slots=True)
class Guidance:
    """At one scale: differences to the guided teacher's pictures of N edits, what either sampler takes, and how
    many edits are right, as a share that is right.
    """

    dev_N: np.ndarray
    unguided_N: np.ndarray
    dev: Cost
    guided: Cost
    dev_right: float
    guided_right: float
    unguided_right: float


def questions(count: int) -> list[Example]:
    """What a model is asked to draw: every NOISES in a row are the same. All were seen in training, where there are
    192 of them; what is new is the noise.
    """
    found = {example.prompt: example for example in map(trained_thing, range(ASKED))}
    prompts = list(found.values())
    return [prompts[i // NOISES % len(prompts)] for i in range(count)]


def frequencies_of_data() -> list[float]:
    """Of the cells."""
    counts = Counter[int]()
    for example in map(trained_thing, range(ASKED)):
        (thing,) = example.target.things
        counts[example.target.cells().index((thing.row, thing.column))] += 1
    return [n / counts.total() for n in counts.values()]


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


def with_cost(trained: Trained, examples: Sequence[Example], sampler: SamplerConfig) -> tuple[list[Tensor], Cost]:
    """`generate`, its calls of the network counted: one over k packed samples is a pass of each."""
    samples: list[int] = []
    hook = trained.model.register_forward_pre_hook(lambda model, inputs: samples.append(len(inputs[3])))  # times
    started = time.perf_counter()
    images = generate(trained, examples, sampler)
    seconds = time.perf_counter() - started
    hook.remove()
    return images, Cost(sum(samples) / len(examples), seconds / len(examples))


def judged(images: Sequence[Tensor], examples: Sequence[Example]) -> Result:
    result = Result(0, len(examples), off=0.0)
    for image, example in zip(map(image_HWC, images), examples, strict=True):
        result.off += background_off(image, example.target.background) / len(examples)
        result.right_N.append(scoring.text_to_image_right(image, example.target))
        if result.right_N[-1]:
            result.right += 1
            place = next(i for i, cell in enumerate(scoring.read_cells(image)) if cell.shape is not None)
            result.places.setdefault(example.prompt, Counter())[place] += 1
    return result


def background_off(image: np.ndarray, name: str) -> bool:
    """Whether a channel is farther from the middle of the name's colours than any in the data, and 3 of 255."""
    apart = abs(scoring.estimate_background(image) * 255 - np.array(scenes.BACKGROUNDS[name]))
    return bool(apart.max() > scenes.BACKGROUND_JITTER + 3)


def difference(better: Result, worse: Result) -> list[float]:
    """Of accuracies over the same questions, and its 95 % interval."""
    change_N = np.array(better.right_N, float) - np.array(worse.right_N, float)
    return [float(change_N.mean()), *mean_interval(change_N)]


def edits_right(trained: Trained, examples: Sequence[Example], sampler: SamplerConfig) -> Result:
    right = edits_judged(generate(trained, examples, sampler), examples)
    return Result(sum(right), len(right))


def edits_judged(images: Sequence[Tensor], examples: Sequence[Example]) -> list[bool]:
    return [scoring.score_example(image_HWC(i), e).right for i, e in zip(images, examples, strict=True)]


def evaluate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes summary.json, table.md and pictures.png into --out; returns the summary."""
    out, count = arguments.out, arguments.samples
    teacher, student = load_trained(arguments.teacher), load_trained(arguments.student)
    things, edits = questions(count), held_out_examples(Split.HELDOUT_SCENES, count, EDIT_KINDS)
    pictures: dict[Row, list[Tensor]] = {}
    edited: dict[Row, Result] = {}
    for name, shift in zip(TEACHERS, (teacher.shift, student.shift), strict=True):
        teacher.shift = shift
        pictures |= {(name, n): generate(teacher, things, SamplerConfig(steps=n)) for n in TEACHER_STEPS}
        edited[name, 28] = edits_right(teacher, edits, SamplerConfig(steps=28))
    for n in STUDENT_STEPS[:-1]:
        pictures[TEACHER_NEW, n] = generate(teacher, things, SamplerConfig(steps=n, stochastic=True))
    for n in GUIDED_STEPS:
        pictures[GUIDED, n] = generate(teacher, things, SamplerConfig(steps=n, guidance=GUIDANCE))
    control = replace(student, model=copy.deepcopy(teacher.model))
    for name in ("student", *CONTROLS):
        few = student if name == "student" else control
        if few is control:
            control.model.load_state_dict(load_file(out / f"{name}.safetensors"))
        for row, sampler in few_steps(name).items():
            pictures[row] = generate(few, things, sampler)
            edited[row] = edits_right(few, edits, sampler)
    drawn = {row: judged(images, things) for row, images in pictures.items()}
    frequencies = frequencies_of_data()
    guidance = guidance_errors(teacher, load_trained(arguments.dev), edits[: max(1, count // 4)])
    summary = summarised(drawn, edited, guidance, frequencies)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    parts = (table(drawn, edited, frequencies), table_of_guidance(guidance), bars.table(judged_by(summary)))
    (out / "table.md").write_text("\n".join(parts))
    chosen = [pictures["teacher", 28], pictures["student" + NEW_NOISE, 4], pictures["student", 1]]
    numbers = range(0, count, max(1, count // 12))  # of several prompts
    save_grid(out / "pictures.png", [(things[i].prompt, [images[i] for images in chosen]) for i in numbers], scale=3)
    return summary


def few_steps(name: str) -> dict[Row, SamplerConfig]:
    """By Euler's steps, and with new noise at each where there is more than one."""
    new = {(name + NEW_NOISE, n): SamplerConfig(steps=n, stochastic=True) for n in STUDENT_STEPS if n > 1}
    return {(name, n): SamplerConfig(steps=n) for n in STUDENT_STEPS} | new


def summarised(
    drawn: dict[Row, Result], edited: dict[Row, Result], guidance: dict[float, Guidance], frequencies: Sequence[float]
) -> dict[str, Any]:
    """The teacher's numbers are the best of those at its own times, at the student's and with new noise; a student's or
    control's are the better of Euler's and those with new noise. `student_steps`: of the student's edits and places, as
    few as bring it within 0.05 of the teacher's 28. Differences have their intervals.
    """
    teachers = {n: best(drawn, (*TEACHERS, TEACHER_NEW), n) for n in TEACHER_STEPS}
    students = {n: best(drawn, ("student", "student" + NEW_NOISE), n) for n in STUDENT_STEPS}
    of_teacher, of_student = ({n: drawn[r].accuracy for n, r in rows.items()} for rows in (teachers, students))
    control = max((row for name in CONTROLS for row in few_steps(name)), key=lambda row: drawn[row].accuracy)
    steps = min((n for n in STUDENT_STEPS if of_student[n] >= of_teacher[28] - 0.05), default=4)
    judged_student, at_scales = drawn[students[steps]], list(guidance.values())
    return {
        "teacher": {str(n): accuracy for n, accuracy in of_teacher.items()},
        "teacher_guided": {str(n): drawn[GUIDED, n].accuracy for n in GUIDED_STEPS},
        "student": {str(n): accuracy for n, accuracy in of_student.items()},
        "student_steps": steps,
        "regression_student": drawn[control].accuracy,
        "gap": difference(drawn[teachers[28]], drawn[teachers[steps]]),
        "student_below_teacher": difference(drawn[teachers[28]], judged_student),
        "student_above_control": difference(judged_student, drawn[control]),
        "edit_accuracy_teacher": max(edited[name, 28].accuracy for name in TEACHERS),
        "edit_accuracy_student": edited[students[steps]].accuracy,
        "position_entropy_ratio": judged_student.entropy_ratio(frequencies)[0],
        "background_off_teacher": drawn[teachers[28]].off,
        "background_off_student": judged_student.off,
        "dev_guidance_error": float(np.mean([g.dev_N for g in at_scales])),
        "unguided_guidance_error": float(np.mean([g.unguided_N for g in at_scales])),
        "dev_passes": float(np.mean([g.dev.passes for g in at_scales])),
        "guided_passes": float(np.mean([g.guided.passes for g in at_scales])),
    }


def best(drawn: dict[Row, Result], names: Sequence[str], steps: int) -> Row:
    return max(((n, steps) for n in names if (n, steps) in drawn), key=lambda row: drawn[row].accuracy)


def judged_by(summary: dict[str, Any]) -> list[Bar]:
    """What the demonstration is for."""
    steps, teacher = str(summary["student_steps"]), summary["teacher"]
    drop = summary["edit_accuracy_teacher"] - summary["edit_accuracy_student"]
    student = summary["student"][steps]
    return [
        at_least("teacher, 28 steps", teacher["28"], 0.85),
        at_most(f"teacher, the student's {steps}", teacher[steps], teacher["28"] - 0.25),
        at_least(f"student, {steps}", student, teacher["28"] - 0.05),
        at_least("student above the controls by", student - summary["regression_student"], 0.0),
        at_least("entropy of places, of the data's", summary["position_entropy_ratio"], 0.9),
        at_most("edits lost", drop, 0.03),
        at_most("dev's difference to guidance", summary["dev_guidance_error"], summary["unguided_guidance_error"] / 3),
        at_most("passes of dev", summary["dev_passes"], summary["guided_passes"] / 2),
    ]


def guidance_errors(teacher: Trained, dev: Trained, edits: Sequence[Example]) -> dict[float, Guidance]:
    """Mean absolute difference, pictures in [0, 1], to what guidance makes at each of SCALES: of dev, told the scale,
    and of no guidance. The same noise for all.
    """
    teacher.shift = dev.shift
    unguided = generate(teacher, edits, SamplerConfig(steps=8))
    found = {}
    for scale in SCALES:
        goal, of_guided = with_cost(teacher, edits, SamplerConfig(steps=8, guidance=scale))
        told, of_dev = with_cost(dev, edits, SamplerConfig(steps=8, embedded_guidance=scale))
        right = (float(np.mean(edits_judged(images, edits))) for images in (told, goal, unguided))
        found[scale] = Guidance(differences(told, goal), differences(unguided, goal), of_dev, of_guided, *right)
    return found


def image_HWC(image: Tensor) -> np.ndarray:
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def differences(images: Sequence[Tensor], others: Sequence[Tensor]) -> np.ndarray:
    """[N]: mean absolute, pictures in [0, 1]."""
    both = zip(images, others, strict=True)
    return np.array([(a.float() - b.float()).abs().mean().item() / 255 for a, b in both])


def table(drawn: dict[Row, Result], edited: dict[Row, Result], frequencies: Sequence[float]) -> str:
    """Markdown. With each number its 95 % interval; see `Result` for what they are."""
    lines = ["| model | steps | right | entropy of places | background off | edits right |", "|---" * 6 + "|"]
    for (name, steps), result in drawn.items():
        edits = edited.get((name, steps))
        cells = [
            number(result.accuracy, *result.interval()),
            number(*result.entropy_ratio(frequencies)),
            f"{result.off:.3f}",
            number(edits.accuracy, *edits.interval()) if edits else "",
        ]
        lines.append(f"| {name} | {steps} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def number(value: float, low: float, high: float, digits: int = 3) -> str:
    return f"{value:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def table_of_guidance(guidance: dict[float, Guidance]) -> str:
    """Markdown: differences with their 95 % intervals over edits, and the cost of a picture by either sampler."""
    head = ["guidance", "difference of dev to it", "of no guidance to it", "passes of dev", "of guidance"]
    head += ["seconds of dev", "of guidance", "edits right by dev", "by guidance", "by neither"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for scale, g in guidance.items():
        errors = [number(e.mean(), *mean_interval(e), digits=4) for e in (g.dev_N, g.unguided_N)]
        passes, seconds = f"{g.dev.passes:g} | {g.guided.passes:g}", f"{g.dev.seconds:.4f} | {g.guided.seconds:.4f}"
        right = f"{g.dev_right:.3f} | {g.guided_right:.3f} | {g.unguided_right:.3f}"
        lines.append(f"| {scale:g} | {' | '.join(errors)} | {passes} | {seconds} | {right} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
