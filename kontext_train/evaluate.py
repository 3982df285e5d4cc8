"""kontext-evaluate: make a benchmark's images with a model, measure them, show them side by side, let people judge."""

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kontext_train.errors import ConfigError
from kontext_train.evaluation.config import ArenaConfig, ReportConfig, RunConfig, ScoreConfig

USAGE = """\
kontext-evaluate run    checkpoint=PATH benchmark=FOLDER out=RESULTS [key=value ...]
kontext-evaluate score  results=RESULTS [metrics.NAME=MODEL ...]
kontext-evaluate report results=[RESULTS,...] out=FOLDER
kontext-evaluate arena  results=[RESULTS,RESULTS,...] votes=FILE.jsonl

run     makes the images. The same command goes on after a stop; torchrun shares the work out over processes.
  checkpoint=PATH        a run folder, a step folder, or what kontext-export wrote
  benchmark=FOLDER       KontextBench as it is released, or a folder of the same form (partial=true: a part of it)
  making.seeds=1  making.per_category=N  making.resolution=trained|kontext  making.height=1024 making.width=1024
  making.sampler.steps=28  making.sampler.guidance=1.0  making.sampler.embedded_guidance=2.5
  making.sampler.stochastic=false
  making.at_once=1       images sampled together; latency is measured at 1
  name=NAME  ema=true  encoders=PATH
score   measures them. Each metric's model is a local folder or file; none is downloaded.
  metrics.pixels=true    untouched region, colour shift, distance to the truth, cycle error
  metrics.clip=FOLDER  metrics.dino=FOLDER  metrics.lpips=FILE  metrics.face=FOLDER  metrics.ocr=true
  metrics.aesthetic=FILE  metrics.inception=FILE  metrics.cmmd=true  metrics.references=FOLDER
  metrics.vlm.url=URL metrics.vlm.model=NAME
report  writes one page that opens from disk: FOLDER/index.html
arena   serves a page where people choose between two images without knowing whose they are (port=8360)

  kontext-evaluate run checkpoint=outputs/first benchmark=kontext-bench out=outputs/eval/first
  torchrun --nproc-per-node 8 -m kontext_train.evaluate run ...

Exit status: 0; 1 if some images were not made or not measured (each is named); 2 if an option or a file is refused.
docs/evaluation.md says what each number means.
"""

LONGEST = timedelta(days=30)  # that the first process waits for the last

C = TypeVar("C", RunConfig, ScoreConfig, ReportConfig, ArenaConfig)


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return
    commands: dict[str, Callable[[Sequence[str]], bool]] = {
        "run": lambda rest: run(parse(RunConfig, rest)),
        "score": lambda rest: score(parse(ScoreConfig, rest)),
        "report": lambda rest: report(parse(ReportConfig, rest)),
        "arena": lambda rest: arena(parse(ArenaConfig, rest)),
    }
    try:
        if arguments[0] not in commands:
            rule = f"is none of {', '.join(commands)}"
            raise ConfigError("command", arguments[0], rule, "kontext-evaluate --help shows them")
        whole = commands[arguments[0]](arguments[1:])
    except ConfigError as error:
        print(f"kontext-evaluate: {error}", file=sys.stderr)
        sys.exit(2)
    if not whole:
        sys.exit(1)


def parse(kind: type[C], arguments: Sequence[str]) -> C:
    """key=value arguments as one command's options, checked."""
    for argument in arguments:
        if "=" not in argument:
            raise ConfigError("argument", argument, "is not key=value", "kontext-evaluate --help shows the keys")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.from_dotlist(list(arguments)))
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, YAMLError) as error:
        what = str(error).splitlines()[0]
        raise ConfigError("arguments", " ".join(arguments), what, "kontext-evaluate --help shows the keys") from error
    assert isinstance(config, kind)
    return config


def run(config: RunConfig) -> bool:
    """Whether every image of this process's share is there."""
    import torch

    from kontext_train.evaluation.benchmark import read_benchmark
    from kontext_train.evaluation.make_images import make_images, settings_of
    from kontext_train.evaluation.trained import Trained, describe_model, load_trained

    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    benchmark = read_benchmark(config.benchmark, partial=config.partial)
    out = Path(config.out)
    model = describe_model(config.checkpoint, config.ema, config.encoders)
    settings = settings_of(config.name or out.name, model, benchmark, config.making)

    def load() -> Trained:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else None
        return load_trained(config.checkpoint, ema=config.ema, encoders_path=config.encoders, device=device)

    wait = others(rank, ranks)
    made = make_images(load, benchmark, out, settings, config.making, rank, ranks, progress=rank == 0)
    share = f" (process {rank} of {ranks})" if ranks > 1 else ""
    print(f"{out}: {made.new} images made, {made.kept} were there, {len(made.failed)} failed{share}")
    for name, reason in made.failed.items():
        print(f"  {name}: {reason}", file=sys.stderr)
    wait()
    return not made.failed


def others(rank: int, ranks: int) -> Callable[[], None]:
    """What waits until every process is done, however long: torchrun ends all others as soon as one fails."""
    if ranks == 1 or "MASTER_ADDR" not in os.environ:  # processes that nobody holds together
        return lambda: None
    from torch.distributed import rendezvous

    store, _, _ = next(rendezvous("env://"))

    def wait() -> None:
        sys.stdout.flush()  # torchrun's end is no clean one
        store.set(f"evaluate/{rank}", "done")
        store.wait([f"evaluate/{other}" for other in range(ranks)], LONGEST)

    return wait


def score(config: ScoreConfig) -> bool:
    """Whether every image was made and measured."""
    from kontext_train.evaluation.metrics.build import build_metrics
    from kontext_train.evaluation.results import open_results
    from kontext_train.evaluation.scoring import complete, score, table

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        rule = "is more than one process, and score takes one"
        raise ConfigError("WORLD_SIZE", os.environ["WORLD_SIZE"], rule, "Start it without torchrun")
    results = open_results(config.results)
    metrics, sets = build_metrics(config.metrics)
    summary = score(results, metrics, sets, config.metrics.references, progress=True)
    print(table(summary))
    return complete(summary)


def report(config: ReportConfig) -> bool:
    from kontext_train.evaluation.report import write_report
    from kontext_train.evaluation.results import open_results

    print(write_report([open_results(folder) for folder in config.results], Path(config.out)))
    return True


def arena(config: ArenaConfig) -> bool:
    from kontext_train.evaluation.arena import serve
    from kontext_train.evaluation.results import open_results

    serve([open_results(folder) for folder in config.results], config)
    return True


if __name__ == "__main__":
    main()
