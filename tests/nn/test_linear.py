from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lalia.nn import linear as module
from lalia.nn.linear import Linear, product_for


@pytest.fixture(params=[False, True], ids=["default", "onednn"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both paths, whatever processor runs the test."""
    if request.param and module._operator() is None:
        pytest.skip("this build of PyTorch has no oneDNN linear operator")
    monkeypatch.setattr(module, "_slow_mkl", lambda: request.param)
    return request.param


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 7, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_nn_linear(onednn: bool, shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer, value = Linear(5, 4, bias=bias), torch.randn(shape, requires_grad=True)
    assert (product_for(value, layer.weight) is not None) == onednn
    direction = torch.randn(*shape[:-1], 4)
    inputs = [value, *layer.parameters()]
    expected = torch.autograd.grad(F.linear(value, layer.weight, layer.bias), inputs, direction)
    found = torch.autograd.grad(layer(value), inputs, direction)
    torch.testing.assert_close(layer(value), F.linear(value, layer.weight, layer.bias))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_transposed_input_and_frozen_weight(onednn: bool) -> None:
    torch.manual_seed(0)
    layer, value = Linear(6, 3).requires_grad_(False), torch.randn(2, 6, 9, requires_grad=True)
    out = layer(value.transpose(1, 2))
    (found,) = torch.autograd.grad(out.square().sum(), value)
    (expected,) = torch.autograd.grad(F.linear(value.transpose(1, 2), layer.weight, layer.bias).square().sum(), value)
    torch.testing.assert_close(found, expected)


def test_fused_gelu_is_gelu(onednn: bool) -> None:
    torch.manual_seed(0)
    layer, value = Linear(8, 16), 3 * torch.randn(4, 8)
    expected = F.gelu(F.linear(value, layer.weight, layer.bias))
    with torch.inference_mode():
        torch.testing.assert_close(layer.gelu(value), expected, atol=2e-6, rtol=2e-5)
    assert layer.gelu(value).requires_grad


def test_packed_weights_give_the_same_and_are_not_saved(onednn: bool) -> None:
    torch.manual_seed(0)
    layer, value = Linear(8, 16), torch.randn(2, 300, 8)
    keys = set(layer.state_dict())
    with torch.inference_mode():
        plain, curved = layer(value), layer.gelu(value)
        layer.pack()
        torch.testing.assert_close(layer(value), plain)
        torch.testing.assert_close(layer.gelu(value), curved)
    assert set(layer.state_dict()) == keys


def test_other_precisions_go_the_ordinary_way(onednn: bool) -> None:
    layer, value = Linear(4, 4), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(value).dtype == torch.bfloat16
    assert layer.double()(value.double()).dtype == torch.float64
    assert Linear(4, 4)(torch.randn(0, 4)).shape == (0, 4)
