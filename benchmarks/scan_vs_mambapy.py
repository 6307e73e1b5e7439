"""The selective scan, fused in numba, against mambapy's parallel scan: forward and backward, and forward alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _timing import interleave, tune_allocator

from lalia.nn.ssm import ScanBackend, selective_scan

BATCH, LENGTH, CHANNELS, STATES = 4, 512, 256, 16


def _values() -> list[Tensor]:
    """inputs, delta, a, b, c, skip as mambapy wants them: [B, L, D] and [B, L, N]; delta is a step size already."""
    random = torch.Generator().manual_seed(0)
    sequence, entry = (BATCH, LENGTH, CHANNELS), (BATCH, LENGTH, STATES)
    inputs, raw, b, c = (torch.randn(shape, generator=random) for shape in (sequence, sequence, entry, entry))
    decay = -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1)
    values = [inputs, torch.nn.functional.softplus(raw - 4), decay, b, c, torch.ones(CHANNELS)]
    return [value.requires_grad_() for value in values]


def _ours(values: list[Tensor]) -> Tensor:
    """The same memory, seen as [B, D, L]."""
    inputs, delta, decay, b, c, skip = values
    across = (inputs.transpose(1, 2), delta.transpose(1, 2), decay, b.transpose(1, 2), c.transpose(1, 2), skip)
    return selective_scan(*across, backend=ScanBackend.numba)[0].transpose(1, 2)


def _check(values: list[Tensor], theirs: Any, slope: Tensor) -> None:
    found, wanted = _ours(values), theirs(values)
    pairs = [(found, wanted), *zip(*(torch.autograd.grad(out, values, slope) for out in (found, wanted)), strict=True)]
    worst = max(float((a - b).detach().abs().max() / b.detach().abs().max()) for a, b in pairs)
    if not worst < 1e-5:
        raise AssertionError(f"values or gradients differ by {worst:.1e} of the largest")


def run(repeats: int = 15) -> dict[str, dict[str, Any]]:
    """Interleaved on one thread, same allocator setting for both; values and gradients are checked to agree to 1e-5 first."""
    from mambapy.mamba import MambaBlock, MambaConfig

    block = MambaBlock(MambaConfig(d_model=CHANNELS // 2, n_layers=1, d_state=STATES, expand_factor=2))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tuned = tune_allocator()
    try:
        values = _values()
        slope = torch.randn(BATCH, LENGTH, CHANNELS)

        def theirs(arguments: list[Tensor]) -> Tensor:
            return block.selective_scan(*arguments)

        _check(values, theirs, slope)
        ratio, p10, p90, ours, other = interleave(
            lambda: torch.autograd.grad(_ours(values), values, slope),
            lambda: torch.autograd.grad(theirs(values), values, slope),
            repeats,
            warmup=2,
        )
        with torch.no_grad():
            forward, low, high, *_ = interleave(lambda: _ours(values), lambda: theirs(values), repeats, warmup=2)
        note = (
            f"seconds a call, forward + backward, B{BATCH} L{LENGTH} D{CHANNELS} N{STATES}, float32, 1 thread, allocator "
            f"{'tuned' if tuned else 'as it is'}, gradients of all six arguments agree to 1e-5; "
            f"forward alone {forward:.1f} x ({low:.1f}-{high:.1f})"
        )
    finally:
        torch.set_num_threads(threads)
    return {
        "scan_vs_mambapy": {
            "ratio": ratio,
            "p10": p10,
            "p90": p90,
            "ours": ours,
            "theirs": other,
            "against": "mambapy, MambaBlock.selective_scan (parallel scan)",
            "note": note,
        }
    }


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
