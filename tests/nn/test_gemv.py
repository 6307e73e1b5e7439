"""One row times a matrix: the same as torch's, and only where it fits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from lalia.nn import gemv
from lalia.nn.gemv import RowLinear, row_product


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (7, 5), (64, 33), (130, 384)])
def test_row_product_is_torchs(outputs: int, inputs: int) -> None:
    random = torch.Generator().manual_seed(outputs)
    row, weight = torch.randn(1, 1, inputs, generator=random), torch.randn(outputs, inputs, generator=random)
    found = row_product(row, weight)
    assert found.shape == (1, 1, outputs) and torch.allclose(found, F.linear(row, weight), atol=1e-4)
    assert torch.allclose(row_product(row, weight.T.contiguous().T), F.linear(row, weight), atol=1e-4)
    row[0, 0, 0] = float("nan")
    assert row_product(row, weight).isnan().all()


@pytest.mark.usefixtures("one_thread")
def test_the_loop_is_used_for_one_row_without_a_graph_and_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(gemv, "row_product", lambda row, weight: calls.append(1) or row_product(row, weight))
    layer = RowLinear(6, 3, bias=False)
    row = torch.randn(1, 1, 6)
    with torch.no_grad():
        assert torch.allclose(layer(row), F.linear(row, layer.weight), atol=1e-6)
        assert len(calls) == 1
        layer(torch.randn(2, 1, 6))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(row)
        RowLinear(6, 3, bias=False).bfloat16()(row.bfloat16())
        RowLinear(6, 3)(row)
        torch.set_num_threads(2)
        layer(row)
    torch.set_num_threads(1)
    layer(row).sum().backward()
    assert len(calls) == 1 and layer.weight.grad is not None
