"""The selective scan of Mamba-1 (Gu & Dao 2023, 2312.00752, section 3): a recurrence whose parameters depend on the input.

For each channel d and state n: ``h[t] = exp(delta[t] · a) · h[t-1] + delta[t] · b[t] · inputs[t]``, ``y[t] = Σ_n c[t] · h[t]``;
``outputs = (y + skip · inputs) · silu(gate)``. The ways to compute it (:class:`ScanBackend`) agree to rounding, and all but
``mamba_ssm`` are differentiable through the state that comes in and the one that goes out, so that a sequence cut into pieces
has the values and gradients of the whole.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SEGMENT = 256  # torch backend: positions in one two-level step, which bounds its memory when no gradient is kept
PARITY = 2e-3  # mamba_ssm against the reference, relative to the largest value: its exponentials are fast, not exact


class ScanBackend(Enum):
    """Who computes the scan. One that is named and is not there is an error; ``auto`` is never mamba_ssm."""

    auto = "auto"  # numba for float32 on the CPU where it is installed, torch elsewhere
    reference = "reference"  # position by position: the definition
    torch = "torch"  # two levels of chunks, on any device
    numba = "numba"  # fused kernels forward and backward, CPU, float32
    mamba_ssm = "mamba_ssm"  # the CUDA kernel of the mamba-ssm package


def selective_scan(
    inputs: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None = None,
    gate: Tensor | None = None,
    delta_bias: Tensor | None = None,
    softplus: bool = False,
    state: Tensor | None = None,
    backend: ScanBackend = ScanBackend.auto,
) -> tuple[Tensor, Tensor]:
    """inputs, delta, gate [B, D, L]; a [D, N]; b, c [B, N, L]; skip, delta_bias [D]; state [B, D, N] → [B, D, L], [B, D, N].

    ``delta`` is ``softplus(delta + delta_bias)`` with ``softplus``, else their sum. ``state`` (zeros if None) is the one before
    the first position; the second result is the one after the last, in float32. Half precision is computed in float32,
    float64 in float64; the outputs have the type of ``inputs``. Memory with D innermost (a transposed [B, L, D]) is fastest.

    With ``mamba_ssm`` the last state is correct but has no gradient: going back through it raises RuntimeError, and a ``state``
    that requires a gradient is refused at once; detach it, or choose another backend.

    ValueError: shapes that do not fit, no position; a backend that cannot serve the device or precision. ImportError: a named
    backend that is not installed. RuntimeError: a mamba_ssm whose results are wrong on this device (tested at its first use).
    """
    problem = Problem(inputs, delta, a, b, c, skip, gate, delta_bias, state, softplus)
    _check(problem)
    dtype = torch.float64 if inputs.dtype is torch.float64 else torch.float32
    run = _implementation(backend, inputs.device, dtype)
    with torch.autocast(inputs.device.type, enabled=False):
        outputs, last = run(problem.cast(dtype))
    return outputs.to(inputs.dtype), last


class Problem(NamedTuple):
    """The arguments of :func:`selective_scan`, in its order and shapes."""

    inputs: Tensor
    delta: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    skip: Tensor | None = None
    gate: Tensor | None = None
    delta_bias: Tensor | None = None
    state: Tensor | None = None
    softplus: bool = False

    def cast(self, dtype: torch.dtype) -> Problem:
        """The same in another precision."""
        values: list[Any] = [value.to(dtype) if isinstance(value, Tensor) else value for value in self]
        return Problem(*values)

    def steps(self) -> Tensor:
        """The step sizes, [B, D, L]."""
        shifted = self.delta if self.delta_bias is None else self.delta + self.delta_bias[:, None]
        return F.softplus(shifted) if self.softplus else shifted

    def first(self) -> Tensor:
        """The state before the first position, [B, D, N]."""
        return self.inputs.new_zeros(self.inputs.shape[0], *self.a.shape) if self.state is None else self.state

    def finish(self, mixed: Tensor) -> Tensor:
        """What was read from the states [B, D, L], with skip connection and gate."""
        outputs = mixed if self.skip is None else mixed + self.skip[:, None] * self.inputs
        return outputs if self.gate is None else outputs * F.silu(self.gate)


Backend = Callable[[Problem], tuple[Tensor, Tensor]]


def _check(problem: Problem) -> None:
    inputs, a = problem.inputs, problem.a
    if inputs.dim() != 3 or a.dim() != 2 or 0 in inputs.shape or a.shape[1] == 0:
        raise ValueError(f"inputs must be [B, D, L] and a [D, N], none of them 0; got {list(inputs.shape)} and {list(a.shape)}")
    batch, channels, length = inputs.shape
    states = a.shape[1]
    sequence, entry, channel = [batch, channels, length], [batch, states, length], [channels]
    shapes = [sequence, sequence, [channels, states], entry, entry, channel, sequence, channel, [batch, channels, states]]
    for name, value, shape in zip(Problem._fields, problem, [*shapes, None], strict=True):
        if isinstance(value, Tensor) and list(value.shape) != shape:
            raise ValueError(
                f"{name} must be {shape} for inputs {list(inputs.shape)} and a {list(a.shape)}, got {list(value.shape)}"
            )


def _implementation(backend: ScanBackend, device: torch.device, dtype: torch.dtype) -> Backend:
    if backend is ScanBackend.reference:
        return _reference
    serves = device.type == "cpu" and dtype is torch.float32
    if backend is ScanBackend.numba:
        if not serves:
            raise ValueError(f"the numba scan computes float32 on the CPU, not {dtype} on {device}: choose backend torch or auto")
        return _numba(required=True)
    if backend is ScanBackend.mamba_ssm:
        kernel = _mamba_kernel()
        if device.type != "cuda" or dtype is not torch.float32:
            raise ValueError(f"the mamba_ssm scan computes float32 on CUDA, not {dtype} on {device}: choose backend torch or auto")
        return lambda problem: _mamba_ssm(kernel, problem)
    return _numba(required=False) if backend is ScanBackend.auto and serves else _two_levels


def _numba(required: bool) -> Backend:
    try:
        apply = importlib.import_module("lalia.nn.scan_autograd").SelectiveScan.apply
    except ImportError as error:
        if required:
            raise ImportError("the numba scan needs numba: pip install numba, or choose backend torch or auto") from error
        return _two_levels
    return lambda problem: apply(*problem)


# --- the definition -----------------------------------------------------------------------------------------------------------
def _reference(problem: Problem) -> tuple[Tensor, Tensor]:
    state, mixed = problem.first(), []
    # unbind, not indexing: the backward pass of an index is a zero tensor of the whole length, which costs O(L²)
    rows = [values.unbind(-1) for values in (problem.steps(), problem.inputs, problem.b, problem.c)]
    for step, value, enters, leaves in zip(*rows, strict=True):
        state = torch.exp(step[..., None] * problem.a) * state + (step * value)[..., None] * enters[:, None]
        mixed.append((state * leaves[:, None]).sum(-1))
    return problem.finish(torch.stack(mixed, -1)), state


# --- any device, without a kernel ---------------------------------------------------------------------------------------------
def _two_levels(problem: Problem) -> tuple[Tensor, Tensor]:
    steps, state, mixed = problem.steps(), problem.first(), []
    values = (steps, steps * problem.inputs, problem.b, problem.c)
    for parts in zip(*(value.split(SEGMENT, dim=-1) for value in values), strict=True):
        outputs, state = _segment(problem.a, state, *parts)
        mixed.append(outputs)
    return problem.finish(torch.cat(mixed, -1)), state


def _segment(a: Tensor, state: Tensor, steps: Tensor, drive: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """About √L chunks side by side, each from a zero state; then one pass over the chunks adds what came in from before.

    a [D, N]; state [B, D, N]; steps, drive [B, D, L]; b, c [B, N, L] → [B, D, L], [B, D, N].
    """
    length = steps.shape[-1]
    size = math.isqrt(length - 1) + 1
    chunks = -(-length // size)
    missing = (0, size * chunks - length)  # a step of size 0 leaves the state as it is
    steps, drive, b, c = (F.pad(values, missing).unflatten(-1, (chunks, size)) for values in (steps, drive, b, c))
    local, product = state.new_zeros(()), state.new_ones(())
    locals_, products = [], []
    for step, value, enters in zip(steps.unbind(-1), drive.unbind(-1), b.unbind(-1), strict=True):
        factor = torch.exp(step[..., None] * a[:, None])  # [B, D, chunks, N]
        local = factor * local + value[..., None] * enters.transpose(1, 2)[:, None]
        product = factor * product
        locals_.append(local)
        products.append(product)
    carried = []
    for factor, value in zip(product.unbind(2), local.unbind(2), strict=True):
        carried.append(state)
        state = factor * state + value
    states = torch.stack(products, 3) * torch.stack(carried, 2)[:, :, :, None] + torch.stack(locals_, 3)
    return torch.einsum("bdksn,bnks->bdks", states, c).flatten(2)[..., :length], state


# --- somebody else's CUDA kernel ----------------------------------------------------------------------------------------------
STATE_ADVICE = (
    "the kernel of mamba_ssm gives no gradient through the state: detach the state between chunks, "
    "or choose backend torch (numba on the CPU), whose gradient is exact"
)


class _NoGradient(torch.autograd.Function):
    """The last state, tied to the graph, so that a gradient through it is an error rather than silently zero."""

    @staticmethod
    def forward(ctx: Any, last: Tensor, anchor: Tensor) -> Tensor:
        return last.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(STATE_ADVICE)


def _mamba_ssm(kernel: Callable[..., Any], problem: Problem) -> tuple[Tensor, Tensor]:
    if problem.state is not None and problem.state.requires_grad and torch.is_grad_enabled():
        raise ValueError(STATE_ADVICE)
    _test_kernel(kernel, problem.inputs.device)
    return _with_kernel(kernel, problem)


def _with_kernel(kernel: Callable[..., Any], problem: Problem) -> tuple[Tensor, Tensor]:
    """The kernel starts from zero; the recurrence is linear, so what a first state adds is put on top, one n after the other."""
    inputs, delta, a, b, c, skip, gate, delta_bias, state, softplus = problem
    inner_gate = gate if state is None else None
    outputs, last = kernel(inputs, delta, a, b, c, skip, inner_gate, delta_bias, softplus, return_last_state=True)
    if state is not None:
        passed = problem.steps().cumsum(-1)
        for index in range(a.shape[1]):
            outputs = outputs + torch.exp(passed * a[:, index, None]) * state[:, :, index, None] * c[:, None, index]
        outputs = outputs if gate is None else outputs * F.silu(gate)
        last = last + torch.exp(passed[:, :, -1, None] * a) * state
    return outputs, _NoGradient.apply(last.detach(), outputs)


def _mamba_kernel() -> Callable[..., Any]:
    try:
        return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except ImportError as error:
        message = "the mamba_ssm scan needs mamba-ssm: pip install mamba-ssm (Linux with CUDA), or choose backend torch or auto"
        raise ImportError(message) from error


@cache
def _test_kernel(kernel: Callable[..., Any], device: torch.device) -> None:
    """Compare kernel and reference, values and gradients, once per device: on some GPUs the kernel has been wrong."""
    random = torch.Generator().manual_seed(0)
    sequence, entry = (2, 8, 40), (2, 16, 40)
    shapes = (sequence, sequence, (8, 16), entry, entry, (8,), sequence, (8,), (2, 8, 16))
    values = [torch.randn(shape, generator=random).to(device) for shape in shapes]
    values[2] = -values[2].exp()
    results = []
    with torch.enable_grad():
        for run in (_reference, lambda problem: _with_kernel(kernel, problem)):
            leaves: list[Any] = [value.clone().requires_grad_() for value in values[:-1]]
            leaves += [values[-1], True]
            outputs, last = run(Problem(*leaves))
            results.append([outputs.detach(), last.detach(), *torch.autograd.grad(outputs.square().sum(), leaves[:-2])])
    for wanted, found in zip(*results, strict=True):
        error = float((wanted - found).abs().max() / wanted.abs().max())
        if not error <= PARITY:  # also when it is NaN
            raise RuntimeError(
                f"the kernel of mamba_ssm is off by {error:.1g} of the largest value on {device}; known for recent GPUs with older "
                "versions: update mamba-ssm, or choose backend torch"
            )
