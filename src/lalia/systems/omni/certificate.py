"""The gradient-path certificate: before training, does the loss depend on the audio at all? And if not, why?

A freshly initialised GPT has output projections of zero, so that no position hears another: the gradient of the loss with respect
to soft tokens before the text is exactly zero and a projector can learn nothing. The same happens where a mask or a window hides
the audio, where it is cast to another type or detached, and where 16-bit gradients underflow. Causes are found by experiment: each
is taken away in turn, and the one without which a gradient appears is named.

Legend: B rows, P soft tokens, L text tokens, W width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -1
CHANCE = 0.9  # a model that needs more than this share of ln V nats a token without audio has learnt no text
LOSS_SCALE = 2.0**60
FILL = 0.02  # deviation that zero matrices are given in the experiment


class GradientPathError(ValueError):
    """The loss does not depend on the audio, or the language model knows no text: a projector could not learn. Says why."""


@dataclass
class Case:
    """One batch: ``tokens`` and ``targets`` int64 [B, L] (−1 = not learnt), ``lengths`` [B]; ``prefix`` float [B, P, W] with
    ``prefix_lengths`` [B]."""

    tokens: Tensor
    targets: Tensor
    lengths: Tensor
    prefix: Tensor
    prefix_lengths: Tensor


@dataclass
class Certificate:
    """``gradient``: mean over the rows' own soft tokens of |∂loss/∂soft token| (Euclidean, loss in nats a text token);
    ``reached``: share of them with a gradient; ``text_loss``: nats a token without any audio, ``chance``: ln V."""

    gradient: float
    reached: float
    text_loss: float
    chance: float
    reasons: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.reasons

    def text(self) -> str:
        """One line for the log, and one for each reason."""
        head = (
            f"|∂loss/∂audio| = {self.gradient:.3g} on {100 * self.reached:.0f} % of the soft tokens; "
            f"text alone {self.text_loss:.2f} nats a token (chance {self.chance:.2f})"
        )
        return "\n".join([head, *(f"no gradient path: {reason}" for reason in self.reasons)])


def certify(language: nn.Module, case: Case, dtype: torch.dtype | None = None) -> Certificate:
    """Measure how the loss of ``case`` depends on its audio through ``language``, in autocast to ``dtype`` (None = float32).

    Parameters, their gradients and the random state are left as they are.
    """
    gradient, detached = _audio_gradient(language, case, dtype)
    norms = gradient.norm(dim=2)
    own = torch.arange(norms.shape[1], device=norms.device) < case.prefix_lengths.unsqueeze(1)
    count = int(own.sum())
    mean = float(norms[own].mean()) if count else 0.0
    reached = float((norms[own] > 0).float().mean()) if count else 0.0
    with torch.no_grad():
        logits = language(case.tokens, case.lengths, None, None)
        text_loss, chance = float(loss_of(logits, case.targets)), math.log(logits.shape[-1])
    found = Certificate(mean, reached, text_loss, chance)
    if not math.isfinite(mean):
        found.reasons.append(f"dtype: the gradient is not finite in {_named(dtype)}; use train.precision=fp32")
    elif mean == 0:
        found.reasons += why(language, case, dtype, detached)
    if text_loss > CHANCE * chance:
        found.reasons.append(
            f"the language model needs {text_loss:.2f} nats a token for these texts, chance is {chance:.2f}: it is random, or was"
            " trained on another language or with another tokenizer. Train omni-base first, or name another base"
        )
    return found


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy [] of the targets [B, L] that are learnt, of logits [B, L, V]; 0 when there is none."""
    total = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp_min(1)


def _audio_gradient(language: nn.Module, case: Case, dtype: torch.dtype | None, scale: float = 1.0) -> tuple[Tensor, bool]:
    """``scale`` · ∂loss/∂audio [B, P, W] in float32, and whether the graph does not reach the audio at all."""
    device = case.prefix.device.type
    with torch.enable_grad(), torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        prefix = case.prefix.detach().clone().requires_grad_()
        loss = loss_of(language(case.tokens, case.lengths, prefix, case.prefix_lengths), case.targets) * scale
        if not loss.requires_grad:
            return torch.zeros_like(prefix), True
        (gradient,) = torch.autograd.grad(loss, prefix, allow_unused=True)
    return (torch.zeros_like(prefix), True) if gradient is None else (gradient.float(), False)


def _hears(language: nn.Module, case: Case, dtype: torch.dtype | None = None, scale: float = 1.0) -> bool:
    return bool(_audio_gradient(language, case, dtype, scale)[0].any())


# --- causes ---------------------------------------------------------------------------------------------------------
def why(language: nn.Module, case: Case, dtype: torch.dtype | None, detached: bool) -> list[str]:
    """What stops the gradient of ``case``, found by taking one possible cause away at a time; never empty."""
    if not bool((case.targets != IGNORED).any()):
        return ["targets: no text position is learnt in this batch"]
    if not bool((case.prefix_lengths > 0).any()):
        return ["mask: every row's audio has length 0, so that all of it is hidden"]
    if detached:
        return ["dtype: the audio is detached or cast to whole numbers on its way in; the graph does not reach it"]
    if dtype is not None and (_hears(language, case) or _hears(language, case, dtype, LOSS_SCALE)):
        return [f"dtype: the gradient is too small for {_named(dtype)} and becomes 0; use train.precision=fp32"]
    if not dtype and _hears(language, case, None, LOSS_SCALE):
        return ["dtype: the gradient is so small that it becomes 0"]
    if (hidden := _hidden(language, case)) is not None:
        return [hidden]
    zero = zero_matrices(language)
    with filled(language, zero):
        if zero and _hears(language, case):
            return [
                f"zero-init: {len(zero)} matrices are all zero ({', '.join(zero[:3])} …), as in a model that was never trained: no"
                " position hears another. Train omni-base first"
            ]
        if zero and (hidden := _hidden(language, case)) is not None:
            return [hidden, f"zero-init: besides, {len(zero)} matrices are all zero ({', '.join(zero[:3])} …)"]
    return ["unknown: the audio reaches the model, but no change that was tried gave the loss a gradient with respect to it"]


def _hidden(language: nn.Module, case: Case) -> str | None:
    """Whether audio is heard that should not be, or when little of it stands right before one text token."""
    if _hears(language, replace(case, prefix_lengths=torch.zeros_like(case.prefix_lengths))):
        return "mask: soft tokens beyond prefix_lengths are heard and those within are not; is the mask inverted?"
    target = case.targets[:, :1].clamp_min(0)
    one = torch.ones_like(case.lengths)
    close = Case(case.tokens[:, :1], target, one, case.prefix[:, :1], one)
    if _hears(language, close):
        size = f"{case.prefix.shape[1]} soft tokens before {case.tokens.shape[1]} text tokens"
        return f"window: a single soft token right before the text is heard, {size} are not: attention windows or a mask hide them"
    return None


def zero_matrices(language: nn.Module) -> list[str]:
    """Names of the matrices that are zero throughout."""
    return [name for name, p in language.named_parameters() if p.dim() >= 2 and not bool(p.any())]


@contextlib.contextmanager
def filled(language: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """These zero matrices hold small random numbers within the block."""
    generator = torch.Generator().manual_seed(0)
    chosen = [p for name, p in language.named_parameters() if name in set(names)]
    with torch.no_grad():
        for p in chosen:
            p.copy_(FILL * torch.randn(p.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for p in chosen:
                p.zero_()


def _named(dtype: torch.dtype | None) -> str:
    return str(dtype or torch.float32).removeprefix("torch.")
