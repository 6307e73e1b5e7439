"""CTC in the space of token embeddings: by hand, against torch's own, and what it teaches."""

from __future__ import annotations

import pytest
import torch

from lalia.systems.omni.projector import Projector
from lalia.systems.omni.spelling import SAMPLED, Spelling, candidates


def test_two_soft_tokens_and_one_letter_by_hand() -> None:
    torch.manual_seed(0)
    spelling, table, soft = Spelling(8), torch.randn(3, 8), torch.randn(1, 2, 8)
    loss, count = spelling(soft, torch.tensor([2]), torch.tensor([[1]]), torch.tensor([1]), table)
    unit = table.square().mean() * 8
    logits = torch.cat([torch.full((2, 1), 2.0), 10 * soft[0] @ table.T / unit], dim=1)
    p = logits.softmax(1)
    paths = p[0, 0] * p[1, 2] + p[0, 2] * p[1, 0] + p[0, 2] * p[1, 2]
    assert float(loss.detach()) == pytest.approx(-float(paths.log()), rel=1e-5) and int(count) == 1


def test_rows_are_summed_and_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    spelling, table, soft = Spelling(8), torch.randn(5, 8), torch.randn(2, 9, 8)
    texts, counts, lengths = torch.tensor([[1, 1, 4], [2, 0, 0]]), torch.tensor([9, 4]), torch.tensor([3, 1])
    together, count = spelling(soft, counts, texts, lengths, table)
    alone = [spelling(soft[i : i + 1, :n], counts[i : i + 1], texts[i : i + 1, :m], lengths[i : i + 1], table)[0]
             for i, (n, m) in enumerate(zip((9, 4), (3, 1), strict=True))]  # fmt: skip
    assert float(together.detach()) == pytest.approx(float(sum(alone).detach()), rel=1e-5) and int(count) == 4
    with torch.no_grad():
        soft[1, 4:] += 7
        assert torch.allclose(spelling(soft, counts, texts, lengths, table)[0], together)


def test_a_text_that_does_not_fit_is_left_out_of_loss_and_count() -> None:
    torch.manual_seed(0)
    spelling, table, soft = Spelling(8), torch.randn(5, 8), torch.randn(2, 2, 8)
    texts, counts = torch.tensor([[1, 1], [2, 3]]), torch.tensor([2, 2])  # two of a kind need a blank between them
    loss, count = spelling(soft, counts, texts, torch.tensor([2, 2]), table)
    own, _ = spelling(soft[1:], counts[1:], texts[1:], torch.tensor([2]), table)
    assert int(count) == 2 and torch.isfinite(loss) and torch.allclose(loss, own)
    none, zero = spelling(soft[:1], counts[:1], texts[:1], torch.tensor([2]), table)
    none.backward()
    assert float(none.detach()) == 0 and int(zero) == 0


def test_candidates_hold_the_texts_and_are_the_same_for_a_seed() -> None:
    texts, lengths = torch.tensor([[9999, 3, 3], [70, 0, 0]]), torch.tensor([3, 1])
    found = [candidates(texts, lengths, 10_000, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    chosen, places = found[0]
    assert torch.equal(chosen[places][0], texts[0]) and int(chosen[places][1, 0]) == 70
    assert SAMPLED <= len(chosen) <= SAMPLED + 3 and len(chosen.unique()) == len(chosen)
    assert torch.equal(chosen, found[1][0]) and not torch.equal(chosen, found[2][0])
    few, _ = candidates(torch.tensor([[5]]), torch.tensor([1]), 257, torch.Generator())
    assert torch.equal(few, torch.arange(257))


def test_a_projector_learns_to_spell_what_it_has_never_heard_in_this_order() -> None:
    """Each of six sounds is one token; after sequences of three, another order comes out as its tokens."""
    torch.manual_seed(0)
    table, sounds = torch.randn(6, 16), torch.randn(6, 12)
    projector, spelling = Projector(12, 16, stack=1, hidden=32, scale=1.0), Spelling(16)
    optimizer = torch.optim.Adam([*projector.parameters(), *spelling.parameters()], 0.01)
    lengths = torch.full((8,), 3)
    for _ in range(150):
        texts = torch.stack([torch.randperm(6)[:3] for _ in range(8)])
        frames = sounds[texts].repeat_interleave(3, 1)
        soft, counts = projector(frames, torch.full((8,), 9))
        total, count = spelling(soft, counts, texts, lengths, table)
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    assert float((total / count).detach()) < 0.1
    soft, _ = projector(sounds[torch.tensor([[5, 0, 4, 1]])], torch.tensor([4]))
    assert (soft[0] @ table.T).argmax(1).tolist() == [5, 0, 4, 1]
