"""Judging what a run made, and giving it away.

A trained model ready to generate (`trained.py`), written for others to read (`exported.py`). Its images of a benchmark
(`benchmark.py` -> `make_images.py` -> `results.py`), measured (`metrics/`, `scoring.py`, `bootstrap.py`), shown
(`report.py`), voted on (`arena.py`, `rating.py`); a little of that while it trains (`in_training.py`).
"""
