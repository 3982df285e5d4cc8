"""Correctness on a CUDA device: KONTEXT_TRAIN_TEST_GPU=1 python -m pytest tests/gpu (see tests/conftest.py)."""

import os

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    asked = os.environ.get("KONTEXT_TRAIN_TEST_GPU") == "1"
    reason = "torch finds no CUDA device" if asked else "needs a CUDA device and KONTEXT_TRAIN_TEST_GPU=1"
    for item in items:
        if "tests/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason=reason))
