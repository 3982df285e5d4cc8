"""What a step of Muon costs each rank: `torchrun --nproc-per-node N -m benchmarks.muon` for N = 1, 2, 4.

CPU seconds of the slowest rank for 24 matrices of 512 x 2048, sharded over all ranks: 1/N of one process' and the
exchange, since each matrix is made orthogonal on one rank. With one process also how much longer it takes to make the
quickstart's matrices orthogonal in bfloat16 than in float32.
"""

import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from kontext_train.distributed.config import ParallelConfig
from kontext_train.distributed.setup import process_group
from kontext_train.training import muon
from kontext_train.training.muon import Muon
from kontext_train.training.rounding import StochasticRounding

STEPS = 5
QUICKSTART = ((288, 96), (96, 96), (384, 96), (96, 384), (576, 96), (672, 96), (96, 480))


def main() -> None:
    torch.set_num_threads(1)
    with process_group(ParallelConfig()) as world:
        mesh = world.mesh["dp_shard"]
        parameters = [nn.Parameter(distribute_tensor(torch.randn(512, 2048), mesh, [Shard(0)])) for _ in range(24)]
        optimizer = Muon(parameters, 0.02, 0.95, 0.0, StochasticRounding(0, world.device))
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        started = time.process_time()
        for _ in range(STEPS):
            optimizer.step()
        seconds = torch.tensor([(time.process_time() - started) / STEPS])
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        if world.is_main:
            print(f"{world.size} ranks: {seconds.item():.3f} CPU seconds a step on the slowest")
        if world.size == 1:
            ratio = iteration_seconds(torch.bfloat16) / iteration_seconds(torch.float32)
            print(f"bfloat16 takes {ratio:.2f} times as long as float32 for the quickstart's matrices")


def iteration_seconds(dtype: torch.dtype) -> float:
    """Of all matrices of QUICKSTART, once each: the shortest of several times."""
    momenta = [torch.randn(shape) for shape in QUICKSTART]
    chosen, muon._iteration_dtype = muon._iteration_dtype, lambda device: dtype
    times = []
    for _ in range(20):
        started = time.perf_counter()
        for momentum in momenta:
            muon._orthogonalised(momentum, 1.0)
        times.append(time.perf_counter() - started)
    muon._iteration_dtype = chosen
    return min(times)


if __name__ == "__main__":
    main()
