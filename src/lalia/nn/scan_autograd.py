"""The numba kernels of the selective scan as one differentiable function of tensors, shared by threads.

:mod:`lalia.nn.ssm` imports this module when a scan first needs it, since numba is slow to import.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lalia.nn.scan_numba import CHUNK, Gradients, Results, Scan, backward_items, forward_items

LANES, FEWER_LANES = 256, 64  # channels computed together; fewer where threads would have nothing to do


def _run(kernel: Callable[..., None], scan: Scan, target: Results | Gradients, parts: int) -> None:
    if parts == 1:
        kernel(scan, target, 0, 1)
        return
    # plain threads, not numba's: those break when two Python threads call at once, and after a fork
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(lambda part: kernel(scan, target, part, parts), range(parts)))


def _channels_last(values: Tensor) -> Tensor:
    """[B, D, L] → contiguous [B, L, D]: no copy when that is how it lies in memory already."""
    return values.transpose(1, 2).contiguous()


def _scan(tensors: list[Tensor], softplus: bool, gated: bool) -> tuple[Scan, int]:
    """What the kernels read, and how many threads are to share it."""
    inputs, delta, decay, b, c, skip, gate, bias, state = (tensor.numpy() for tensor in tensors)
    batch, _, channels = inputs.shape
    threads = torch.get_num_threads()
    lanes = LANES if batch * -(-channels // LANES) >= threads else FEWER_LANES
    parts = max(1, min(threads, batch * -(-channels // lanes)))
    return Scan(inputs, delta, decay, b, c, skip, gate, bias, state, softplus, gated, lanes), parts


class SelectiveScan(torch.autograd.Function):
    """The two kernels as one differentiable function. Arguments: the fields of :class:`lalia.nn.ssm.Problem`, float32 on the CPU.

    A gradient may come in through the outputs, through the last state, or both.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        delta: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        skip: Tensor | None,
        gate: Tensor | None,
        delta_bias: Tensor | None,
        state: Tensor | None,
        softplus: bool,
    ) -> tuple[Tensor, Tensor]:
        batch, channels, length = inputs.shape
        count = a.shape[1]
        nothing = inputs.new_zeros(channels)
        tensors = [
            _channels_last(inputs),
            _channels_last(delta),
            a.t().contiguous(),
            _channels_last(b),
            _channels_last(c),
            nothing if skip is None else skip.contiguous(),
            inputs.new_zeros(0, 0, 0) if gate is None else _channels_last(gate),
            nothing if delta_bias is None else delta_bias.contiguous(),
            inputs.new_zeros(batch, count, channels) if state is None else _channels_last(state),
        ]
        chunks = -(-length // CHUNK) if any(ctx.needs_input_grad) else 0
        outputs, last = torch.empty_like(tensors[0]), inputs.new_empty(batch, count, channels)
        marks = inputs.new_empty(batch, chunks, count, channels)
        results = Results(outputs.numpy(), last.numpy(), marks.numpy())
        scan, parts = _scan(tensors, softplus, gate is not None)
        _run(forward_items, scan, results, parts)
        ctx.save_for_backward(*tensors, marks)
        ctx.given = [value is not None for value in (skip, gate, delta_bias, state)]
        ctx.softplus = softplus
        return outputs.transpose(1, 2), last.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outputs: Tensor, last: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, marks = ctx.saved_tensors
        batch, length, channels = tensors[0].shape
        count = tensors[2].shape[0]
        has_skip, has_gate, has_bias, has_state = ctx.given
        scan, parts = _scan(tensors, ctx.softplus, has_gate)
        zeros = tensors[0].new_zeros
        flow = last.transpose(1, 2).clone(memory_format=torch.contiguous_format)
        inputs, delta, gate = (torch.empty_like(values) for values in (tensors[0], tensors[1], tensors[6]))
        decay, skip, bias = zeros(batch, count, channels), zeros(batch, channels), zeros(batch, channels)
        b, c = zeros(parts, batch, length, count), zeros(parts, batch, length, count)
        written = (_channels_last(outputs), flow, marks, inputs, delta, decay, b, c, skip, gate, bias)
        grads = Gradients(*(tensor.numpy() for tensor in written))
        _run(backward_items, scan, grads, parts)
        return (
            inputs.transpose(1, 2),
            delta.transpose(1, 2),
            decay.sum(0).t(),
            b.sum(0).transpose(1, 2),
            c.sum(0).transpose(1, 2),
            skip.sum(0) if has_skip else None,
            gate.transpose(1, 2) if has_gate else None,
            bias.sum(0) if has_bias else None,
            flow.transpose(1, 2) if has_state else None,
            None,
        )
