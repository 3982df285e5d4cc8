"""Bytes on one GPU through a step of FSDP2: formulas over what `simulation.trace_parts` found for each part.

The moments of a step and what lives at each follow torch/distributed/fsdp/_fully_shard (torch 2.13): a gathered group
exists twice while it is copied out of the collective's buffer; backward gathers the group that comes next while one
computes; the float32 input of a reduce-scatter lives until the next group is reduced.
"""

from collections.abc import Iterable, Iterator, Sequence
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
    exchanged: int  # bytes in all-to-alls between ranks that share a sequence, forward and backward


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that FSDP gathers together, and what computing with them costs."""

    name: str
    elements: int  # each parameter's first dimension rounded up to a multiple of the shards
    trained: int  # of them; the others are frozen and have no gradients
    cost: PartCost


@dataclass(frozen=True, slots=True)
class Network:
    ends: Group  # gathered all through forward and backward: embedders, last layer
    last_layer: int  # trained elements of it, whose gradients exist all through backward
    blocks: tuple[Group, ...]  # in the order they run

    @property
    def elements(self) -> int:
        return self.ends.elements + sum(block.elements for block in self.blocks)

    @property
    def trained(self) -> int:
        return self.ends.trained + sum(block.trained for block in self.blocks)


@dataclass(frozen=True, slots=True)
class Heads:
    """Of a discriminator on a frozen network's blocks, for one pack. Their weights are small, and not counted here."""

    features: int  # bytes of what the blocks say of the pack's targets
    learn: PartCost  # in their own turn, at made and real targets: features included, of which none has a gradient
    teach: PartCost  # in the student's turn, at made ones: features and their gradients included


@dataclass(frozen=True, slots=True)
class Sharding:
    shards: int  # ranks that share one copy
    replicas: int
    weight_bytes: int  # of an element that is computed with
    wire_bytes: float  # of an element while it is gathered
    reduce_bytes: int  # of a gradient element on the wire
    last_stays: bool  # the last block's and the ends' weights are not freed between forward and backward
    all_stay: bool  # nor are any others
    ahead_forward: int  # groups whose weights are gathered before they are needed
    ahead_backward: int


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
    base: float = 0.0  # bytes of the frozen network that a trained role adapts, all shards together


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
        parameters=sum((r.elements * r.weights + r.base) / r.shards for r in trained),
        gradients=sum(r.elements * r.gradients / r.shards for r in trained),
        optimizer=sum(r.elements * r.optimizer / r.shards for r in trained),
        ema=sum(r.elements * r.ema / r.shards for r in trained),
        frozen=sum(r.elements * r.weights / r.shards for r in frozen),
        batch=batch,
    )


def moments(base: Memory, network: Network, sharding: Sharding, accumulating: bool) -> Iterator[Moment]:
    """The moments of a step at which memory may peak. base: `held`; accumulating: more than one pack a step."""
    weight, reduce = sharding.weight_bytes, sharding.reduce_bytes
    wire = sharding.wire_bytes if sharding.shards > 1 else 0.0  # one rank alone gathers nothing
    ends, blocks = network.ends, network.blocks
    sizes = [block.elements for block in blocks]

    before = replace(base, gradients=base.gradients if accumulating else 0.0)
    kept, staying = float(ends.cost.kept), weight * ends.elements
    for i, block in enumerate(blocks):
        on_the_way = wire * sum(sizes[i : i + 1 + sharding.ahead_forward])
        gathered = staying + weight * block.elements + on_the_way
        working = replace(before, gathered=gathered, activations=kept + block.cost.forward_peak)
        yield Moment(f"forward of {block.name} {i}", working)
        kept += block.cost.kept
        if sharding.all_stay or (sharding.last_stays and i == len(blocks) - 1):
            staying += weight * block.elements
    loss = kept + max(ends.cost.forward_peak, ends.cost.backward_peak) - ends.cost.kept
    yield Moment("loss", replace(before, gathered=staying, activations=loss))

    reduced, on_its_way = 0, 0
    last_gradients = weight * network.last_layer
    for i in reversed(range(len(blocks))):
        block, cost = blocks[i], blocks[i].cost
        kept -= cost.kept
        gradients = base.gradients if accumulating else base.gradients * reduced / network.trained
        now = replace(base, gradients=gradients)
        ahead = sum(sizes[max(0, i - sharding.ahead_backward) : i])
        others = weight * ends.elements + (weight * sum(sizes[:i]) if sharding.all_stay else wire * ahead)
        yield Moment(
            f"backward of {block.name} {i}",
            replace(
                now,
                gathered=others + weight * block.elements,
                reducing=reduce * on_its_way + last_gradients,
                activations=kept + cost.backward_peak,
            ),
        )
        copied = (reduce + weight) * block.trained + last_gradients
        yield Moment(f"reducing {block.name} {i}", replace(now, gathered=others, reducing=copied, activations=kept))
        reduced, on_its_way = reduced + block.trained, block.trained

    yield Moment("reducing the ends", replace(base, reducing=(reduce + weight) * ends.trained))
    yield Moment("optimizer step", base)


def moments_of_heads(
    base: Memory, network: Network, sharding: Sharding, heads: Heads, accumulating: bool
) -> Iterator[Moment]:
    """Those of a stage whose student learns from heads on a frozen network of the same shape: the heads' turn, in which
    nobody else has gradients, then the student's pass through the heads and that network.
    """
    weight, last = sharding.weight_bytes, network.blocks[-1].elements
    staying = weight * (network.ends.elements + (last if sharding.last_stays else 0))
    peak = max(heads.learn.forward_peak, heads.learn.backward_peak)
    yield Moment("heads", replace(base, gradients=0.0, gathered=staying, activations=peak))
    yield from moments_through(base, network, sharding, heads, accumulating)


def moments_through(
    base: Memory, network: Network, sharding: Sharding, heads: Heads, accumulating: bool
) -> Iterator[Moment]:
    """The same as `moments` for a pass through a frozen network, while all that the student kept waits for the gradient
    that comes out of it. Nothing is reduced and nothing stays gathered. An upper bound: a frozen network keeps nothing
    for gradients of weights, and has all features, or gradients of them, only at its last block.
    """
    waiting = float(network.ends.cost.kept + sum(block.cost.kept for block in network.blocks))
    before = replace(base, gradients=base.gradients if accumulating else 0.0)
    frozen = replace(sharding, last_stays=False, all_stay=False)
    for moment in moments(before, network, frozen, accumulating=True):
        if moment.name.startswith(("forward", "backward")):
            activations = moment.memory.activations + waiting + heads.features
            yield Moment(f"teacher: {moment.name}", replace(moment.memory, reducing=0.0, activations=activations))
    peak = max(heads.teach.forward_peak, heads.teach.backward_peak)
    gathered = sharding.weight_bytes * network.ends.elements
    yield Moment("teacher: heads", replace(before, gathered=gathered, activations=2 * waiting + peak))


def largest(moments: Iterable[Moment]) -> Moment:
    return max(moments, key=lambda moment: moment.memory.total)
