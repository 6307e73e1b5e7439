"""Greedy decoding of several rows, and that it leaves circles."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lalia.systems.omni.sampling import CIRCLE, TIMES, circling, greedy


class Script:
    """Says given tokens, a list for each row, and the last of them for ever."""

    def __init__(self, rows: list[list[int]], vocab: int = 50) -> None:
        self.rows, self.vocab, self.steps = rows, vocab, 0

    def _logits(self) -> torch.Tensor:
        said = [row[min(self.steps, len(row) - 1)] for row in self.rows]
        return torch.nn.functional.one_hot(torch.tensor(said), self.vocab).float()

    def prefill(self, *_: Any) -> tuple[torch.Tensor, None]:
        return self._logits(), None

    def step(self, *_: Any) -> tuple[torch.Tensor, None]:
        self.steps += 1
        return self._logits(), None


def test_rows_end_each_at_its_mark_and_decoding_with_the_last() -> None:
    model = Script([[5, 6, 9], [7, 9], [9]])
    assert greedy(model, (), {9}, 100, 50) == [[5, 6], [7], []] and model.steps == 2
    assert greedy(Script([[1, 2, 3, 4]]), (), {9}, 3, 50) == [[1, 2, 3]]
    assert greedy(Script([[40]]), (), {9}, 3, 40) == [[0, 0, 0]], "tokens that the tokenizer lacks are not said"


@pytest.mark.parametrize("period", [1, 3, 7, CIRCLE])
def test_a_circle_is_cut_after_the_first_time(period: int) -> None:
    before, piece = [48, 49], list(range(1, period + 1))
    model = Script([[*before, *piece * 100, 0]])
    assert greedy(model, (), {0}, 10_000, 50) == [[*before, *piece]]
    assert model.steps < len(before) + max(CIRCLE, TIMES * period)


def test_what_is_said_often_is_no_circle() -> None:
    for said in ([4] * (CIRCLE - 1), [1, 2, 3, 4, 5, 6, 7] * (TIMES - 1), list(range(1, 100)), []):
        assert not circling(said)
        assert greedy(Script([[*said, 0]], 200), (), {0}, 1000, 200) == [said]
