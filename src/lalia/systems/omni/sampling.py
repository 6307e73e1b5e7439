"""Text from a language model, token by token, with the key-value cache.

Legend: V vocabulary, W width, P audio positions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

CIRCLE, TIMES = 24, 4


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
    known: int | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[int]:
    """Tokens after ``prompt`` until one of ``stop`` (not given out), ``max_tokens``, or the end of the context.

    The global random state is left alone: the same seed gives the same tokens.

    Args:
        model: has ``prefill``, ``step`` and ``context`` (:class:`lalia.nn.gpt.Gpt`).
        prompt: at least one token; begins with the document mark.
        temperature: 0 = greedy. top_k: only the so many most probable tokens; 0 = all.
        prefix: audio before the prompt, [P, W].
        known: only the so many first tokens: a table of embeddings may be larger than the tokenizer. None = all.
        autocast: made anew around each pass, since none may be held across a ``yield``.

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
    with autocast():
        logits, cache = model.prefill(tokens, None, None if prefix is None else prefix[None], None)
    for number in range(min(max_tokens, room)):
        token = choose(logits[0, :known], temperature, top_k, generator)
        if token in stop:
            return
        yield token
        if number + 1 < min(max_tokens, room):
            with autocast():
                logits, cache = model.step(torch.tensor([token], device=device), cache)


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[Any], stop: Collection[int], most: int, known: int) -> list[list[int]]:
    """The most probable of the first ``known`` tokens after each row of ``prompt`` (tokens, lengths, prefix, prefix lengths), until
    one of ``stop`` (not given out), ``most`` tokens, or a row that goes in circles, which is cut: see :func:`circling`."""
    logits, cache = model.prefill(*prompt)
    said: list[list[int]] = [[] for _ in logits]
    done = [False] * len(said)
    for number in range(most):
        chosen = logits[:, :known].argmax(-1)
        for row, token in enumerate(chosen.tolist()):
            if done[row] or token in stop:
                done[row] = True
                continue
            said[row].append(token)
            if (extra := circling(said[row])) > 0:
                log.info("row %d says the same again and again: cut after the first time", row + 1)
                del said[row][-extra:]
                done[row] = True
        if all(done) or number + 1 == most:
            break
        logits, cache = model.step(chosen, cache)
    return said


def circling(said: Sequence[int]) -> int:
    """How many of the last tokens repeat those before them, when a run of :data:`CIRCLE` tokens or more is one piece said at least
    :data:`TIMES` times; else 0. Greedy decoding falls into such circles and does not leave them."""
    for period in range(1, CIRCLE + 1):
        run = max(CIRCLE, TIMES * period)
        if len(said) >= run and said[-run:-period] == said[-run + period :]:
            return run - period
    return 0


def choose(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token by its logits [V]: the most probable at temperature 0, else drawn from softmax(logits / temperature)."""
    logits = logits.float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    if 0 < top_k < len(logits):
        values, kept = logits.topk(top_k)
        return int(kept[torch.multinomial((values / temperature).softmax(0), 1, generator=generator)])
    return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=generator))
