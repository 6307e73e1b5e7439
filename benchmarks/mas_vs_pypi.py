"""Alignment search against PyPI's monotonic-alignment-search (Cython), and expansion by gather against a matmul."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _timing import interleave, tune_allocator

from lalia.nn.align import attention_path, expand, search_alignment

BATCH, TOKENS, FRAMES, WIDTH = 32, 200, 1000, 192


def _expansion(durations: torch.Tensor, repeats: int) -> str:
    values = torch.randn(BATCH, 2 * WIDTH, TOKENS)  # mean and log-scale of the prior
    path = attention_path(durations, FRAMES).transpose(1, 2).contiguous()
    if not torch.equal(expand(values, durations, FRAMES), torch.matmul(values, path)):
        raise AssertionError("gather and matmul expand to different values")
    ratio, p10, p90, *_ = interleave(
        lambda: expand(values, durations, FRAMES), lambda: torch.matmul(values, path), repeats
    )
    return f"expansion by gather {ratio:.1f} x the matmul with the path ({p10:.1f}-{p90:.1f})"


def run(repeats: int = 21) -> dict[str, dict[str, Any]]:
    """Interleaved on one thread, same allocator setting for both; the paths are checked to be identical first.

    Each side gets its scores in its own layout and gives what it gives: durations here, a path of 0 and 1 there.
    """
    from monotonic_alignment_search import maximum_path

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tuned = tune_allocator()
    try:
        scores = torch.randn(BATCH, FRAMES, TOKENS, generator=torch.Generator().manual_seed(0))
        text_lengths, frame_lengths = torch.full((BATCH,), TOKENS), torch.full((BATCH,), FRAMES)
        transposed, mask = scores.transpose(1, 2).contiguous(), torch.ones(BATCH, TOKENS, FRAMES)
        durations = search_alignment(scores, text_lengths, frame_lengths)
        if not torch.equal(attention_path(durations, FRAMES).transpose(1, 2), maximum_path(transposed, mask)):
            raise AssertionError("the two searches found different paths")
        ratio, p10, p90, ours, theirs = interleave(
            lambda: search_alignment(scores, text_lengths, frame_lengths),
            lambda: maximum_path(transposed, mask),
            repeats,
            warmup=3,
        )
        note = (
            f"seconds a call, B{BATCH}, {TOKENS} tokens x {FRAMES} frames, 1 thread, identical paths, "
            f"allocator {'tuned' if tuned else 'as it is'}; {_expansion(durations, repeats)}"
        )
    finally:
        torch.set_num_threads(threads)
    return {
        "mas_vs_pypi": {
            "ratio": ratio,
            "p10": p10,
            "p90": p90,
            "ours": ours,
            "theirs": theirs,
            "against": "PyPI monotonic-alignment-search (Cython), maximum_path",
            "note": note,
        }
    }


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
