"""The selective scan of Mamba as two fused numba kernels, forward and backward. CPU, float32.

The channels are the innermost dimension of every array, so that the loops over them vectorise. Nothing of size [B, D, L, N] is
stored: the forward pass leaves the state at the start of every :data:`CHUNK` positions, and the backward pass computes the states
between two of them again, in cache. Exponentials are a polynomial (Cephes ``expf``), because a call into the mathematics library
would end the vectorisation. Compiling takes about ten seconds, once per machine.

:mod:`lalia.nn.ssm` is the public side, :mod:`lalia.nn.scan_autograd` between the two. Everything that a kernel calls stands in this
one file, since a change of another would not renew numba's cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

CHUNK = 8  # positions between two stored states

F = np.float32
LOG2_E, ROUND = F(1.4426950408889634), F(12582912.0)  # 1.5 · 2^23: adding and subtracting it rounds to an integer
LN2_HIGH, LN2_LOW = F(0.693359375), F(-2.12194440e-4)
LOWEST, HIGHEST = F(-87.0), F(88.0)
E7, E6, E5, E4, E3, E2 = F(1.9875691500e-4), F(1.3981999507e-3), F(8.3334519073e-3), F(4.1665795894e-2), F(1.6666665459e-1), F(0.5)
A3, A5, A7, A9, A11, A13, A15 = F(1 / 3), F(1 / 5), F(1 / 7), F(1 / 9), F(1 / 11), F(1 / 13), F(1 / 15)
ZERO, ONE, TWO, BITS = F(0), F(1), F(2), np.int32(23)


def _compiled(*flags: str) -> Callable[[Any], Any]:
    """numba's compiler, cached on disk where a cache can be written. NaN and infinity keep their meaning whatever the ``flags``.

    numpy's error model, because a check for division by zero would end the vectorisation.
    """

    def compiled(function: Any) -> Any:
        try:
            return numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=set(flags))(function)
        except RuntimeError:  # no writable place for numba's cache
            return numba.njit(nogil=True, error_model="numpy", fastmath=set(flags))(function)

    return compiled


class Scan(NamedTuple):
    """What both kernels read: C-contiguous float32 arrays and two switches."""

    inputs: np.ndarray  # [B, L, D]
    delta: np.ndarray  # [B, L, D]
    decay: np.ndarray  # [N, D], the matrix A
    b: np.ndarray  # [B, L, N]
    c: np.ndarray  # [B, L, N]
    skip: np.ndarray  # [D]
    gate: np.ndarray  # [B, L, D], or anything when not gated
    bias: np.ndarray  # [D]
    state: np.ndarray  # [B, N, D]
    softplus: bool
    gated: bool
    lanes: int  # channels computed together


class Results(NamedTuple):
    """What the forward kernel writes."""

    outputs: np.ndarray  # [B, L, D]
    last: np.ndarray  # [B, N, D]
    marks: np.ndarray  # [B, ceil(L / CHUNK), N, D]: the state before each chunk; no chunk at all when no gradient will be asked


class Gradients(NamedTuple):
    """What the backward kernel reads (``outputs``, ``last``, ``marks``) and writes; sums over B are left to the caller."""

    outputs: np.ndarray  # [B, L, D]
    last: np.ndarray  # [B, N, D]; becomes the gradient of the first state
    marks: np.ndarray  # [B, chunks, N, D]
    inputs: np.ndarray  # [B, L, D]
    delta: np.ndarray  # [B, L, D]
    decay: np.ndarray  # [B, N, D], zeros
    b: np.ndarray  # [parts, B, L, N], zeros: threads add up different channels of one position
    c: np.ndarray  # [parts, B, L, N], zeros
    skip: np.ndarray  # [B, D], zeros
    gate: np.ndarray  # [B, L, D]
    bias: np.ndarray  # [B, D], zeros


# --- elementary functions; "reassoc" would undo the rounding trick, so they must be compiled without it ----------------------
@_compiled("contract", "nsz")
def _exp(value: Any) -> Any:
    """Relative error 1e-7; 0 below -87; NaN stays NaN."""
    low = value < LOWEST
    held = LOWEST if low else value
    held = HIGHEST if held > HIGHEST else held
    shifted = held * LOG2_E + ROUND
    power = shifted - ROUND
    rest = held - power * LN2_HIGH
    rest = rest - power * LN2_LOW
    series = ((((E7 * rest + E6) * rest + E5) * rest + E4) * rest + E3) * rest + E2
    series = series * (rest * rest) + rest + ONE
    exponent = np.int32(F(shifted).view(np.int32) << BITS)  # times 2^power, in the bits of the exponent
    scaled = np.int32(exponent + F(series).view(np.int32)).view(np.float32)
    return ZERO if low else scaled


@_compiled("contract", "nsz")
def _softplus(value: Any) -> Any:
    """log(1 + e^value), with full relative accuracy for small results: log1p(e) = 2 artanh(e / (2 + e))."""
    small = _exp(-abs(value))
    ratio = small / (TWO + small)
    square = ratio * ratio
    series = ((((((A15 * square + A13) * square + A11) * square + A9) * square + A7) * square + A5) * square + A3) * square
    return (ZERO if value < ZERO else value) + TWO * ratio * (ONE + series)


@_compiled("contract", "nsz")
def _sigmoid(value: Any) -> Any:
    return ONE / (ONE + _exp(-value))


# --- one position of one block of channels ------------------------------------------------------------------------------------
@_compiled("contract", "nsz")
def _discretise(scan: Scan, batch: int, time: int, first: int, width: int, delta: Any, drive: Any) -> None:
    """Fill ``delta`` with the step sizes, ``drive`` with step size times input."""
    raw, bias = scan.delta[batch, time, first : first + width], scan.bias[first : first + width]
    inputs = scan.inputs[batch, time, first : first + width]
    if scan.softplus:
        for lane in range(width):
            delta[lane] = _softplus(raw[lane] + bias[lane])
    else:
        for lane in range(width):
            delta[lane] = raw[lane] + bias[lane]
    for lane in range(width):
        drive[lane] = delta[lane] * inputs[lane]


@_compiled("contract", "nsz", "reassoc")
def _advance(state: Any, decay: Any, delta: Any, drive: Any, b: Any, c: Any, mixed: Any, width: int) -> None:
    """state ← exp(delta · decay) · state + drive · b, mixed ← c · state; state and decay [N, lanes], the rest of one position."""
    mixed[:width] = ZERO
    for index in range(b.shape[0]):
        enters, leaves = b[index], c[index]
        row, rates = state[index], decay[index]
        for lane in range(width):
            value = _exp(delta[lane] * rates[lane]) * row[lane] + drive[lane] * enters
            row[lane] = value
            mixed[lane] += leaves * value


@_compiled("contract", "nsz", "reassoc")
def _advance_kept(
    state: Any, after: Any, factors: Any, decay: Any, delta: Any, drive: Any, b: Any, c: Any, mixed: Any, width: int
) -> None:
    """As :func:`_advance`, but the new state goes to ``after`` and the factors exp(delta · decay) are kept: all [N, lanes]."""
    mixed[:width] = ZERO
    for index in range(b.shape[0]):
        enters, leaves = b[index], c[index]
        old, new, kept, rates = state[index], after[index], factors[index], decay[index]
        for lane in range(width):
            factor = _exp(delta[lane] * rates[lane])
            value = factor * old[lane] + drive[lane] * enters
            kept[lane] = factor
            new[lane] = value
            mixed[lane] += leaves * value


@_compiled("contract", "nsz")
def _finish(scan: Scan, batch: int, time: int, first: int, width: int, mixed: Any, outputs: Any) -> None:
    """outputs = (mixed + skip · inputs) · silu(gate)."""
    inputs, skip = scan.inputs[batch, time, first : first + width], scan.skip[first : first + width]
    row = outputs[batch, time, first : first + width]
    if scan.gated:
        gate = scan.gate[batch, time, first : first + width]
        for lane in range(width):
            row[lane] = (mixed[lane] + skip[lane] * inputs[lane]) * (gate[lane] * _sigmoid(gate[lane]))
    else:
        for lane in range(width):
            row[lane] = mixed[lane] + skip[lane] * inputs[lane]


@_compiled("contract", "nsz")
def _unfinish(scan: Scan, grads: Gradients, batch: int, time: int, first: int, width: int, mixed: Any, incoming: Any) -> None:
    """Back through :func:`_finish`: fills ``incoming`` with the gradient of ``mixed``, and those of gate and skip."""
    inputs, skip = scan.inputs[batch, time, first : first + width], scan.skip[first : first + width]
    outer, summed = grads.outputs[batch, time, first : first + width], grads.skip[batch, first : first + width]
    if scan.gated:
        gate, gate_row = scan.gate[batch, time, first : first + width], grads.gate[batch, time, first : first + width]
        for lane in range(width):
            share = _sigmoid(gate[lane])
            total = mixed[lane] + skip[lane] * inputs[lane]
            gate_row[lane] = outer[lane] * total * share * (ONE + gate[lane] * (ONE - share))
            incoming[lane] = outer[lane] * gate[lane] * share
    else:
        for lane in range(width):
            incoming[lane] = outer[lane]
    for lane in range(width):
        summed[lane] += incoming[lane] * inputs[lane]


@_compiled("contract", "nsz", "reassoc")
def _retreat(
    flow: Any,
    decay: Any,
    decay_sum: Any,
    before: Any,
    after: Any,
    factors: Any,
    b: Any,
    c: Any,
    b_sum: Any,
    c_sum: Any,
    delta: Any,
    drive: Any,
    incoming: Any,
    drive_flow: Any,
    delta_flow: Any,
    width: int,
) -> None:
    """Back through one position. ``flow`` [N, lanes]: gradient of the state after it, becomes that of the state before it.

    ``incoming`` is the gradient of mixed; ``drive_flow`` and ``delta_flow`` receive those of drive and of delta.
    """
    drive_flow[:width] = ZERO
    delta_flow[:width] = ZERO
    for index in range(b.shape[0]):
        enters, leaves = b[index], c[index]
        row, rates, rate_sums = flow[index], decay[index], decay_sum[index]
        old, new, factor = before[index], after[index], factors[index]
        to_b, to_c = ZERO, ZERO
        for lane in range(width):
            gradient = row[lane] + leaves * incoming[lane]
            to_c += incoming[lane] * new[lane]
            to_b += gradient * drive[lane]
            drive_flow[lane] += gradient * enters
            passed = gradient * factor[lane]
            exponent = passed * old[lane]  # gradient of delta · decay
            delta_flow[lane] += exponent * rates[lane]
            rate_sums[lane] += exponent * delta[lane]
            row[lane] = passed
        b_sum[index] += to_b
        c_sum[index] += to_c


@_compiled("contract", "nsz")
def _undiscretise(scan: Scan, grads: Gradients, batch: int, time: int, first: int, width: int, step: Any) -> None:
    """Back through :func:`_discretise` and the skip connection: the gradients of inputs, delta and bias of one position."""
    raw, bias = scan.delta[batch, time, first : first + width], scan.bias[first : first + width]
    inputs, skip = scan.inputs[batch, time, first : first + width], scan.skip[first : first + width]
    to_inputs, to_delta = grads.inputs[batch, time, first : first + width], grads.delta[batch, time, first : first + width]
    to_bias = grads.bias[batch, first : first + width]
    delta, incoming, drive_flow, delta_flow = step[0], step[2], step[3], step[4]
    for lane in range(width):
        to_inputs[lane] = drive_flow[lane] * delta[lane] + incoming[lane] * skip[lane]
        to_delta[lane] = drive_flow[lane] * inputs[lane] + delta_flow[lane]
    if scan.softplus:
        for lane in range(width):
            to_delta[lane] *= _sigmoid(raw[lane] + bias[lane])
    for lane in range(width):
        to_bias[lane] += to_delta[lane]


# --- the kernels --------------------------------------------------------------------------------------------------------------
@_compiled()
def forward_items(scan: Scan, results: Results, part: int, parts: int) -> None:
    """Items ``part``, ``part + parts``, … of the B x ceil(D / lanes) blocks."""
    _, length, channels = scan.inputs.shape
    states = scan.decay.shape[0]
    lanes, blocks = scan.lanes, (channels + scan.lanes - 1) // scan.lanes
    state, decay = np.empty((states, lanes), np.float32), np.empty((states, lanes), np.float32)
    delta, drive, mixed = np.empty(lanes, np.float32), np.empty(lanes, np.float32), np.empty(lanes, np.float32)
    for item in range(part, scan.inputs.shape[0] * blocks, parts):
        batch, first = item // blocks, (item % blocks) * lanes
        width = min(lanes, channels - first)
        state[:, :width] = scan.state[batch, :, first : first + width]
        decay[:, :width] = scan.decay[:, first : first + width]
        for time in range(length):
            if time % CHUNK == 0 and results.marks.shape[1] > 0:
                results.marks[batch, time // CHUNK, :, first : first + width] = state[:, :width]
            _discretise(scan, batch, time, first, width, delta, drive)
            _advance(state, decay, delta, drive, scan.b[batch, time], scan.c[batch, time], mixed, width)
            _finish(scan, batch, time, first, width, mixed, results.outputs)
        results.last[batch, :, first : first + width] = state[:, :width]


@_compiled()
def backward_items(scan: Scan, grads: Gradients, part: int, parts: int) -> None:
    """Items ``part``, ``part + parts``, … of the B x ceil(D / lanes) blocks, chunk by chunk from the last."""
    _, length, channels = scan.inputs.shape
    states = scan.decay.shape[0]
    lanes, blocks, chunks = scan.lanes, (channels + scan.lanes - 1) // scan.lanes, (length + CHUNK - 1) // CHUNK
    flow, decay = np.empty((states, lanes), np.float32), np.empty((states, lanes), np.float32)
    decay_sum = np.empty((states, lanes), np.float32)
    kept, factors = np.empty((CHUNK + 1, states, lanes), np.float32), np.empty((CHUNK, states, lanes), np.float32)
    mixed, steps = np.empty(lanes, np.float32), np.empty((CHUNK, 5, lanes), np.float32)
    for item in range(part, scan.inputs.shape[0] * blocks, parts):
        batch, first = item // blocks, (item % blocks) * lanes
        width = min(lanes, channels - first)
        flow[:, :width] = grads.last[batch, :, first : first + width]
        decay[:, :width] = scan.decay[:, first : first + width]
        decay_sum[:] = ZERO
        for chunk in range(chunks - 1, -1, -1):
            start, count = chunk * CHUNK, min(CHUNK, length - chunk * CHUNK)
            kept[0, :, :width] = grads.marks[batch, chunk, :, first : first + width]
            for index in range(count):
                time, step = start + index, steps[index]
                _discretise(scan, batch, time, first, width, step[0], step[1])
                b, c = scan.b[batch, time], scan.c[batch, time]
                _advance_kept(kept[index], kept[index + 1], factors[index], decay, step[0], step[1], b, c, mixed, width)
                _unfinish(scan, grads, batch, time, first, width, mixed, step[2])
            for index in range(count - 1, -1, -1):
                time, step = start + index, steps[index]
                b, c, b_sum, c_sum = (
                    scan.b[batch, time],
                    scan.c[batch, time],
                    grads.b[part, batch, time],
                    grads.c[part, batch, time],
                )
                before, after = kept[index], kept[index + 1]
                _retreat(
                    flow,
                    decay,
                    decay_sum,
                    before,
                    after,
                    factors[index],
                    b,
                    c,
                    b_sum,
                    c_sum,
                    step[0],
                    step[1],
                    step[2],
                    step[3],
                    step[4],
                    width,
                )
                _undiscretise(scan, grads, batch, time, first, width, step)
        grads.decay[batch, :, first : first + width] = decay_sum[:, :width]
        grads.last[batch, :, first : first + width] = flow[:, :width]
