"""What is known of a device's memory when it is out."""

import resource
from pathlib import Path

import torch


def is_out_of_memory(error: BaseException) -> bool:
    kinds, signs = (torch.OutOfMemoryError, MemoryError), ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED")
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs))


def record_history(entries: int) -> None:
    """Remember the last `entries` allocations and frees on the GPU, with their Python stacks, for a snapshot."""
    torch.cuda.memory._record_memory_history(max_entries=entries)


def out_of_memory(device: torch.device, snapshot: Path | None) -> str:
    """What is known of the memory, and what to do. snapshot: where to write one; None where no history is recorded."""
    if device.type == "cuda":
        free, size = torch.cuda.mem_get_info(device)
        sizes = {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "peak": torch.cuda.max_memory_allocated(device),
            "free": free,
            "on the device": size,
        }
    else:
        sizes = {"peak of this process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    told = ", ".join(f"{size / 2**30:.2f} GiB {name}" for name, size in sizes.items())
    return (
        f"Out of memory: {told}. {_written(snapshot) if snapshot is not None else ''}Use "
        "parallel.activation_checkpointing=full, a smaller data.tokens_per_pack, or more ranks to a copy of the model "
        "(parallel.dp_shard); on the host, fewer data.workers"
    )


def _written(snapshot: Path) -> str:
    try:
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(snapshot))
    except (OSError, RuntimeError, MemoryError) as error:  # the error that this is about must be told all the same
        return f"No snapshot could be written: {type(error).__name__}: {error}. "
    return f"Who holds what is in {snapshot} (drop it on pytorch.org/memory_viz). "
