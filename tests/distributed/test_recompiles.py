"""A function that is compiled again and again is reported with the reason; one that is not, is not."""

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from kontext_train.distributed.recompiles import Recompiles, explained


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.linear(x_ND).relu()


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=8):  # torch's default; our compiled runs raise it
        yield


def compiled_block(dynamic: bool) -> Block:
    block = Block()
    compiled = torch.compile(block.forward, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    block.forward = explained(compiled, "Block")  # type: ignore[method-assign]
    return block


def test_a_storm_is_reported_once_with_its_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    watched, block = Recompiles(graphs_per_function=2), compiled_block(dynamic=False)
    for count in (4, 5):
        block(torch.randn(count, 8)).sum().backward()
    assert watched.metrics()["compile/graphs"] == 2
    assert capsys.readouterr().err == ""
    for count in (6, 7, 8):
        block(torch.randn(count, 8)).sum().backward()
    metrics = watched.metrics()
    assert metrics["compile/graphs"] == 5
    assert metrics["compile/seconds"] > 0
    said = capsys.readouterr().err
    assert re.search(
        r"2 graphs of a function were expected, forward \(test_recompiles.py:\d+\) has 5, because .*"
        r"tensor 'x_ND' size mismatch at index 0. expected 7, actual 8",
        said,
    ), said
    block(torch.randn(9, 8))
    assert watched.metrics()["compile/graphs"] == 6
    assert capsys.readouterr().err == ""


def test_a_healthy_function_is_not_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """Lengths vary as much, but are dynamic; two blocks of a kind share a graph; two grad modes make two."""
    watched, blocks = Recompiles(graphs_per_function=2), [compiled_block(dynamic=True) for _ in range(2)]
    for count in range(4, 12):
        for block in blocks:
            block(torch.randn(count, 8)).sum().backward()
        with torch.no_grad():
            blocks[0](torch.randn(count, 8))
    assert watched.metrics()["compile/graphs"] == 2
    assert capsys.readouterr().err == ""


def test_torchs_limit_says_which_block_and_why() -> None:
    block = compiled_block(dynamic=False)
    for count in range(4, 12):
        block(torch.randn(count, 8))
    said = r"Block has 8 graphs, torch's limit, because tensor 'x_ND' size mismatch .* parallel\.compile=false"
    with pytest.raises(RuntimeError, match=said):
        block(torch.randn(12, 8))


def test_other_errors_pass_unchanged() -> None:
    block = compiled_block(dynamic=False)
    with pytest.raises(RuntimeError, match="a and b must have same reduction dim") as raised:
        block(torch.randn(4, 7))
    assert "graphs" not in str(raised.value)
