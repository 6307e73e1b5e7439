"""``nn.Linear`` that uses oneDNN's float32 matrix product on CPUs where the default one is slow.

PyTorch's CPU builds multiply float32 matrices with Intel's MKL, which on AMD processors runs at about half the speed that
oneDNN, shipped in the same build, reaches (measured on Zen 5, one thread: 89 against 187 GFLOP/s, and 2.0 times faster forward
and backward). Elsewhere, and under autocast, this is plain ``nn.Linear``. The parameters are the same and so are the values, to
the rounding of a float32 sum in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CPU_DESCRIPTION = Path("/proc/cpuinfo")
TYPICAL_ROWS = 256  # the layout of packed weights is chosen for about this many rows, and valid for all
Product = Callable[..., Tensor]


class Linear(nn.Linear):
    """Same parameters, shapes and results as ``nn.Linear``: [..., inputs] → [..., outputs]."""

    def __init__(self, *sizes: Any, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self._packed: list[Tensor] = []  # in a list, so that it is neither saved nor moved

    def forward(self, input: Tensor) -> Tensor:
        product = None if torch.is_grad_enabled() else product_for(input, self.weight)
        if product is None:
            return linear(input, self.weight, self.bias)
        return product(input, *self._packed or [self.weight], self.bias, "none", [], "")

    def pack(self) -> None:
        """Lay the weight out for oneDNN once, for inference; it must not change afterwards. Does nothing without oneDNN."""
        if self.weight.device.type == "cpu" and self.weight.dtype == torch.float32 and _operator() is not None:
            self._packed = [torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), TYPICAL_ROWS)]

    def gelu(self, value: Tensor) -> Tensor:
        """GELU (the exact one) of this layer's output; one pass over memory where no gradient is asked for."""
        product = None if torch.is_grad_enabled() else product_for(value, self.weight)
        if product is None:
            return F.gelu(self(value))
        return product(value, *self._packed or [self.weight], self.bias, "gelu", [], "none")


def linear(value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """value [..., I], weight [O, I], bias [O] or None → [..., O]."""
    if product_for(value, weight) is None:
        return F.linear(value, weight, bias)
    return _OneDnnLinear.apply(value, weight, bias)


def product_for(value: Tensor, weight: Tensor) -> Product | None:
    """oneDNN's linear operator when it is there, faster on this machine, and fits this call; else None."""
    fits = value.device.type == weight.device.type == "cpu" and value.dtype == weight.dtype == torch.float32
    if not fits or not value.numel() or torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.enabled:
        return None
    return _operator() if _slow_mkl() else None


@lru_cache(maxsize=1)
def _operator() -> Product | None:
    operators: Any = torch.ops.mkldnn
    return operators._linear_pointwise if hasattr(operators, "_linear_pointwise") else None


@lru_cache(maxsize=1)
def _slow_mkl() -> bool:
    """Decided by the make of the processor, never by a stopwatch: two runs on one machine must compute alike."""
    if not torch.backends.mkl.is_available() or not CPU_DESCRIPTION.is_file():
        return False
    return "AuthenticAMD" in CPU_DESCRIPTION.read_text(encoding="utf-8", errors="replace")


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows [..., I] · weight [O, I]ᵀ + bias."""
    operator = _operator()
    assert operator is not None
    return operator(rows, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    """The operator has no derivative of its own; both gradients are products of the same kind."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(value, weight)
        return _product(value, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        value, weight = ctx.saved_tensors
        for_value, for_weight, for_bias = ctx.needs_input_grad
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (
            _product(gradient, weight.t()) if for_value else None,
            _product(rows.t(), value.reshape(-1, value.shape[-1]).t()) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )
