"""Optimizers (AdamW, and Muon beside it), learning rates as pure functions of the step, gradient norms, freezing and a moving
average of weights.

Nothing here keeps time: a learning rate follows from (config, step, epoch, total steps) alone, so that a run that is
resumed, with or without its optimizer state, gets the rate of the uninterrupted one.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW, Muon, Optimizer

from lalia.config import nearest
from lalia.sections import OptimizerConfig, OptimizerKind, RunConfig, ScheduleKind
from lalia.system import System, check_partition

log = logging.getLogger(__name__)
FUSED_DEVICES = ("cpu", "cuda", "mps")
OptimizerState = dict[str, dict[str, dict[str, Tensor]]]
Named = tuple[str, nn.Parameter]


# --- building -------------------------------------------------------------------------------------------------------
def build(system: System, config: RunConfig) -> dict[str, Optimizer]:
    """One AdamW (1711.05101) or :class:`MuonAdamW` per name of ``system.optimizers()``, set by ``config.optimizers.<name>``.

    Frozen parameters are left out. Weight decay falls on every parameter, biases and norms too, as in VITS, except on those with
    a true attribute ``_no_weight_decay`` (the A and D of Mamba), which form a group of their own. Under ``kind: muon`` an
    attribute ``_learning`` of a parameter says how it is learnt: ``{"muon": True}``, or for AdamW ``rate`` (a multiple of ``lr``),
    ``betas`` and ``weight_decay``; under ``kind: adamw`` all parameters are treated alike.
    Raises ValueError when the split of parameters is wrong, a section is missing, or an optimizer has nothing to learn.
    """
    groups = system.optimizers()
    check_partition(system, groups)
    names = {id(p): n for n, p in system.named_parameters()}
    optimizers: dict[str, Optimizer] = {}
    for name, parameters in groups.items():
        named = [(names[id(p)], p) for p in parameters if p.requires_grad]
        if not named:
            raise ValueError(f"optimizer {name!r} has no trainable parameter; train.freeze froze its whole network")
        chosen = section(config, name)
        optimizers[name] = (_muon if chosen.kind is OptimizerKind.muon else _adamw)(named, chosen)
    return optimizers


def section(config: RunConfig, name: str) -> OptimizerConfig:
    """``config.optimizers.<name>``; ValueError with the nearest name when there is none."""
    sections = getattr(config, "optimizers", None)
    found = getattr(sections, name, None)
    if not isinstance(found, OptimizerConfig):
        known = list(sections.keys()) if sections is not None else []
        raise ValueError(f"config.optimizers has no section {name!r}{nearest(name, known)} (it has {', '.join(known)})")
    return found


def _adamw(named: list[Named], config: OptimizerConfig) -> AdamW:
    fused = _can_fuse(named)
    first, second = config.betas
    free = [(name, p) for name, p in named if getattr(p, "_no_weight_decay", False)]
    rest = [(name, p) for name, p in named if not getattr(p, "_no_weight_decay", False)]
    split = ((rest, config.weight_decay), (free, 0.0))
    groups: list[dict[str, Any]] = [{"params": pairs, "weight_decay": decay} for pairs, decay in split if pairs]
    return AdamW(groups, lr=config.lr, betas=(first, second), eps=config.eps, fused=fused)


def _can_fuse(named: Iterable[Named]) -> bool:
    return all(p.device.type in FUSED_DEVICES and p.is_floating_point() for _, p in named)


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024, torch's) for some groups and AdamW for the others, stepped, saved and resumed as one optimizer.

    Args:
        groups: parameter groups with their names; ``muon`` says whose each is, and ``rate`` (1 if absent) is the multiple of the
            optimizer's learning rate that it learns at.
        momentum: of Muon.
        settings: of AdamW, for all groups that do not say otherwise.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float, **settings: Any) -> None:
        inner: list[Optimizer] = []
        for muon in (True, False):
            own = [dict(group) for group in groups if group["muon"] is muon]
            if own:
                inner.append(Muon(own, momentum=momentum) if muon else AdamW(own, **settings))
        self._inner = inner
        super().__init__([group for part in inner for group in part.param_groups], {})
        for part in inner:  # the same groups and the same state, seen twice
            part.param_groups = [group for group in self.param_groups if group["muon"] is isinstance(part, Muon)]
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self._inner:
            part.step()


def _muon(named: list[Named], config: OptimizerConfig) -> MuonAdamW:
    """Groups of parameters with the same settings; the order of the groups is that of their first parameters."""
    groups: dict[str, dict[str, Any]] = {}
    for name, p in named:
        settings = {"muon": False, "weight_decay": config.weight_decay, **_learning(p, config)}
        groups.setdefault(repr(settings), {**settings, "params": []})["params"].append((name, p))
    fused = _can_fuse(pair for group in groups.values() if not group["muon"] for pair in group["params"])
    first, second = config.betas
    return MuonAdamW([*groups.values()], config.momentum, betas=(first, second), eps=config.eps, fused=fused)


def _learning(parameter: nn.Parameter, config: OptimizerConfig) -> dict[str, Any]:
    """How a parameter is learnt under ``kind: muon``: its mark, else AdamW at ``adamw_lr``."""
    mark = getattr(parameter, "_learning", None)
    if mark is None:
        free = {"weight_decay": 0.0} if getattr(parameter, "_no_weight_decay", False) else {}
        return {"rate": config.adamw_lr / config.lr, **free}
    if mark.get("muon") and parameter.ndim != 2:
        raise ValueError(f"Muon learns matrices; a parameter of shape {list(parameter.shape)} is marked for it")
    return dict(mark)


# --- learning rate --------------------------------------------------------------------------------------------------
def learning_rate(config: OptimizerConfig, step: int, epoch: int, total_steps: int = 0) -> float:
    """The learning rate of step ``step`` (from 0) in epoch ``epoch`` (from 0).

    Warm-up rises linearly: exactly ``warmup_steps`` steps, or ``warmup_epochs`` epochs, run below the full rate.
    Exponential decay counts epochs from the end of ``warmup_epochs``. Cosine (1608.03983) runs from the end of
    ``warmup_steps`` to ``total_steps``. Raises ValueError when a schedule needs ``total_steps`` and it is unknown.
    """
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1), (epoch + 1) / (config.warmup_epochs + 1))
    return config.lr * warm * _schedule(config, step, epoch, total_steps)


def _schedule(config: OptimizerConfig, step: int, epoch: int, total_steps: int) -> float:
    if config.schedule is ScheduleKind.constant:
        return 1.0
    if config.schedule is ScheduleKind.exponential:
        return float(config.decay ** max(0, epoch - config.warmup_epochs))
    if total_steps <= 0:
        kind = config.schedule.name
        raise ValueError(f"the {kind} schedule needs the length of the run: set train.steps")
    if config.schedule is ScheduleKind.cosine:
        fall = _progress(step, config.warmup_steps, total_steps)
        return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * fall))
    fall = _progress(step, (1 - config.cooldown) * total_steps, total_steps)
    return 1 - (1 - config.final) * fall


def _progress(step: int, first: float, last: float) -> float:
    """Share of the way from ``first`` to ``last``, kept in [0, 1]."""
    return min(1.0, max(0.0, (step - first) / max(last - first, 1e-9)))


def set_learning_rates(
    optimizers: Mapping[str, Optimizer], config: RunConfig, step: int, epoch: int, total_steps: int = 0
) -> dict[str, float]:
    """Set the learning rates for this step, each group's at its own multiple; returns the rate of every optimizer."""
    rates = {name: learning_rate(section(config, name), step, epoch, total_steps) for name in optimizers}
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = rates[name] * group.get("rate", 1.0)
    return rates


# --- gradients ------------------------------------------------------------------------------------------------------
def clip_gradients(parameters: Iterable[nn.Parameter], limit: float = 0.0) -> Tensor:
    """Scale the gradients down to a global 2-norm of ``limit`` (0 = measure only); returns the norm before, a scalar.

    One fused norm on the device, no ``.item()``. A norm that is not finite is returned as it is; with a limit the
    gradients are then no longer usable, and the caller should not step.
    """
    learning = [p for p in parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in learning if p.grad is not None])
    if limit > 0 and learning:
        clip_grads_with_norm_(learning, limit, norm)
    return norm


# --- freezing -------------------------------------------------------------------------------------------------------
def freeze(system: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Stop the parameters that match a pattern from learning; returns their names.

    A pattern (fnmatch, case-sensitive) is held against the full name and against every module above it: ``enc_p.bert``
    and ``enc_*.bert`` take the whole module, ``dec.*`` all of ``dec``. A pattern that matches nothing is a ValueError.
    """
    names = dict(system.named_parameters())
    frozen: list[str] = []
    for pattern in patterns:
        hits = [name for name in names if any(fnmatchcase(part, pattern) for part in _prefixes(name))]
        if not hits:
            known = sorted({part for name in names for part in _prefixes(name)})
            close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.4)
            hint = f"; nearest: {', '.join(close)}" if close else f"; modules: {', '.join(_tops(names))}"
            raise ValueError(f"train.freeze: {pattern!r} matches no parameter{hint}")
        frozen += [name for name in hits if name not in frozen]
    for name in frozen:
        names[name].requires_grad_(False)
    return frozen


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _tops(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.split(".")[0] for name in names))


# --- moving average -------------------------------------------------------------------------------------------------
class Ema:
    """Exponential moving average of a module's parameters, in float32 (float64 stays); buffers are not averaged.

    With ``step`` given the decay is at most ``(1 + step) / (10 + step)``, so that the random start is forgotten early.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"train.ema must be between 0 and 1, got {decay}")
        self.decay = decay
        self._live = {n: p for n, p in module.named_parameters() if p.is_floating_point()}
        self._mean = {n: p.detach().to(_mean_dtype(p), copy=True) for n, p in self._live.items()}

    @torch.no_grad()
    def update(self, step: int | None = None) -> None:
        """Move the average towards the present parameters; once per training step."""
        decay = self.decay if step is None else min(self.decay, (1 + step) / (10 + step))
        means = list(self._mean.values())
        live = [self._live[name].detach().to(mean.dtype) for name, mean in self._mean.items()]
        torch._foreach_lerp_(means, live, 1 - decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The module holds the averaged parameters inside the block and its own again, bit for bit, after it."""
        held = {name: p.data for name, p in self._live.items()}
        for name, p in self._live.items():
            p.data = self._mean[name].to(p.dtype, copy=True)
        try:
            yield
        finally:
            for name, p in self._live.items():
                p.data = held[name]

    def state(self) -> dict[str, Tensor]:
        """Parameter name → averaged tensor (the live one: save it before the next update)."""
        return dict(self._mean)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over a saved average. A parameter it lacks keeps its present value; another shape is a ValueError."""
        for name, mean in self._mean.items():
            if name in state:
                if state[name].shape != mean.shape:
                    raise ValueError(f"average of {name}: saved {_shape(state[name])}, the model has {_shape(mean)}")
                mean.copy_(state[name])


def _mean_dtype(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype is torch.float64 else torch.float32


# --- state of the optimizers ----------------------------------------------------------------------------------------
def optimizer_state(optimizers: Mapping[str, Optimizer]) -> OptimizerState:
    """``{optimizer: {parameter name: {"step" | "exp_avg" | "exp_avg_sq" | "momentum_buffer": tensor on the CPU}}}``.

    Keyed by name, not by index, and without rates or betas (those come from the configuration). On the CPU these are
    the live tensors: write them out, or clone them, before the next step.
    """
    state: OptimizerState = {}
    for name, optimizer in optimizers.items():
        held = {n: optimizer.state[p] for n, p in _named(optimizer) if p in optimizer.state}
        state[name] = {n: {k: _tensor(v).detach().cpu() for k, v in s.items()} for n, s in held.items()}
    return state


def load_optimizer_state(optimizers: Mapping[str, Optimizer], state: Mapping[str, Any]) -> list[str]:
    """Put a saved state back, bit for bit; returns ``optimizer/parameter`` of all that start afresh instead.

    A network or parameter that the saved state does not know starts afresh; saved entries that nothing here wants are
    logged. A tensor of another shape is a ValueError that names the parameter.
    """
    fresh: list[str] = []
    for name, optimizer in optimizers.items():
        saved = state.get(name, {})
        named = dict(_named(optimizer))
        for parameter_name, parameter in named.items():
            optimizer.state.pop(parameter, None)
            if parameter_name in saved:
                entry = _placed(saved[parameter_name], f"{name}/{parameter_name}", parameter, optimizer)
                optimizer.state[parameter] = entry
            else:
                fresh.append(f"{name}/{parameter_name}")
        _tell_unused(name, [n for n in saved if n not in named])
    _tell_unused("all", [n for n in state if n not in optimizers])
    return fresh


def _named(optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["param_names"], group["params"], strict=True)


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(float(value))


def _placed(entry: Mapping[str, Tensor], name: str, parameter: nn.Parameter, optimizer: Optimizer) -> dict[str, Tensor]:
    """Copies of the saved tensors, on the parameter's device; the step count stays on the CPU unless AdamW is fused."""
    fused = any(group.get("fused") for group in optimizer.param_groups)
    placed = {}
    for key, value in entry.items():
        if key != "step" and value.shape != parameter.shape:
            raise ValueError(f"optimizer state {name}.{key}: saved {_shape(value)}, the model has {_shape(parameter)}")
        device = parameter.device if key != "step" or fused else torch.device("cpu")
        placed[key] = value.detach().to(device, copy=True)
    return placed


def _tell_unused(name: str, unused: list[str]) -> None:
    if unused:
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        log.warning("optimizer state (%s): saved entries not used here: %s%s", name, ", ".join(unused[:5]), more)


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
