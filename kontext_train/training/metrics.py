"""What a run tells while it goes on: a progress bar, metrics.jsonl, wandb, and a loss curve at the end.

Every rank holds a RunLog and only the main one writes, so that the loop has no ranks in it.
"""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import torch

from kontext_train.training.checkpoint_files import put
from kontext_train.training.config import LoggingConfig, Wandb

# Dense bfloat16 TFLOP/s from the vendors' data sheets, by a part of the device's name.
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "B200": 2250.0, "A100": 312.0}


def peak_tflops(device: torch.device) -> float:
    """What model FLOPs are held against: the data sheet on a known GPU, a measured matrix product elsewhere."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, tflops in PEAK_TFLOPS.items():
            if known in name:
                return tflops
    return _measured_tflops(device)


def _measured_tflops(device: torch.device, size: int = 1024, repeats: int = 4) -> float:
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


class RunLog:
    def __init__(
        self, folder: Path, config: LoggingConfig, composed: dict[str, Any], steps: int, start: int, is_main: bool
    ) -> None:
        """start: the step resumed from; lines of later steps, which a killed run left, are dropped."""
        self.file, self.bar, self.wandb = folder / "metrics.jsonl", None, None
        self.is_main = is_main
        if not is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.rewind(start)
        if config.progress_bar:
            from tqdm import tqdm

            self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, mininterval=0.5)
        if config.wandb is not Wandb.disabled:
            import wandb

            mode: Any = config.wandb.value
            run_id = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]  # a resumed run goes on in its own
            self.wandb = wandb.init(
                project=config.project,
                dir=folder,
                name=folder.name,
                id=run_id,
                resume="allow",
                mode=mode,
                config=composed,
            )

    def rewind(self, step: int) -> None:
        """The run goes on from an earlier step: drop the lines of later ones. wandb keeps what it has."""
        if not self.is_main:
            return
        kept = [r for r in read_metrics(self.file) if r["step"] <= step]
        put(self.file, "".join(json.dumps(r) + "\n" for r in kept).encode())  # a kill here must not cost what there is
        if self.bar is not None:
            self.bar.n = step

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl, the bar and wandb."""
        if not self.is_main:
            return
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.bar is not None and "loss" in values:
            shown = {k.split("/")[-1]: f"{values[k]:.4g}" for k in SHOWN if k in values}
            self.bar.set_postfix(shown, refresh=False)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def picture(self, step: int, name: str, file: Path) -> None:
        if self.wandb is not None:
            import wandb

            self.wandb.log({name: wandb.Image(str(file))}, step=step)

    def close(self, failed: bool) -> None:
        """Draws loss.png beside metrics.jsonl."""
        if not self.is_main:
            return
        if self.bar is not None:
            self.bar.close()
        draw_loss(self.file, self.file.with_name("loss.png"))
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(failed))


SHOWN = ("loss", "speed/tokens_per_s", "speed/samples_per_s", "speed/data_wait", "speed/mfu")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; the last may be torn by a kill."""
    if not file.is_file():
        return []
    records = []
    for line in file.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def draw_loss(metrics: Path, picture: Path) -> None:
    """Training and validation loss over steps, as a PNG."""
    from matplotlib.figure import Figure

    records = read_metrics(metrics)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="mean squared velocity error", yscale="log")
    for name, style in (("loss", "-"), ("validation/loss", "o-")):
        points = [(r["step"], r[name]) for r in records if name in r]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name, linewidth=1, markersize=3)
    if axes.lines:
        axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
