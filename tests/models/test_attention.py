"""Every attention backend against a masked softmax in float64, forward and gradients.

The CPU backend runs as it is; the GPU backends run on stand-ins for their kernels, so that everything between the
model and the kernel is executed. tests/gpu/test_attention.py runs the kernels.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kontext_train.distributed.activation import checkpointed
from kontext_train.distributed.config import Checkpointing, ParallelConfig
from kontext_train.errors import ConfigError
from kontext_train.models.attention import attention_function, usable_backend
from kontext_train.models.config import AttentionBackend
from tests.models.attention_cases import PACKINGS, cu_seqlens, errors, random_qkv
from tests.models.attention_standins import installed

OPERATORS = {
    AttentionBackend.cpu: "kontext_train::cpu_attention",
    AttentionBackend.cudnn: "kontext_train::cudnn_attention",
    AttentionBackend.sdpa: "kontext_train::sdpa_attention",
    AttentionBackend.torch_varlen: "torch_attn::_varlen_attn",
}
BACKENDS = [b for b in AttentionBackend if b is not AttentionBackend.auto]
TOLERANCE = 1e-5
HOPPER, BLACKWELL, AMPERE, TURING = (9, 0), (10, 0), (8, 0), (7, 5)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with installed(monkeypatch):
        yield


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("flash_attn.cute.interface", "flash_attn.flash_attn_interface", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, module, None)  # import raises ImportError


def on_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_output_and_gradients(backend: AttentionBackend, packing: str) -> None:
    lengths = PACKINGS[packing]
    found = errors(attention_function(backend), lengths, random_qkv(sum(lengths), 3, 8, torch.float32))
    assert max(found.values()) <= TOLERANCE, found


def test_a_leak_between_segments_is_seen() -> None:
    """Negative control: the segments 8, 8, 8, 5, 5 with one bound lost."""
    lengths = PACKINGS["equal_runs"]
    function = attention_function(AttentionBackend.cpu)
    found = errors(function, lengths, random_qkv(34, 3, 8, torch.float32), bounds=cu_seqlens([8, 16, 5, 5]))
    assert min(found.values()) > 100 * TOLERANCE, found


def test_cpu_attention_of_bfloat16_rounds_once() -> None:
    found = errors(attention_function(AttentionBackend.cpu), [20, 13], random_qkv(33, 2, 16, torch.bfloat16))
    assert max(found.values()) <= 4e-3, found


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_serves_every_packing(backend: AttentionBackend) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(attention_function(backend), fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in PACKINGS.values():
        found = errors(compiled, lengths, random_qkv(sum(lengths), 3, 8, torch.float32))
        assert max(found.values()) <= TOLERANCE, found
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b is not AttentionBackend.torch_varlen])
def test_operators_are_what_torch_expects(backend: AttentionBackend) -> None:
    """Schema, fake implementation and autograd registration, by torch's own checker. torch_varlen is torch's."""
    name = OPERATORS.get(backend, f"kontext_train::{backend.value}").removeprefix("kontext_train::")
    operator = getattr(torch.ops.kontext_train, name).default
    qkv = [x.requires_grad_() for x in random_qkv(33, 3, 8, torch.float32)]
    torch.library.opcheck(operator, (*qkv, cu_seqlens([12, 12, 9]), 12))


class Calls(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("policy", "runs"), [("selective", 1), ("full", 2)])
def test_selective_checkpointing_keeps_attention(backend: AttentionBackend, policy: str, runs: int) -> None:
    """Under full checkpointing, as a control, attention runs again in the backward pass."""
    function = attention_function(backend)
    q, k, v = (x.requires_grad_() for x in random_qkv(33, 3, 8, torch.float32))
    bounds = cu_seqlens([12, 12, 9])

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(q * 2, k, v, bounds, 12).sin()

    config = ParallelConfig(activation_checkpointing=Checkpointing(policy))
    with Calls() as calls:
        checkpointed(forward, nn.Module(), config)(q, k, v).sum().backward()
    operator = OPERATORS.get(backend, f"kontext_train::{backend.value}")
    assert calls.count[operator] == runs


@pytest.mark.usefixtures("kernels")
def test_cudnn_reads_the_bounds_of_a_layout_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: reads.append(self) or tolist(self))
    function = attention_function(AttentionBackend.cudnn)
    qkv = [x.requires_grad_() for x in random_qkv(33, 3, 8, torch.float32)]
    bounds = cu_seqlens([12, 12, 9])
    for _ in range(3):
        function(*qkv, bounds, 12).sum().backward()
    function(*qkv, cu_seqlens([33]), 33)
    assert len(reads) == 2


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        (HOPPER, torch.bfloat16, "flash_attention_3"),
        (BLACKWELL, torch.bfloat16, "flash_attention_4"),
        (AMPERE, torch.bfloat16, "torch_varlen"),
        (HOPPER, torch.float32, "sdpa"),
        (TURING, torch.float16, "sdpa"),
    ],
)
def test_auto_with_everything_installed(
    capability: tuple[int, int], dtype: torch.dtype, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_card(monkeypatch, capability)
    assert usable_backend(AttentionBackend.auto, "cuda", dtype, 128).value == expected


@pytest.mark.usefixtures("nothing_installed")
def test_auto_with_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    on_card(monkeypatch, HOPPER)
    assert usable_backend(AttentionBackend.auto, "cuda", torch.bfloat16, 128) is AttentionBackend.torch_varlen
    assert usable_backend(AttentionBackend.auto, "cpu", torch.bfloat16, 12) is AttentionBackend.cpu
    with pytest.raises(ConfigError, match=r"finds no backend.*sdpa.*multiple of 8"):
        usable_backend(AttentionBackend.auto, "cuda", torch.bfloat16, 12)


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(
    ("backend", "device", "dtype", "head_dim", "capability", "message"),
    [
        ("flash_attention_4", "cuda", torch.bfloat16, 128, HOPPER, r"flash_attn\.cute.*pip install --pre flash-attn-4"),
        ("flash_attention_3", "cuda", torch.bfloat16, 128, HOPPER, r"flash_attn_interface.*hopper/"),
        ("flash_attention_2", "cuda", torch.bfloat16, 128, HOPPER, r"flash_attn\..*pip install flash-attn"),
        ("flash_attention_3", "cuda", torch.bfloat16, 128, BLACKWELL, r"capability 9 to 9, and a card has 10\.0"),
        ("torch_varlen", "cuda", torch.float32, 128, HOPPER, "bfloat16 or float16, not in torch.float32"),
        ("cudnn", "cuda", torch.bfloat16, 256, HOPPER, "at most 128, not 256"),
        ("sdpa", "cuda", torch.float32, 12, HOPPER, "multiple of 8 and at most 256, not 12"),
        ("torch_varlen", "cpu", torch.bfloat16, 128, HOPPER, "needs a CUDA device, and this process computes on cpu"),
        ("cpu", "cuda", torch.bfloat16, 128, HOPPER, "has no CUDA kernel"),
    ],
)
def test_what_cannot_run_here_is_refused(
    backend: str, device: str, dtype: torch.dtype, head_dim: int, capability: tuple[int, int], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    on_card(monkeypatch, capability)
    with pytest.raises(ConfigError, match=message):
        usable_backend(AttentionBackend(backend), device, dtype, head_dim)
