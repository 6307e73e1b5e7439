"""Decoding of replies with the key-value cache: one streamed, or several together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from lalia.systems.omni import conversation
from lalia.systems.omni.mcq import Prompt, stack
from lalia.systems.omni.sampling import generate, greedy

BROKEN = "\ufffd"  # what a tokenizer decodes the first bytes of an unfinished character to
Autocast = Callable[[], AbstractContextManager[Any]]


def pieces(
    language: Any, tokenizer: Any, prompt: Prompt, max_tokens: int, temperature: float, top_k: int, seed: int, autocast: Autocast
) -> Iterator[str]:
    """The reply to one prompt as pieces of whole characters. ``temperature`` 0 is greedy; ``top_k`` 0 does not cut.

    The context bounds it: a reply ends where no place is left. ValueError for a negative temperature or count.
    """
    if max_tokens < 1 or temperature < 0 or top_k < 0:
        raise ValueError(f"need max_tokens >= 1, temperature >= 0, top_k >= 0; got {max_tokens}, {temperature}, {top_k}")
    stops, stop_text = set(conversation.stops(tokenizer)), conversation.stop_text(tokenizer)

    def run() -> Iterator[str]:
        said, ids = "", list[int]()
        tokens = generate(
            language,
            prompt.tokens,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            stop=stops,
            prefix=prompt.soft,
            known=tokenizer.size,
            autocast=autocast,
        )
        for token in tokens:
            ids.append(token)
            text = tokenizer.decode(ids)
            if stop_text and stop_text in text:
                text = text[: text.index(stop_text)]
                yield from [text[len(said) :]] if len(text) > len(said) else []
                return
            whole = text.rstrip(BROKEN)
            held = _overlap(whole, stop_text)  # may be the beginning of the end mark
            whole = whole[: len(whole) - held]
            if len(whole) > len(said):
                yield whole[len(said) :]
                said = whole
        rest = tokenizer.decode(ids)[len(said) :]
        if rest:
            yield rest

    return run()


def _overlap(text: str, mark: str) -> int:
    """Longest end of ``text`` that begins ``mark``."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


@torch.no_grad()
def replies(language: Any, tokenizer: Any, prompts: Sequence[Prompt], max_tokens: int, autocast: Autocast) -> list[str]:
    """Greedy replies to several prompts at once; each is what it would be alone, but that the longest prompt leaves the room for
    all of them."""
    stops, stop_text = set(conversation.stops(tokenizer)), conversation.stop_text(tokenizer)
    room = min(max_tokens, language.context - max(prompt.size for prompt in prompts))
    with autocast():
        said = greedy(language, stack(language, prompts), stops, room, tokenizer.size)
    texts = [tokenizer.decode(ids) for ids in said]
    return [(text.split(stop_text)[0] if stop_text else text).strip() for text in texts]
