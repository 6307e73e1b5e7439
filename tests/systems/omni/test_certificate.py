"""The gradient-path certificate: its size by hand, each cause named, and no trace left."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lalia.systems.omni import certificate
from lalia.systems.omni.certificate import Case, certify


class Stand(nn.Module):
    """A language model of one attention layer with every fault one can ask for."""

    def __init__(self, **faults) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.faults, self.table, self.out, self.head = faults, nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)
        if faults.get("zero"):
            nn.init.zeros_(self.out.weight)
        self.head.bias.data[3] = 8.0  # it knows its only text, so that it does not count as random

    def forward(self, tokens, lengths=None, prefix=None, prefix_lengths=None):
        x, faults = self.table(tokens), self.faults
        if prefix is not None:
            before = prefix.shape[1]
            prefix = prefix.detach() if faults.get("detach") else prefix.half() if faults.get("half") else prefix
            hidden = torch.arange(before) >= prefix_lengths.unsqueeze(1)
            hidden = ~hidden if faults.get("inverted") else hidden
            far = torch.arange(tokens.shape[1]).unsqueeze(1) + before - torch.arange(before) > faults.get("window", 99)
            seen = ~(hidden.unsqueeze(1) | far)
            prefix = (prefix * faults.get("gain", 1.0)).to(x.dtype)
            heard = torch.einsum("blp,bpw->blw", seen.float() / before, prefix * self.table.weight.mean())
            x = x + self.out(heard.tanh()) * faults.get("loud", 1.0)
        return self.head(x)


def case(rows: int = 2, soft: int = 6) -> Case:
    torch.manual_seed(1)
    targets = torch.full((rows, 3), 3)
    tokens, lengths = torch.ones(rows, 3, dtype=torch.long), torch.tensor([3] * rows)
    return Case(tokens, targets, lengths, torch.randn(rows, soft, 8), torch.tensor([4] * rows))


def test_a_sound_path_is_certified_with_its_size() -> None:
    language, given = Stand(), case()
    found = certify(language, given)
    assert found.ok and found.reached == 1
    prefix = given.prefix.clone().requires_grad_()
    certificate.loss_of(language(given.tokens, given.lengths, prefix, given.prefix_lengths), given.targets).backward()
    assert found.gradient == pytest.approx(float(prefix.grad[:, :4].norm(dim=2).mean()), rel=1e-5) and found.gradient > 0
    assert "100 % of the soft tokens" in found.text()


@pytest.mark.parametrize(
    ("faults", "cause"),
    [
        ({"zero": True}, "zero-init: 1 matrices are all zero (out.weight"),
        ({"window": 1}, "window: a single soft token right before the text is heard, 6 soft tokens before 3"),
        ({"inverted": True}, "mask: soft tokens beyond prefix_lengths are heard"),
        ({"detach": True}, "dtype: the audio is detached"),
        ({"gain": 0.0}, "unknown"),
    ],
    ids=["zero-init", "window", "inverted", "detached", "unknown"],
)
def test_each_cause_is_named(faults, cause) -> None:
    given = case()
    if "inverted" in faults:
        given.prefix_lengths[:] = 6
    found = certify(Stand(**faults), given)
    assert not found.ok and found.gradient == 0 and found.reasons[0].startswith(cause), found.text()


def test_masks_are_named() -> None:
    silent = case()
    silent.prefix_lengths = torch.tensor([0, 0])
    assert certify(Stand(), silent).reasons[0].startswith("mask: every row's audio has length 0")
    nothing = case()
    nothing.targets = torch.full((2, 3), -1)
    assert certify(Stand(), nothing).reasons[0].startswith("targets: no text position")


def test_underflow_is_named() -> None:
    assert certify(Stand(loud=1e-8), case()).ok
    assert "too small for float16" in certify(Stand(loud=1e-8), case(), torch.float16).reasons[0]
    assert certify(Stand(gain=1e-24, loud=1e-24), case()).reasons[0].startswith("dtype: the gradient is so small")


def test_experiments_leave_no_trace() -> None:
    language = Stand(zero=True)
    before = {name: p.clone() for name, p in language.named_parameters()}
    given = case()
    state = torch.get_rng_state()
    certify(language, given)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in language.named_parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_a_model_that_knows_no_text_is_refused() -> None:
    language = Stand()
    language.head.bias.data[3] = 0
    found = certify(language, case())
    assert found.gradient > 0 and not found.ok and "random, or was" in found.reasons[0]
