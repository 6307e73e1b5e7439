"""Cached decoding of our GPT against transformers' Qwen2 of the same size, greedy, batch 1."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _timing import interleave, tune_allocator

from lalia.nn.gpt import Gpt, GptConfig

PROMPT, NEW, VOCAB = 32, 200, 8192
OURS = GptConfig(depth=6, vocab=VOCAB, value_embeddings=False)
#: the same layers and width, and as many weights read at a step: three matrices of 8/3 the width in its MLP, two of 4 in ours
THEIRS = {
    "vocab_size": VOCAB,
    "hidden_size": OURS.width,
    "num_hidden_layers": OURS.depth,
    "num_attention_heads": OURS.heads,
    "num_key_value_heads": OURS.heads,
    "intermediate_size": 8 * OURS.width // 3,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}


def _ours(model: Gpt, prompt: Tensor) -> list[int]:
    logits, cache = model.prefill(prompt)
    said = []
    for _ in range(NEW):
        token = logits.argmax(-1)
        said.append(int(token))
        logits, cache = model.step(token, cache)
    return said


def _read(model: torch.nn.Module) -> int:
    """Weights that a step multiplies with: all matrices but the tables that are only looked up."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    return sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in tables)


def _check(model: Gpt, prompt: Tensor) -> None:
    """Our cache must say what the whole sequence says."""
    said = _ours(model, prompt)
    with torch.no_grad():
        logits = model(torch.cat([prompt, torch.tensor([said])], dim=1))[0, PROMPT - 1 : -1]
    best = logits.gather(-1, torch.tensor(said).unsqueeze(-1)).squeeze(-1)
    if not (logits.max(-1).values - best).max() < 1e-4:
        raise AssertionError("cached and uncached decoding differ")


def run(repeats: int = 7) -> dict[str, dict[str, Any]]:
    """Interleaved on one thread, float32, random weights, same allocator; first our cache is checked against a full pass."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tuned = tune_allocator()
    try:
        ours = Gpt(OURS).eval()
        for p in ours.matrices():
            torch.nn.init.normal_(p, std=0.05)
        torch.nn.init.normal_(ours.head.weight, std=0.05)
        theirs = Qwen2ForCausalLM(Qwen2Config(**THEIRS)).eval()
        prompt = torch.randint(0, VOCAB, (1, PROMPT))
        options: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        _check(ours, prompt)
        ratio, p10, p90, mine, other = interleave(
            lambda: _ours(ours, prompt),
            lambda: theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options),
            repeats,
        )
        sizes = f"{_read(ours) / 1e6:.1f} M against {_read(theirs) / 1e6:.1f} M weights read a step"
    finally:
        torch.set_num_threads(threads)
    speeds = f"ours {NEW / mine:.0f} tokens/s, theirs {NEW / other:.0f}"
    note = (
        f"seconds for {NEW} greedy tokens after {PROMPT} ({speeds}), {sizes}, both {OURS.depth} layers {OURS.width} wide, float32,"
        f" random weights, 1 thread, allocator {'tuned' if tuned else 'as it is'}; our tokens are those of uncached decoding"
    )
    against = "transformers, Qwen2ForCausalLM.generate"
    result = {"ratio": ratio, "p10": p10, "p90": p90, "ours": mine, "theirs": other, "against": against, "note": note}
    return {"decode_vs_transformers": result}


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
