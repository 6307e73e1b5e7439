"""Soft tokens that spell their text in the language model's token embeddings: a CTC loss for the projector that needs no pass
through the language model.

A frozen language model reads a soft token the better the more it looks like a token. So each soft token is compared with the token
embeddings as an output layer would (logit = scale · soft · embedding), one more logit stands for "nothing new" (CTC's blank), and
the text must come out in order (CTC: Graves et al. 2006; CTC before a decoder-only language model: Wu et al. 2023, 2307.03917). It
costs a tenth of the language model's loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lalia.nn.masks import sequence_mask

SAMPLED = 4096  # tokens that a batch's own are told from
BLANK_BIAS = 2.0  # of the blank at the start: most soft tokens say nothing new


class Spelling(nn.Module):
    """CTC over token embeddings of width W; ``blank`` [W], ``scale`` and ``bias`` learn.

    Legend: B clips, P soft tokens, L text tokens, K candidates.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blank = nn.Parameter(torch.zeros(width))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.full((), BLANK_BIAS))

    def forward(self, soft: Tensor, counts: Tensor, texts: Tensor, lengths: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Soft tokens [B, P, W] with ``counts`` [B]; candidates ``texts`` [B, L], indices into ``table`` [K, W], with ``lengths``
        [B] → the summed loss in nats, and how many text tokens it is of. A text that does not fit into its soft tokens is left out
        of both."""
        unit = table.float().square().mean() * table.shape[1]  # a token compared with itself has a logit near scale · 10
        rows = torch.cat([self.blank[None].float(), table.float()])
        logits = (soft.float() @ rows.T) * (10 * self.log_scale.exp() / unit)
        logits = torch.cat([logits[..., :1] + self.bias, logits[..., 1:]], dim=-1)
        fits = counts >= _least(texts, lengths)
        if not fits.any():
            return logits.sum() * 0, lengths.sum() * 0
        log_p = logits[fits].log_softmax(-1).transpose(0, 1)
        targets = texts[fits] + 1
        loss = F.ctc_loss(log_p, targets, counts[fits], lengths[fits], reduction="sum")
        return loss, lengths[fits].sum()


def _least(texts: Tensor, lengths: Tensor) -> Tensor:
    """Soft tokens that each text needs: one a token, and a blank between two of a kind."""
    inside = sequence_mask(lengths, texts.shape[1])
    twice = (texts[:, 1:] == texts[:, :-1]) & inside[:, 1:]
    return lengths + twice.sum(1)


def candidates(texts: Tensor, lengths: Tensor, vocab: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [K] that the texts [B, L] are told from, their own and :data:`SAMPLED` drawn ones; and the texts as indices into
    them."""
    inside = sequence_mask(lengths, texts.shape[1])
    drawn = torch.randperm(vocab, generator=generator)[:SAMPLED].to(texts.device)
    chosen = torch.cat([texts[inside], drawn]).unique()
    return chosen, torch.searchsorted(chosen, texts.contiguous()).clamp_max(len(chosen) - 1)
