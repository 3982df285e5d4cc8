"""What the commands share: help with examples, options of one name, and errors as one line."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path


def command_parser(tool: str, description: str | None, epilog: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m data_tools.{tool}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def at_least(lowest: int) -> Callable[[str], int]:
    """An argparse type: an integer, `lowest` or more."""

    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"it is {value}; it must be {lowest} or more")
        return value

    number.__name__ = "integer"  # argparse puts it into its message for what is no number
    return number


def add_out(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help=f"{what}; it must not exist or be empty")


def add_processes(parser: argparse.ArgumentParser) -> None:
    count = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--processes",
        metavar="N",
        type=at_least(1),
        default=count,
        help=f"work in parallel (default: {count}, the cores)",
    )


def exit_status(run: Callable[[], int]) -> int:
    """What `run` returns, or 1 after printing its error, or 130 after Ctrl-C."""
    try:
        return run()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted. What is done is kept: the same command goes on from here", file=sys.stderr)
        return 130
