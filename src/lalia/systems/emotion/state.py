"""State as data: what a dialogue has left behind, and the two updaters that carry it from turn to turn.

An updater keeps one row of state per stream (a dialogue, or a speaker in it). ``init`` makes rows, ``step`` takes them one turn
on, ``scan`` several turns at once; a loop of ``step`` equals ``scan``. A state is a dictionary of tensors ``[R, ...]``, R streams,
so that it can be cut from its graph, indexed and joined without knowing what is in it.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lalia.nn.mamba import MambaBlock, MambaState
from lalia.systems.emotion.config import StateConfig, StateKind

State = dict[str, Tensor]


def detach(state: State) -> State:
    return {name: value.detach() for name, value in state.items()}


def rows_of(state: State, index: Tensor) -> State:
    """The streams at ``index`` int64 [N]."""
    return {name: value[index] for name, value in state.items()}


def with_rows(state: State, index: Tensor, rows: State) -> State:
    """A state in which the streams at ``index`` [N] are ``rows``; the others, and ``state`` itself, are as they were."""
    return {name: value.index_copy(0, index, rows[name].to(value.dtype)) for name, value in state.items()}


def join(first: State, second: State) -> State:
    """The streams of one after those of the other."""
    return {name: torch.cat([value, second[name]]) for name, value in first.items()}


class Updater(nn.Module):
    """R streams of ``width`` channels in, the same out."""

    def init(self, streams: int) -> State:
        """The state before anything was said, for so many streams."""
        raise NotImplementedError

    def step(self, state: State, turn: Tensor) -> tuple[State, Tensor]:
        """``turn`` [R, W], one turn of every stream → (state after it, context [R, W] that includes it)."""
        raise NotImplementedError

    def scan(self, state: State, turns: Tensor, lengths: Tensor) -> tuple[State, Tensor]:
        """``turns`` [R, T, W], of which stream r has ``lengths[r]`` ≥ 0 → (state after each stream's last, contexts [R, T, W]).

        Contexts beyond a stream's length mean nothing.
        """
        raise NotImplementedError


class EmaUpdater(Updater):
    """s_t = α s_{t−1} + (1 − α) u_t with u_t an MLP of the turn; α in (0, 1) and s_0 are learnt by channel.

    The decays start spread evenly in log (1 − α), so that some channels forget in a turn or two and others hardly at all.
    """

    def __init__(self, width: int, alpha_low: float, alpha_high: float) -> None:
        super().__init__()
        self.update = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        forget = torch.logspace(torch.tensor(1 - alpha_low).log10(), torch.tensor(1 - alpha_high).log10(), width)
        self.decay = nn.Parameter(torch.logit(1 - forget))
        self.start = nn.Parameter(torch.zeros(width))
        self.decay._no_weight_decay = True  # type: ignore[attr-defined]  # pulling it to 0 would pull every α to a half

    def init(self, streams: int) -> State:
        return {"ema": self.start.expand(streams, -1)}

    def step(self, state: State, turn: Tensor) -> tuple[State, Tensor]:
        alpha = torch.sigmoid(self.decay)
        value = alpha * state["ema"] + (1 - alpha) * self.update(turn)
        return {"ema": value}, value

    def scan(self, state: State, turns: Tensor, lengths: Tensor) -> tuple[State, Tensor]:
        alpha, updates, value = torch.sigmoid(self.decay), self.update(turns), state["ema"]
        contexts = []
        for index in range(turns.shape[1]):
            later = alpha * value + (1 - alpha) * updates[:, index]
            value = torch.where((index < lengths)[:, None], later, value)
            contexts.append(value)
        return {"ema": value}, torch.stack(contexts, 1) if contexts else turns


class _Layer(nn.Module):
    def __init__(self, width: int, config: StateConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.block = MambaBlock(
            width,
            state=config.mamba_state,
            kernel=config.mamba_kernel,
            expand=config.mamba_expand,
            backend=config.mamba_backend,
        )


class MambaUpdater(Updater):
    """Residual Mamba blocks (Gu and Dao 2023) over the turns of each stream."""

    def __init__(self, width: int, config: StateConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(width, config) for _ in range(config.mamba_layers))
        self.out = nn.LayerNorm(width)

    def _layers(self) -> list[_Layer]:
        return cast("list[_Layer]", list(self.layers))

    def init(self, streams: int) -> State:
        parameter = self.out.weight
        state: State = {}
        for number, layer in enumerate(self._layers()):
            made = layer.block.init(streams, parameter.device, parameter.dtype)
            state |= {f"conv{number}": made.conv, f"ssm{number}": made.ssm}
        return state

    def step(self, state: State, turn: Tensor) -> tuple[State, Tensor]:
        after: State = {}
        for number, layer in enumerate(self._layers()):
            change, kept = layer.block.step(layer.norm(turn), MambaState(state[f"conv{number}"], state[f"ssm{number}"]))
            turn = turn + change
            after |= {f"conv{number}": kept.conv, f"ssm{number}": kept.ssm}
        return after, self.out(turn)

    def scan(self, state: State, turns: Tensor, lengths: Tensor) -> tuple[State, Tensor]:
        after: State = {}
        for number, layer in enumerate(self._layers()):
            before = MambaState(state[f"conv{number}"], state[f"ssm{number}"])
            change, kept = layer.block(layer.norm(turns), before, lengths)
            turns = turns + change
            after |= {f"conv{number}": kept.conv, f"ssm{number}": kept.ssm}
        return after, self.out(turns)


def make_updater(width: int, config: StateConfig) -> Updater:
    """The updater of ``config.kind``, which is not ``none``."""
    if config.kind is StateKind.ema:
        return EmaUpdater(width, config.alpha_low, config.alpha_high)
    return MambaUpdater(width, config)


class Streams:
    """Which turn belongs to which stream: turns ``[B, T]`` of B dialogues as sequences of S streams, and back.

    Args:
        stream: int64 [B, T], the stream of each turn.
        valid: bool [B, T].
        count: S. A stream's turns all come from one dialogue and keep their order.
    """

    def __init__(self, stream: Tensor, valid: Tensor, count: int) -> None:
        chosen = functional.one_hot(stream, count) * valid[..., None]  # [B, T, S]
        place = (chosen.cumsum(1) * chosen).sum(-1) - 1  # the how-maniest of its stream
        self.lengths = chosen.sum((0, 1))
        self.shape, self.longest = (count, int(self.lengths.max()) if count else 0), int(self.lengths.max()) if count else 0
        self.valid = valid
        self.flat = (stream * max(1, self.longest) + place)[valid]  # position in [S · longest] of each valid turn

    def gather(self, turns: Tensor) -> Tensor:
        """[B, T, W] → [S, longest, W], zeros where a stream has fewer turns."""
        wide = turns.new_zeros(self.shape[0] * max(1, self.longest), turns.shape[-1])
        return wide.index_copy(0, self.flat, turns[self.valid]).view(self.shape[0], -1, turns.shape[-1])

    def scatter(self, sequences: Tensor) -> Tensor:
        """[S, longest, W] → [B, T, W], zeros at turns that are not valid."""
        back = sequences.flatten(0, 1)[self.flat]
        out = sequences.new_zeros(*self.valid.shape, sequences.shape[-1])
        return out.masked_scatter(self.valid[..., None], back)
