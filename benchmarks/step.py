"""Forward and backward of the same small FLUX, ours against diffusers' FluxTransformer2DModel, on this CPU.

    python -m benchmarks.step [--rounds 9] [--dtype bfloat16] [--mode eager] [--out benchmarks/results/step.json]

Each side runs in a process of its own with one thread; the two take turns, step by step, and a round's ratio is our CPU
time over theirs (CPU time, so that other jobs on the machine count for neither). Reported is the median ratio of all
rounds with its quartiles. Two workloads of the same samples for both sides:

    uniform   four edits of 16 x 16 tokens with one context of the same size
    mixed     eight samples, half of them text-to-image, three aspect ratios, 0 to 2 contexts. diffusers' model takes a
              batch of one length without a mask, so its user pads every sample to the longest
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# Before torch: how many threads it starts is read once.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch import nn

from kontext_train.models.config import FluxConfig
from kontext_train.models.diffusers_format import transformer_config
from kontext_train.models.flux import Flux
from kontext_train.models.kontext import Conditioning, predict_velocity
from kontext_train.models.sequence import SampleShape, build_layout

CONFIG = FluxConfig(
    vec_in_dim=64,
    context_in_dim=64,
    hidden_size=384,
    num_heads=6,
    depth=2,
    depth_single_blocks=4,
    axes_dim=[8, 28, 28],
)
TXT = 32
WORKLOADS = {
    "uniform": [SampleShape(TXT, (16, 16), ((16, 16),))] * 4,
    "mixed": [
        SampleShape(TXT, (16, 16)),
        SampleShape(TXT, (12, 20)),
        SampleShape(TXT, (20, 12)),
        SampleShape(TXT, (16, 16)),
        SampleShape(TXT, (16, 16), ((16, 16),)),
        SampleShape(TXT, (12, 20), ((16, 16),)),
        SampleShape(TXT, (20, 12), ((20, 12),)),
        SampleShape(TXT, (16, 16), ((16, 16), (12, 20))),
    ],
}
Step = Callable[[], None]


def our_step(shapes: list[SampleShape], dtype: torch.dtype, compiled: bool) -> Step:
    model = filled(Flux(CONFIG), dtype)
    if compiled:
        for block in model.blocks():
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=True)
    layout = build_layout(shapes)
    targets, contexts = sum(layout.target_lengths), sum(s.context_tokens for s in shapes)
    z_MC, t_S = torch.randn(targets, 64, dtype=dtype), torch.rand(len(shapes))
    cond = Conditioning(
        txt_TE=torch.randn(len(shapes) * TXT, 64, dtype=dtype),
        vec_SP=torch.randn(len(shapes), 64, dtype=dtype),
        context_KC=torch.randn(contexts, 64, dtype=dtype),
        layout=layout,
    )

    def step() -> None:
        model.zero_grad()
        predict_velocity(model, z_MC, t_S, cond).float().square().mean().backward()

    return step


def their_step(shapes: list[SampleShape], dtype: torch.dtype, compiled: bool) -> Step:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_config(transformer_config(CONFIG))
    model = filled(model, dtype)
    if compiled:
        model.compile_repeated_blocks(fullgraph=True)
    longest = max(s.target_tokens + s.context_tokens for s in shapes)
    target = max(s.target_tokens for s in shapes)
    count = len(shapes)
    inputs: dict[str, Any] = {
        "hidden_states": torch.randn(count, longest, 64, dtype=dtype),
        "encoder_hidden_states": torch.randn(count, TXT, 64, dtype=dtype),
        "pooled_projections": torch.randn(count, 64, dtype=dtype),
        "timestep": torch.rand(count).to(dtype),
        "img_ids": torch.rand(longest, 3),
        "txt_ids": torch.zeros(TXT, 3),
    }

    def step() -> None:
        model.zero_grad()
        model(**inputs).sample[:, :target].float().square().mean().backward()

    return step


def filled(model: nn.Module, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model.to(dtype)


SIDES = {"ours": our_step, "diffusers": their_step}


def serve(side: str, shapes: list[SampleShape], dtype: torch.dtype, compiled: bool, turn: Connection) -> None:
    """One side's process: a step and its CPU seconds for every message."""
    torch.set_num_threads(1)
    step = SIDES[side](shapes, dtype, compiled)
    for _ in range(3):
        step()
    turn.send("ready")
    while turn.recv():
        started = time.process_time()
        step()
        turn.send(time.process_time() - started)


def compare(workload: str, dtype: torch.dtype, compiled: bool, rounds: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    turns: dict[str, Connection] = {}
    processes = []
    for side in SIDES:
        turns[side], other = context.Pipe()
        arguments = (side, WORKLOADS[workload], dtype, compiled, other)
        processes.append(context.Process(target=serve, args=arguments, daemon=True))
        processes[-1].start()
        assert turns[side].recv() == "ready"  # one after the other: they share the machine
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for i in range(rounds):
        for side in (*SIDES,) if i % 2 else (*SIDES,)[::-1]:
            turns[side].send(True)
            seconds[side].append(turns[side].recv())
    for side, process in zip(SIDES, processes, strict=True):
        turns[side].send(False)
        process.join()
    ratios = [ours / theirs for ours, theirs in zip(seconds["ours"], seconds["diffusers"], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "workload": workload,
        "mode": "compiled" if compiled else "eager",
        "dtype": str(dtype).removeprefix("torch."),
        "ratio": median,
        "quartiles": [low, high],
        "ours_s": statistics.median(seconds["ours"]),
        "diffusers_s": statistics.median(seconds["diffusers"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--mode", choices=["eager", "compiled"], nargs="+", default=["eager", "compiled"])
    parser.add_argument("--workload", choices=list(WORKLOADS), nargs="+", default=list(WORKLOADS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step.json"))
    arguments = parser.parse_args()
    machine = {"cpu": cpu_name(), "python": platform.python_version(), "torch": torch.__version__, "threads": 1}
    report: dict[str, Any] = {"machine": machine, "argv": sys.argv[1:], "results": []}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    print(f"{'workload':10}{'mode':10}{'dtype':10}{'ours':>9}{'diffusers':>11}{'ratio':>8}   quartiles")
    for mode in arguments.mode:
        for dtype in arguments.dtype:
            for workload in arguments.workload:
                r = compare(workload, getattr(torch, dtype), mode == "compiled", arguments.rounds)
                report["results"].append(r)
                arguments.out.write_text(json.dumps(report, indent=2) + "\n")  # after each, in case it is stopped
                times = f"{r['ours_s'] * 1e3:7.0f}ms{r['diffusers_s'] * 1e3:9.0f}ms"
                spread = f"{r['quartiles'][0]:.2f} to {r['quartiles'][1]:.2f}"
                print(f"{r['workload']:10}{r['mode']:10}{r['dtype']:10}{times}{r['ratio']:8.2f}   {spread}", flush=True)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
