"""Runs the sections one after another, each in a process and a share of the time of its own, and prints one table.

    bash benchmarks/gpu/run.sh [folder] [--only ceilings,attention,blocks,whole] [--minutes 9] [--device cpu --tiny]

A section that fails, or is not done in its time, is reported in the table and in the JSON, and the others go on.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import attention, ceilings, training
from benchmarks.gpu.measure import PEAK_TFLOPS, TRIPLET_TFLOP, Setting

SECTIONS = {
    "ceilings": ceilings.run,
    "attention": attention.run,
    "blocks": training.run_blocks,
    "whole": training.run_whole,
}
SHARES = {"ceilings": 30, "attention": 90, "blocks": 310, "whole": 100}  # of the time, in seconds of nine minutes
GRACE_S = 40.0  # between "begin nothing new" and the end of a section: one contender may be compiling


def main() -> None:
    arguments = _arguments()
    if arguments.section:
        _run_section(arguments)
        return
    started, names = time.monotonic(), arguments.only.split(",")
    folder = Path(arguments.folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        left_s = 60 * arguments.minutes - (time.monotonic() - started)
        share_s = left_s * SHARES[name] / sum(SHARES[n] for n in names[i:])
        rows += _section_in_process(name, share_s, arguments, folder)
    report = {**machine(arguments.device), "tiny": arguments.tiny, "minutes": (time.monotonic() - started) / 60}
    report |= {"peak_tflops": PEAK_TFLOPS, "triplet_tflop": TRIPLET_TFLOP, "rows": rows}
    kind = report["device"].replace(" ", "-").lower()
    path = folder / f"gpu-{kind}-{datetime.now():%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    print(f"{report['minutes']:.1f} minutes; written to {path}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="benchmarks/results")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, in the order in which they run")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU: the same code, numbers without meaning")
    parser.add_argument("--section", help=argparse.SUPPRESS)  # a child's
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.only.split(",")) - set(SECTIONS)
    if unknown:
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; known: {', '.join(SECTIONS)}")
    return arguments


def _section_in_process(name: str, share_s: float, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Rows of one section. They are written as they come, so what was measured before a crash is kept."""
    lines = folder / f".{name}.jsonl"
    lines.write_text("")
    command = [sys.executable, "-m", "benchmarks.gpu.suite", "--section", name, "--seconds", f"{share_s:.1f}"]
    command += ["--rows", str(lines), "--device", arguments.device, *(["--tiny"] if arguments.tiny else [])]
    child = subprocess.Popen(command, start_new_session=True)
    error = ""
    try:
        if child.wait(timeout=share_s):
            error = f"the section's process ended with status {child.returncode}"
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # compilers that it started too
        child.wait()
        error = f"the section was not done in its {share_s:.0f} s"
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    lines.unlink()
    return [*rows, {"section": name, "name": "whole section", "error": error}] if error else rows


def _run_section(arguments: argparse.Namespace) -> None:
    deadline = time.monotonic() + max(arguments.seconds - GRACE_S, arguments.seconds / 2)
    if arguments.tiny:
        torch.set_num_threads(1)
        torch.compile = partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]  # no code generation
    with open(arguments.rows, "a", buffering=1) as lines:
        run(arguments.section, arguments.device, arguments.tiny, deadline, lines.write)


def run(section: str, device: str, tiny: bool, deadline: float, write: Any) -> None:
    """One section in this process; `write` takes one line of JSON at a time."""

    def emit(values: dict[str, Any]) -> None:
        print(_line(values), file=sys.stderr)
        write(json.dumps(values) + "\n")

    torch.manual_seed(0)
    SECTIONS[section](Setting(torch.device(device), tiny, deadline, emit))


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    about: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0], "device": "cpu"}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about |= {"device": properties.name, "memory_gib": properties.total_memory / 2**30}
        about |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return about


def table(report: dict[str, Any]) -> str:
    about = ", ".join(f"{key} {report[key]}" for key in ("device", "torch", "python"))
    head = f"{'':48s} {'ms':>9s} {'TFLOP/s':>8s} {'MFU':>6s} {'triplets/s/GPU':>15s} {'GiB':>6s} {'first s':>7s}"
    lines, section = [about, f"MFU against {PEAK_TFLOPS:g} TFLOP/s; * derived from a cut depth", head], ""
    for values in report["rows"]:
        if values["section"] != section:
            section = values["section"]
            lines.append(f"-- {section}" + (f", depth {values['depth']}" if "depth" in values else ""))
        lines.append(_line(values))
    return "\n".join(lines)


def _line(values: dict[str, Any]) -> str:
    name = f"{values['name']:48s}"
    if "error" in values:
        return f"{name} {values['error'][:110]}"
    if "note" in values:
        return f"{name} {values['note']}".rstrip()
    if "tb_per_s" in values:
        return f"{name} {values['ms']:9.3f} {values['tb_per_s']:.2f} TB/s"
    triplets = (
        f"{values['triplets_per_s']:.3f}{'*' if values['derived'] else ' '}" if "triplets_per_s" in values else ""
    )
    gib = "" if values["gib"] is None else f"{values['gib']:.1f}"
    cells = f"{values['ms']:9.3f} {values['tflops']:8.1f} {values['mfu']:6.1%} {triplets:>15s} {gib:>6s}"
    return f"{name} {cells} {values['first_s']:7.1f}"


if __name__ == "__main__":
    main()
