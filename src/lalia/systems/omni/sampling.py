"""Text from a language model, token by token, with the key-value cache. Legend: V vocabulary, W width, P audio positions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def generate(
    model: Any,
    prompt: Sequence[int],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int = 0,
    stop: Collection[int] = (),
    prefix: Tensor | None = None,
) -> Iterator[int]:
    """Tokens after ``prompt`` until one of ``stop`` (not given out), ``max_tokens``, or the end of the context.

    The global random state is left alone: the same seed gives the same tokens.

    Args:
        model: has ``prefill``, ``step`` and ``context`` (:class:`lalia.nn.gpt.Gpt`).
        prompt: at least one token; begins with the document mark.
        temperature: 0 = greedy. top_k: only the so many most probable tokens; 0 = all.
        prefix: audio before the prompt, [P, W].

    Raises:
        ValueError: an empty prompt, one that leaves no place in the context, a negative temperature, count or ``top_k``.
    """
    if max_tokens < 0 or temperature < 0 or top_k < 0:
        raise ValueError(f"need max_tokens, temperature and top_k of 0 or more; got {max_tokens}, {temperature}, {top_k}")
    audio = 0 if prefix is None else prefix.shape[0]
    room = model.context - audio - len(prompt)
    if not prompt or room < 1:
        raise ValueError(f"a prompt has 1 … {model.context - audio - 1} tokens beside {audio} of audio, got {len(prompt)}")
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    tokens = torch.tensor([list(prompt)], device=device)
    logits, cache = model.prefill(tokens, None, None if prefix is None else prefix[None], None)
    for number in range(min(max_tokens, room)):
        token = choose(logits[0], temperature, top_k, generator)
        if token in stop:
            return
        yield token
        if number + 1 < min(max_tokens, room):
            logits, cache = model.step(torch.tensor([token], device=device), cache)


def choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token by its logits [V]: the most probable at temperature 0, else drawn from softmax(logits / temperature)."""
    logits = logits.float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < len(logits):
        values, kept = logits.topk(top_k)
        return int(kept[torch.multinomial((values / temperature).softmax(0), 1, generator=generator)])
    return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))
