"""What saving costs training: how long the loop stands still, and how much slower steps are while a thread writes.

One process and one thread for computing, a network of 68 M parameters with AdamW and an average: 16 bytes a parameter.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before torch: how many threads it starts is read once.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from benchmarks.step import filled
from kontext_train.distributed.config import ParallelConfig, Precision
from kontext_train.distributed.parallelize import parallelize
from kontext_train.distributed.setup import process_group
from kontext_train.models.config import FluxConfig
from kontext_train.models.flux import Flux
from kontext_train.models.kontext import Conditioning, predict_velocity
from kontext_train.models.sequence import SampleShape, build_layout
from kontext_train.training.checkpoint_saver import Saver
from kontext_train.training.config import CheckpointConfig, OptimizerConfig
from kontext_train.training.ema import EMA
from kontext_train.training.optimizer import PhaseOptimizer

_EXAMPLES = """examples:
  python -m benchmarks.checkpoint                    about two minutes on two cores
  python -m benchmarks.checkpoint --folder /scratch  of another disk"""

CONFIG = FluxConfig(
    vec_in_dim=64,
    context_in_dim=64,
    hidden_size=768,
    num_heads=6,
    depth=1,
    depth_single_blocks=5,
    axes_dim=[32, 48, 48],
)
SHAPES = [SampleShape(32, (16, 16), ((16, 16),))] * 2


class Run:
    def __init__(self, mesh: Any) -> None:
        self.model = filled(Flux(CONFIG), torch.float32)
        parallelize(self.model, mesh, ParallelConfig(param_dtype=Precision.float32))
        self.optimizer = PhaseOptimizer(self.model, OptimizerConfig(), seed=0)
        self.ema = EMA(self.model, half_life_images=1000)
        self.layout = build_layout(SHAPES)

    def step(self) -> None:
        targets, contexts = sum(self.layout.target_lengths), sum(s.context_tokens for s in SHAPES)
        cond = Conditioning(
            txt_TE=torch.randn(sum(s.txt for s in SHAPES), 64),
            vec_SP=torch.randn(len(SHAPES), 64),
            context_KC=torch.randn(contexts, 64),
            layout=self.layout,
        )
        self.optimizer.zero()
        predict_velocity(self.model, torch.randn(targets, 64), torch.rand(len(SHAPES)), cond).square().mean().backward()
        self.optimizer.clip()
        self.optimizer.step(1.0)
        self.ema.update(images=len(SHAPES))

    def state(self) -> dict[str, Any]:
        weights = {"student": dict(self.model.named_parameters())}
        return {"modules": weights, "optimizers": {"student": self.optimizer.state()}, "ema": self.ema.average}


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(run: Run, folder: Path, saves: int) -> dict[str, Any]:
    state_bytes = sum(_bytes(value) for value in run.state().values())
    for _ in range(2):
        run.step()
    alone = [seconds(run.step) for _ in range(8)]
    results: dict[str, Any] = {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "state_gib": state_bytes / 2**30,
        "step_s": statistics.median(alone),
    }
    step = 0
    for asynchronous in (True, False):
        saver = Saver(folder, CheckpointConfig(asynchronous=asynchronous, keep_last=1))
        stalls, writes, beside = list[float](), list[float](), list[float]()
        for _ in range(saves + 1):
            step += 1
            saver.save(step, run.state(), {"step": step}, wait=False)
            stalls.append(saver.stall_s)
            while saver.writing is not None:
                beside.append(seconds(run.step))
                saver.check()
            writes.append(saver.write_s)
        name = "asynchronous" if asynchronous else "synchronous"
        stall = statistics.median(stalls[1:])
        results[name] = {
            "first_stall_s": stalls[0],  # takes the host memory
            "stall_s": stall,
            "stall_steps": stall / results["step_s"],
            "write_s": statistics.median(writes[1:]),
        }
        if beside:
            results[name]["step_beside_s"] = statistics.median(beside)
    return results


def _bytes(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_bytes(inner) for inner in value.values())
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoint",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--saves", type=int, default=5, help="of each kind (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="on the disk to write to (default: the system's temporary one)")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/checkpoint.json"), help="(default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name, process_group(ParallelConfig()) as world:
        results = measure(Run(world.mesh), Path(name), arguments.saves)
    size, gib = results["parameters"] / 1e6, results["state_gib"]
    print(f"{size:.1f} M parameters, {gib:.2f} GiB, step {results['step_s']:.2f} s")
    for name in ("asynchronous", "synchronous"):
        told = ", ".join(f"{key} {value:.3f}" for key, value in results[name].items())
        print(f"{name:>14}  {told}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
