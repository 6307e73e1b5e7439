"""A MambaModel of transformers against the same stack with our block and the same weights: forward, and with backward."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _timing import interleave, tune_allocator

from lalia.nn.mamba import MambaBlock

BATCH, LENGTH, WIDTH, STATES, LAYERS = 4, 512, 128, 16, 4


class Stack(nn.Module):
    """Pre-norm residual blocks and a last norm, as in MambaModel; the norms are those of the model whose weights are taken."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MambaBlock(WIDTH, STATES) for _ in range(LAYERS))
        self.norms = nn.ModuleList([*(layer.norm for layer in model.layers), model.norm_f])
        for block, layer in zip(self.blocks, model.layers, strict=True):
            block.load_state_dict(layer.mixer.state_dict())

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [B, L, D] → the same shape."""
        for block, norm in zip(self.blocks, self.norms, strict=False):
            hidden = hidden + block(norm(hidden))[0]
        return self.norms[-1](hidden)


def _model() -> Any:
    from transformers import MambaConfig, MambaModel

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=16, hidden_size=WIDTH, state_size=STATES, num_hidden_layers=LAYERS, use_mambapy=False, use_cache=False
    )
    return MambaModel(config).train(False)


def run(repeats: int = 7, backward_repeats: int = 2) -> dict[str, dict[str, Any]]:
    """Interleaved on one thread, same allocator setting for both; outputs and gradients are checked to agree first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tuned = tune_allocator()
    try:
        model = _model()
        stack = Stack(model)
        hidden = torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)

        def theirs() -> Tensor:
            return model(inputs_embeds=hidden, use_cache=False).last_hidden_state

        def slopes(forward: Any) -> Tensor:
            return torch.autograd.grad(forward().square().mean(), hidden)[0]

        torch.testing.assert_close(stack(hidden), theirs(), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            ratio, p10, p90, ours, other = interleave(lambda: stack(hidden), theirs, repeats, warmup=2)
        torch.testing.assert_close(slopes(lambda: stack(hidden)), slopes(theirs), rtol=1e-3, atol=1e-6)
        both = interleave(lambda: slopes(lambda: stack(hidden)), lambda: slopes(theirs), backward_repeats, warmup=0)
        note = (
            f"seconds a call, forward, {LAYERS} layers of width {WIDTH}, B{BATCH} L{LENGTH} N{STATES}, float32, 1 thread, "
            f"allocator {'tuned' if tuned else 'as it is'}, same weights, outputs agree to 1e-4; "
            f"forward + backward {both[0]:.0f} x ({both[3]:.2f} s against {both[4]:.1f} s)"
        )
    finally:
        torch.set_num_threads(threads)
    return {
        "scan_vs_transformers": {
            "ratio": ratio,
            "p10": p10,
            "p90": p90,
            "ours": ours,
            "theirs": other,
            "against": "transformers MambaModel, slow path (no CUDA kernels)",
            "note": note,
        }
    }


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
