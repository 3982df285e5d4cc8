"""Shared by all tests: one thread, so that numbers and times do not depend on what else the machine does."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
if os.environ.get("KONTEXT_TRAIN_TEST_GPU") != "1":  # set it for tests/gpu alone
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these are tests of the CPU paths, on GPU machines too

from pathlib import Path

import pytest
import torch

from kontext_train.data.index_build import build_index
from quickstart.make_dataset import write_shards

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 samples of the quickstart's scenes, indexed: 0, 1 and 2 contexts, two sizes."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, 200)
    build_index(folder)
    return folder
