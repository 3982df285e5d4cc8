"""Every backend that is installed on this machine, on its own kernels, against a masked softmax in float64."""

import pytest
import torch

from kontext_train.errors import ConfigError
from kontext_train.models.attention import AttentionFunction, attention_function, usable_backend
from kontext_train.models.config import AttentionBackend
from tests.models.attention_cases import cu_seqlens, errors, random_qkv

DEVICE = "cuda"
HEADS, HEAD_DIM = 4, 128
BACKENDS = [b for b in AttentionBackend if b not in (AttentionBackend.auto, AttentionBackend.cpu)]
PACKINGS = {
    "one_segment": [1000],
    "equal_runs": [256, 256, 256, 160, 160],
    "lengths_of_one": [1, 129, 1, 1, 300],
    "padding_tail": [190, 333, 777],
    "several_tiles": [640, 1536, 2304],
}
# bfloat16 operands: between 1e-3 and 1e-2 for a right kernel. float32 without tf32: far below 1e-4.
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float32: 1e-4}


def backend_or_skip(backend: AttentionBackend, dtype: torch.dtype = torch.bfloat16) -> AttentionFunction:
    try:
        return attention_function(usable_backend(backend, DEVICE, dtype, HEAD_DIM))
    except ConfigError as error:
        pytest.skip(str(error))


def qkv(lengths: list[int], dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    return random_qkv(sum(lengths), HEADS, HEAD_DIM, dtype, DEVICE)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients(backend: AttentionBackend, packing: str) -> None:
    function, lengths = backend_or_skip(backend), PACKINGS[packing]
    found = errors(function, lengths, qkv(lengths))
    assert max(found.values()) <= TOLERANCE[torch.bfloat16], found


def test_sdpa_in_float32() -> None:
    lengths = PACKINGS["padding_tail"]
    found = errors(backend_or_skip(AttentionBackend.sdpa, torch.float32), lengths, qkv(lengths, torch.float32))
    assert max(found.values()) <= TOLERANCE[torch.float32], found


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_leak_between_segments_is_seen(backend: AttentionBackend) -> None:
    """Negative control: one bound lost."""
    function, lengths = backend_or_skip(backend), PACKINGS["equal_runs"]
    found = errors(function, lengths, qkv(lengths), bounds=cu_seqlens([256, 512, 160, 160], DEVICE))
    assert min(found.values()) > 10 * TOLERANCE[torch.bfloat16], found


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b is not AttentionBackend.cudnn])
def test_nothing_waits_for_the_device(backend: AttentionBackend) -> None:
    function, lengths = backend_or_skip(backend), PACKINGS["several_tiles"]
    inputs = [x.requires_grad_() for x in qkv(lengths)]
    bounds, grad = cu_seqlens(lengths, DEVICE), torch.randn_like(inputs[0])
    function(*inputs, bounds, max(lengths)).backward(grad)  # the first call may compile and tune
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(*inputs, bounds, max(lengths)).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_code_is_one_graph(backend: AttentionBackend) -> None:
    function = backend_or_skip(backend)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for lengths in PACKINGS.values():
        found = errors(compiled, lengths, qkv(lengths))
        assert max(found.values()) <= TOLERANCE[torch.bfloat16], found
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
