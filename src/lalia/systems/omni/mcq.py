"""How probable given answers are after a prompt, by length-normalised log-probability.

``score(answer) = (1 / n) Σ log p(token_i | prompt, tokens before)`` over its n tokens, without the mark that ends a message
(normalisation as in Brown et al. 2020, 2005.14165, section 2.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

#: padded positions that go through the model at once
POSITIONS = 8192


@dataclass
class Prompt:
    """Text ``tokens`` from BOS on, after ``soft [P, W]`` audio tokens (None = no audio)."""

    tokens: list[int]
    soft: Tensor | None = None

    @property
    def size(self) -> int:
        return len(self.tokens) + (len(self.soft) if self.soft is not None else 0)


@dataclass(frozen=True)
class _Row:
    """One pass through the model: a prompt with an answer behind it, of which the last ``count`` logits are asked."""

    question: int
    answers: tuple[int, ...]
    prompt: Prompt
    tail: list[int]


@torch.no_grad()
def answer_scores(language: Any, prompts: Sequence[Prompt], answers: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
    """Score of each of ``answers[i]`` (token lists) after ``prompts[i]``. ValueError for an answer without tokens.

    Answers of one token each (letters) cost one pass for all; others cost one each.
    """
    rows: list[_Row] = []
    for number, (prompt, choices) in enumerate(zip(prompts, answers, strict=True)):
        if not choices or not all(choices):
            raise ValueError("every question needs answers, and every answer at least one token")
        if all(len(choice) == 1 for choice in choices):
            rows.append(_Row(number, tuple(range(len(choices))), prompt, []))
        else:
            rows += [_Row(number, (i,), prompt, list(choice[:-1])) for i, choice in enumerate(choices)]
    scores = [[0.0] * len(choices) for choices in answers]
    for batch in batches(rows):
        for row, table in zip(batch, _tables(language, batch), strict=True):
            for index in row.answers:
                wanted = torch.tensor(answers[row.question][index], device=table.device)
                scores[row.question][index] = float(table.gather(1, wanted[:, None]).mean())
    return scores


def batches(rows: Sequence[_Row]) -> list[list[_Row]]:
    """Rows of like length together, each batch within :data:`POSITIONS` padded positions (one row at least)."""
    result: list[list[_Row]] = []
    for row in sorted(rows, key=lambda item: item.prompt.size + len(item.tail)):
        size = row.prompt.size + len(row.tail)
        if not result or size * (len(result[-1]) + 1) > POSITIONS:
            result.append([])
        result[-1].append(row)
    return result


def _tables(language: Any, rows: Sequence[_Row]) -> list[Tensor]:
    """Log-probabilities [len(tail) + 1, V] of the tokens after each row's prompt."""
    batch = stack(language, [Prompt([*row.prompt.tokens, *row.tail], row.prompt.soft) for row in rows])
    wanted = torch.zeros_like(batch[0], dtype=torch.bool)
    for index, row in enumerate(rows):
        first = len(row.prompt.tokens) - 1
        wanted[index, first : first + len(row.tail) + 1] = True
    logits = language(*batch, wanted)
    return list(functional.log_softmax(logits.float(), dim=-1).split([len(row.tail) + 1 for row in rows]))


def stack(language: Any, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Prompts → (tokens [B, L], lengths [B], prefix [B, P, W], prefix lengths [B]); the last two None without any audio."""
    device = next(language.parameters()).device
    tokens = pad_sequence([torch.tensor(prompt.tokens) for prompt in prompts], batch_first=True).to(device)
    lengths = torch.tensor([len(prompt.tokens) for prompt in prompts], device=device)
    return tokens, lengths, *stack_soft([prompt.soft for prompt in prompts], language.width, device)


def stack_soft(parts: Sequence[Tensor | None], width: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Soft tokens of each row [P_b, W], or None for a row without audio → (padded [B, P, W], lengths [B]); (None, None) when no
    row has any."""
    if all(part is None for part in parts):
        return None, None
    there = [part if part is not None else torch.zeros(0, width, device=device) for part in parts]
    return pad_sequence(there, batch_first=True), torch.tensor([len(part) for part in there], device=device)
