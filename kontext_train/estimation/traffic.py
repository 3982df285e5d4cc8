"""Bytes that one GPU receives in collectives: formulas. What it sends is the same."""

from collections.abc import Iterator
from dataclasses import dataclass

from kontext_train.estimation.memory import Network, Sharding


@dataclass(frozen=True, slots=True)
class Collective:
    """All of one kind in a step."""

    kind: str
    ranks: int
    stride: int  # distance of neighbouring ranks in the world
    whole: float  # bytes of the gathered, reduced, scattered or exchanged tensors, summed
    hidden: bool  # whether computation can go on meanwhile

    def received(self) -> float:
        """By the ring algorithms that NCCL uses for large tensors; an all-reduce goes round twice."""
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.whole * (self.ranks - 1) / self.ranks

    def by_link(self, gpus_per_node: int) -> tuple[float, float]:
        """(within the node, between nodes). A ring enters each node once, and the group's GPUs there share its load."""
        here = min(self.ranks, max(1, gpus_per_node // self.stride))
        if here == self.ranks:
            return self.received(), 0.0
        between = self.received() / here
        return self.received() - between, between


def collectives(
    network: Network, sharding: Sharding, cp: int, packs: int, more_gathers: int = 0
) -> Iterator[Collective]:
    """Of a step with so many packs on each rank, the optimizer's not included. Parts without bytes are left out.

    more_gathers: of whole networks of this shape, for each pack, by passes beside the student's.
    """
    shards, replicas = sharding.shards, sharding.replicas
    elements = network.elements
    if shards > 1:
        if sharding.all_stay:
            again = 0
        else:
            stays = network.ends.elements + network.blocks[-1].elements if sharding.last_stays else 0
            again = elements - stays
        gathered = elements + again + more_gathers * elements
        yield Collective("all-gather", shards, 1, packs * sharding.wire_bytes * gathered, hidden=True)
        yield Collective("reduce-scatter", shards, 1, packs * sharding.reduce_bytes * network.trained, hidden=True)
    if replicas > 1:
        reduced = packs * sharding.reduce_bytes * network.trained / shards
        yield Collective("all-reduce", replicas, shards, reduced, hidden=True)
    if cp > 1:
        exchanged = packs * sum(block.cost.exchanged for block in network.blocks)
        yield Collective("all-to-all", cp, 1, exchanged, hidden=False)
