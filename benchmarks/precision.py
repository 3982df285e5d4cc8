"""What each precision costs in loss: short runs of the quickstart's model on the same batches, noise and times.

    python -m benchmarks.precision [STEPS] [SAMPLES]

Float8 is emulated (parallel.float8_emulate), so this shows numbers and no speed. The control is float8 whose scales
are 256 times too large, so that most values saturate. Rounding to nearest does little harm here, where steps are large
beside weights; tests/training/test_optimizers.py shows where it loses everything. Prints a table and writes
benchmarks/results/precision.json.
"""

import json
import math
import multiprocessing
import sys
import tempfile
from pathlib import Path

from kontext_train.config import register_schemas, typed

ROOT = Path(__file__).parent.parent
SMALL_SIDES = ("parallel.float8_emulate=true", "parallel.float8_min_features=16")
ROUNDED = ("parallel.master_dtype=bfloat16", "optimizer.stochastic_rounding=true")
VARIANTS: dict[str, tuple[str, ...]] = {
    "float32": ("parallel.param_dtype=float32",),
    "bfloat16": (),
    "float8 tensorwise": ("parallel.float8=tensorwise", *SMALL_SIDES),
    "float8 rowwise": ("parallel.float8=rowwise", *SMALL_SIDES),
    "mxfp8": ("parallel.float8=mxfp8", *SMALL_SIDES),
    "control: float8 tensorwise, scales x 256": ("parallel.float8=tensorwise", *SMALL_SIDES),
    "int8 moments": ("optimizer.moments=int8",),
    "bfloat16 weights, stochastic rounding": ROUNDED,
    "bfloat16 weights, stochastic rounding, int8 moments": (*ROUNDED, "optimizer.moments=int8"),
    "bfloat16 weights, rounded to nearest (refused)": ("parallel.master_dtype=bfloat16",),
}


def break_scales() -> None:
    """Make torchao scale 256 times too much."""
    from torchao.float8 import float8_utils, fsdp_utils

    right = float8_utils.amax_to_scale
    float8_utils.amax_to_scale = lambda *arguments, **named: 256 * right(*arguments, **named)
    fsdp_utils.precompute_float8_dynamic_scale_for_fsdp = lambda module: None


def run(variant: str, shards: Path, folder: Path, steps: int) -> None:
    from hydra import compose, initialize_config_module

    from kontext_train.train import train

    if "scales" in variant:
        break_scales()
    register_schemas()
    with initialize_config_module("kontext_train.conf", version_base="1.3"):
        config = typed(
            compose(
                "train",
                overrides=[
                    "experiment=quickstart",
                    f"encoders.path={ROOT / 'quickstart' / 'encoders'}",
                    f"data.train={shards}",
                    f"run.dir={folder}",
                    f"run.steps={steps}",
                    f"run.save_every_steps={steps}",
                    "run.log_every_steps=1",
                    "data.workers=0",
                    "optimizer.name=adamw",
                    "optimizer.lr=1e-3",
                    "logging.wandb=disabled",
                    "logging.progress_bar=false",
                    *VARIANTS[variant],
                ],
            )
        )
    train(config)  # past config.check, which refuses rounding to nearest


def main(steps: int, samples: int) -> None:
    from kontext_train.data.index_build import build_index
    from kontext_train.training.metrics import read_metrics
    from quickstart.make_dataset import write_shards

    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        shards = Path(name) / "shards"
        write_shards(shards, samples)
        build_index(shards)
        for number, variant in enumerate(VARIANTS):
            folder = Path(name) / str(number)
            process = multiprocessing.get_context("spawn").Process(target=run, args=(variant, shards, folder, steps))
            process.start()
            process.join()
            losses = [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]
            last = losses[-(steps // 4) :]
            mean = sum(last) / len(last) if process.exitcode == 0 else math.nan
            results[variant] = mean
            relative = mean / results.get("bfloat16", results["float32"])
            print(f"{variant:55} {mean:.4f}  {relative:6.3f} x bfloat16", flush=True)
    report = {"steps": steps, "samples": samples, f"mean loss of the last {steps // 4} steps": results}
    (ROOT / "benchmarks" / "results" / "precision.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    given = [int(argument) for argument in sys.argv[1:]]
    main(*(given or [300]), *([] if len(given) > 1 else [4000]))
