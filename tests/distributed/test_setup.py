"""How ranks that torchrun starts again find each other and not what dead ones left in torchrun's store."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from kontext_train.distributed.setup import name_of_start

SOON = timedelta(seconds=20)


def names(store: dist.Store, ranks: int) -> list[str]:
    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(lambda rank: name_of_start(store, rank, ranks, SOON), range(ranks)))


def test_each_start_of_the_ranks_has_a_name_of_its_own_in_one_store() -> None:
    """Also when a start before it ended half-way: a rank had asked, and rank 0 was gone or had answered another."""
    store = dist.HashStore()
    first = names(store, 3)
    store.set("start/asks/1", "of one that died")
    second = names(store, 3)
    assert (len(set(first)), len(set(second)), len({*first, *second})) == (1, 1, 2)


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"ranks \[1\] did not come within 0.1 s"):
        name_of_start(dist.HashStore(), 0, 2, timedelta(seconds=0.1))
