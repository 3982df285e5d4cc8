"""A bar on stderr: every moment on a terminal, once a minute in a log."""

import sys

from tqdm import tqdm

EVERY_S = 60.0  # in a log


def bar(what: str, total: int | None, shown: bool) -> "tqdm[None]":
    """Of images."""
    every_s = 0.2 if sys.stderr.isatty() else EVERY_S
    return tqdm(desc=what, total=total, unit="image", disable=not shown, mininterval=every_s, dynamic_ncols=True)
