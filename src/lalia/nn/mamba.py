"""The Mamba block (Gu & Dao 2023, 2312.00752, figure 3), with its state as data.

Parameters, their names and their initialisation are those of the published ``mamba_simple``. A sequence cut into pieces, each given
the state that the piece before it returned, has the values and gradients of the whole; so has one taken step by step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalia.nn.ssm import ScanBackend, selective_scan

STEP_LOW, STEP_HIGH, STEP_FLOOR = 1e-3, 0.1, 1e-4  # the step sizes at the start, log-uniform
NO_STEP = -1e4  # softplus of it is 0: a position that leaves the state as it is


@dataclass
class MambaState:
    """What a block remembers: the last inputs of the convolution, oldest first, and the state of the recurrence (float32)."""

    conv: Tensor  # [B, inner, kernel - 1]
    ssm: Tensor  # [B, inner, N]

    def detach(self) -> MambaState:
        """The same values, cut off from the past for the gradient."""
        return MambaState(self.conv.detach(), self.ssm.detach())

    def select(self, index: Tensor) -> MambaState:
        """Rows ``index`` (int64, or bool [B]) of the batch."""
        return MambaState(self.conv[index], self.ssm[index])


class MambaBlock(nn.Module):
    """Selective state space block: [B, L, ``width``] → the same shape; ``inner`` = ``expand`` · ``width`` channels, N = ``state``.

    ``rank`` is the width of the step sizes' bottleneck, ceil(width / 16) if 0. ``A_log`` and ``D`` stay float32 when the module is
    cast to half precision, and carry ``_no_weight_decay``.
    """

    def __init__(
        self,
        width: int,
        state: int = 16,
        kernel: int = 4,
        expand: int = 2,
        rank: int = 0,
        backend: ScanBackend = ScanBackend.auto,
    ) -> None:
        super().__init__()
        if min(width, state, kernel, expand) < 1 or rank < 0:
            raise ValueError(
                f"sizes must be at least 1: width {width}, state {state}, kernel {kernel}, expand {expand}, rank {rank}"
            )
        self.width, self.states, self.kernel, self.inner = width, state, kernel, expand * width
        self.rank = rank or math.ceil(width / 16)
        self.backend = backend
        self.in_proj = nn.Linear(width, 2 * self.inner, bias=False)
        self.conv1d = nn.Conv1d(self.inner, self.inner, kernel, groups=self.inner, padding=kernel - 1)
        self.x_proj = nn.Linear(self.inner, self.rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(self.rank, self.inner)
        self.A_log = nn.Parameter(torch.arange(1, state + 1, dtype=torch.float32).log().repeat(self.inner, 1))
        self.D = nn.Parameter(torch.ones(self.inner))
        self.out_proj = nn.Linear(self.inner, width, bias=False)
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        self._mark()
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        low, high = math.log(STEP_LOW), math.log(STEP_HIGH)
        steps = torch.exp(torch.rand(self.inner) * (high - low) + low).clamp_min(STEP_FLOOR)
        self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus

    def _mark(self) -> None:
        for parameter in (self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()  # a copy of a parameter loses its attributes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MambaBlock:
        def keep(values: Tensor) -> Tensor:
            moved = fn(values)
            return values.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        for child in self.children() if recurse else ():
            child._apply(fn)
        return super()._apply(keep, recurse=False)

    def init(self, batch: int, device: Any = None, dtype: torch.dtype | None = None) -> MambaState:
        """The state before the first position, zeros; ``dtype`` is that of ``conv``, both as the weights when not given."""
        weight = self.in_proj.weight
        device, dtype = weight.device if device is None else device, dtype or weight.dtype
        scan_dtype = torch.float64 if dtype is torch.float64 else torch.float32
        conv = torch.zeros(batch, self.inner, self.kernel - 1, device=device, dtype=dtype)
        return MambaState(conv, torch.zeros(batch, self.inner, self.states, device=device, dtype=scan_dtype))

    def forward(self, hidden: Tensor, state: MambaState | None = None, lengths: Tensor | None = None) -> tuple[Tensor, MambaState]:
        """hidden [B, L, width], lengths int64 [B] in 0..L (L if None) → [B, L, width] and the state after each row's last position.

        Positions at or beyond a row's length change neither state; the output there means nothing. Without ``state``: from zeros.
        ValueError: a width, a batch or lengths that do not fit.
        """
        lengths = self._checked(hidden, state, lengths)
        # two products, each in its own memory, and channels innermost throughout: so the scan needs no copy
        to_values, to_gate = self.in_proj.weight.chunk(2)
        values, gate = F.linear(hidden, to_values), F.linear(hidden, to_gate)
        state = self.init(len(hidden), hidden.device, values.dtype) if state is None else state
        joined = torch.cat([state.conv.transpose(1, 2).to(values.dtype), values], 1)  # [B, kernel - 1 + L, inner]
        inputs = F.silu(self._convolve(joined))
        steps, b, c = self._selection(inputs)
        if lengths is not None:
            beyond = torch.arange(hidden.shape[1], device=hidden.device) >= lengths[:, None]
            steps = steps.masked_fill(beyond[..., None], NO_STEP)
        mixed, last = selective_scan(
            inputs.transpose(1, 2), steps.transpose(1, 2), -torch.exp(self.A_log), b.transpose(1, 2), c.transpose(1, 2),
            self.D, gate.transpose(1, 2), self.dt_proj.bias, True, state.ssm, self.backend,
        )  # fmt: skip
        return self.out_proj(mixed.transpose(1, 2)), MambaState(self._tail(joined, lengths), last)

    def step(self, hidden: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """One position: hidden [B, width] → [B, width] and the state after it; as :meth:`forward` with L = 1, without a scan."""
        values, gate = self.in_proj(hidden).chunk(2, -1)
        window = torch.cat([state.conv.to(values.dtype), values[..., None]], -1)  # [B, inner, kernel]
        inputs = F.silu(F.conv1d(window, self.conv1d.weight, self.conv1d.bias, groups=self.inner)[..., 0])
        raw, b, c = self._selection(inputs)
        with torch.autocast(hidden.device.type, enabled=False):
            wide = state.ssm.dtype
            steps = F.softplus(raw.to(wide) + self.dt_proj.bias.to(wide))
            factor = torch.exp(steps[..., None] * -torch.exp(self.A_log.to(wide)))
            ssm = factor * state.ssm + (steps * inputs.to(wide))[..., None] * b.to(wide)[:, None]
            mixed = (ssm * c.to(wide)[:, None]).sum(-1) + self.D.to(wide) * inputs.to(wide)
            mixed = (mixed * F.silu(gate.to(wide))).to(inputs.dtype)
        return self.out_proj(mixed), MambaState(window[..., 1:], ssm)

    def _checked(self, hidden: Tensor, state: MambaState | None, lengths: Tensor | None) -> Tensor | None:
        if hidden.dim() != 3 or hidden.shape[2] != self.width:
            raise ValueError(f"hidden must be [B, L, {self.width}], got {list(hidden.shape)}")
        batch, length, _ = hidden.shape
        if state is not None and len(state.ssm) != batch:
            raise ValueError(f"a state of {len(state.ssm)} rows for a batch of {batch}: select its rows")
        if lengths is None:
            return None
        if lengths.shape != (batch,) or bool(((lengths < 0) | (lengths > length)).any()):
            raise ValueError(f"lengths must be {batch} numbers in 0..{length}, got {lengths.tolist()}")
        return lengths.to(hidden.device)

    def _convolve(self, joined: Tensor) -> Tensor:
        """The causal depthwise convolution: [B, kernel - 1 + L, inner] → [B, L, inner].

        As a picture of height 1 with its channels innermost, which oneDNN computes many times as fast as ``conv1d`` on a CPU.
        """
        picture = joined.transpose(1, 2)[:, :, None]
        if joined.device.type == "cpu":
            picture = picture.contiguous(memory_format=torch.channels_last)
        found = F.conv2d(picture, self.conv1d.weight[:, :, None], self.conv1d.bias, groups=self.inner)
        return found[:, :, 0].transpose(1, 2).contiguous()

    def _selection(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the recurrence is given at each position: step sizes before bias and softplus [..., inner], b and c [..., N]."""
        low_rank, b, c = self.x_proj(inputs).split([self.rank, self.states, self.states], -1)
        return F.linear(low_rank, self.dt_proj.weight), b, c

    def _tail(self, joined: Tensor, lengths: Tensor | None) -> Tensor:
        """The inputs that the convolution will want to see again: [B, kernel - 1 + L, inner] → [B, inner, kernel - 1]."""
        kept = self.kernel - 1
        if lengths is None:
            return joined[:, joined.shape[1] - kept :].transpose(1, 2)
        index = lengths[:, None] + torch.arange(kept, device=joined.device)
        return joined.gather(1, index[..., None].expand(-1, -1, self.inner)).transpose(1, 2)
