"""Bytes on one GPU through a step of FSDP2: formulas over what `simulation.trace_parts` found for each part.

The moments of a step and what lives at each follow torch/distributed/fsdp/_fully_shard (torch 2.13): a gathered group
exists twice while it is copied out of the collective's buffer; backward gathers the group that comes next while one
computes; the float32 input of a reduce-scatter lives until the next group is reduced.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

GIB = 2**30


@dataclass(frozen=True, slots=True)
class PartCost:
    """What one part of the network costs for one pack on one rank. Bytes, and FLOPs of matrix products."""

    kept: int  # alive after its forward pass that was not before: saved for backward, and its output
    forward_peak: int  # most that was alive during forward, beyond what was before it
    backward_peak: int  # the same during backward, `kept` and gradients of the part's gathered weights included
    forward_flops: int
    backward_flops: int  # recomputation included
    attention_flops: int  # of both, the share in attention
    traffic: int  # bytes read and written, forward and backward, by all operations but matrix products and attention


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that FSDP gathers together, and what computing with them costs."""

    name: str
    elements: int  # each parameter's first dimension rounded up to a multiple of the shards
    cost: PartCost


@dataclass(frozen=True, slots=True)
class Network:
    ends: Group  # gathered all through forward and backward: embedders, last layer
    last_layer: int  # elements of it, whose gradients exist all through backward
    blocks: tuple[Group, ...]  # in the order they run

    @property
    def elements(self) -> int:
        return self.ends.elements + sum(block.elements for block in self.blocks)


@dataclass(frozen=True, slots=True)
class Sharding:
    shards: int  # ranks that share one copy
    replicas: int
    weight_bytes: int  # of a gathered element
    reduce_bytes: int  # of a gradient element on the wire
    reshard_after_forward: bool


@dataclass(frozen=True, slots=True)
class Role:
    """A network in the run, and what of it stays on a GPU between steps, in bytes for each element."""

    name: str
    elements: int
    weights: float
    gradients: float = 0.0  # a frozen role has none of these three
    optimizer: float = 0.0
    ema: float = 0.0
    shards: int = 1


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes alive on one GPU at one moment, by what they are."""

    parameters: float = 0.0
    gradients: float = 0.0  # sharded
    optimizer: float = 0.0
    ema: float = 0.0
    frozen: float = 0.0
    gathered: float = 0.0  # weights in use and on their way
    reducing: float = 0.0  # gradients on their way
    activations: float = 0.0  # with this block's own gradients in backward
    batch: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True, slots=True)
class Moment:
    name: str
    memory: Memory


def held(roles: Sequence[Role], batch: float) -> Memory:
    """What is there all the time, gradients included."""
    trained, frozen = [r for r in roles if r.gradients], [r for r in roles if not r.gradients]
    return Memory(
        parameters=sum(r.elements * r.weights / r.shards for r in trained),
        gradients=sum(r.elements * r.gradients / r.shards for r in trained),
        optimizer=sum(r.elements * r.optimizer / r.shards for r in trained),
        ema=sum(r.elements * r.ema / r.shards for r in trained),
        frozen=sum(r.elements * r.weights / r.shards for r in frozen),
        batch=batch,
    )


def moments(base: Memory, network: Network, sharding: Sharding, accumulating: bool) -> Iterator[Moment]:
    """The moments of a step at which memory may peak. base: `held`; accumulating: more than one pack a step."""
    weight, reduce = sharding.weight_bytes, sharding.reduce_bytes
    wire = weight if sharding.shards > 1 else 0  # an element in an all-gather's buffer; one rank alone has none
    all_gradients = base.gradients
    ends, blocks = network.ends, network.blocks

    now = replace(base, gradients=all_gradients if accumulating else 0.0)
    kept, gathered_before = float(ends.cost.kept), weight * ends.elements
    for i, block in enumerate(blocks):
        gathered = gathered_before + (weight + wire) * block.elements
        peak = replace(now, gathered=gathered, activations=kept + block.cost.forward_peak)
        yield Moment(f"forward of {block.name} {i}", peak)
        kept += block.cost.kept
        gathered_before += 0 if sharding.reshard_after_forward else weight * block.elements
    loss = kept + max(ends.cost.forward_peak, ends.cost.backward_peak) - ends.cost.kept
    yield Moment("loss", replace(now, gathered=gathered_before, activations=loss))

    reduced, on_its_way = 0, 0
    last_gradients = weight * network.last_layer
    for i in reversed(range(len(blocks))):
        block, cost = blocks[i], blocks[i].cost
        kept -= cost.kept
        now = replace(base, gradients=all_gradients if accumulating else all_gradients * reduced / network.elements)
        if sharding.reshard_after_forward:
            others = weight * ends.elements + (wire * blocks[i - 1].elements if i else 0)
        else:
            others = weight * (ends.elements + sum(b.elements for b in blocks[:i]))
        yield Moment(
            f"backward of {block.name} {i}",
            replace(
                now,
                gathered=others + weight * block.elements,
                reducing=reduce * on_its_way + last_gradients,
                activations=kept + cost.backward_peak,
            ),
        )
        copied = (reduce + weight) * block.elements + last_gradients
        yield Moment(f"reducing {block.name} {i}", replace(now, gathered=others, reducing=copied, activations=kept))
        reduced, on_its_way = reduced + block.elements, block.elements

    yield Moment("reducing the ends", replace(base, reducing=(reduce + weight) * ends.elements))
    yield Moment("optimizer step", base)


def peak(base: Memory, network: Network, sharding: Sharding, accumulating: bool) -> Moment:
    return max(moments(base, network, sharding, accumulating), key=lambda moment: moment.memory.total)
