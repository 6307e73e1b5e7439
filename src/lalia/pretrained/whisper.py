"""A frozen Whisper encoder as an ear: which of its hidden states are heard, and hearing clips of any length.

Legend: N clips, S samples at 16 kHz, T hidden frames (50 a second), C chosen layers, D width of the encoder.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lalia.mel import MelSpec, mel_filters
from lalia.nn.whisper import FRAME, HOP, N_FFT, RATE, WhisperEncoder
from lalia.pretrained.models import describe, load_whisper
from lalia.pretrained.sources import resolve
from lalia.sections import ExternalModel

log = logging.getLogger(__name__)

KIND = "whisper"
ENDS = 1 << 20  # bytes at both ends of a weights file that its fingerprint is made of
ENCODER_KEYS = (
    "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins", "max_source_positions",
    "activation_function", "dropout", "attention_dropout", "activation_dropout",
)  # fmt: skip


class Layers(Enum):
    """What of the encoder's hidden states is heard. State 0 is the input of the first layer, the last one has the final norm."""

    last = "last"
    index = "index"  # one state, numbered as above; negative numbers count from the end
    list = "list"  # several, side by side: C · D channels
    weighted = "weighted"  # a learnt softmax sum of several, of all where none are numbered


def describe_listener(
    source: ExternalModel,
    offline: bool = False,
    *,
    layers: Layers | str = Layers.last,
    numbers: Sequence[int] = (),
    trim: bool = False,
) -> dict[str, Any]:
    """What :class:`FrozenWhisper` needs to build the encoder of ``source`` without its weights: JSON data for a run folder.

    Raises:
        PretrainedError: the model cannot be had.
        ValueError: layer numbers that the model does not have, or of a count that does not go with ``layers``.
    """
    folder = resolve(source.source, KIND, offline, source.revision)
    if folder is None:
        settings = json.loads(load_whisper(source)[0].config.to_json_string())  # type: ignore[operator,union-attr]
        log.warning("the listener is %s: it hears at random, for trying things out only", describe(source))
    else:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        log.info("the listener is %s", describe(source))
    missing = [key for key in ENCODER_KEYS[:5] if key not in settings]
    if missing:
        raise ValueError(f"{describe(source)} is no Whisper: its config.json lacks {', '.join(missing)}")
    chosen = choose(Layers(layers), numbers, settings["encoder_layers"] + 1)
    return {
        "source": describe(source),
        "fingerprint": _fingerprint(folder) if folder is not None else describe(source),
        "config": {key: settings[key] for key in ENCODER_KEYS if key in settings},
        "layers": Layers(layers).value,
        "numbers": chosen,
        "trim": trim,
    }


def choose(layers: Layers, numbers: Sequence[int], count: int) -> list[int]:
    """Numbers of the states that are heard, from 0. ValueError when ``numbers`` and ``layers`` do not go together."""
    wrong = [number for number in numbers if not -count <= number < count]
    if wrong:
        raise ValueError(f"layer {wrong[0]}: this Whisper has the hidden states 0 … {count - 1}")
    found = [number % count for number in numbers]
    if len(set(found)) != len(found):
        raise ValueError(f"layer numbers {list(numbers)} name a layer twice")
    if layers is Layers.last:
        if numbers:
            raise ValueError("layers=last takes no layer numbers; use layers=index, list or weighted")
        return [count - 1]
    if layers is Layers.index and len(found) != 1:
        raise ValueError(f"layers=index takes one layer number, got {list(numbers)}")
    if layers is Layers.list and not found:
        raise ValueError(f"layers=list takes layer numbers of 0 … {count - 1}")
    return found or list(range(count))


def _fingerprint(folder: Path) -> str:
    """The same for the same weights wherever they lie: of the names, sizes and both ends of the weight files."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(p for pattern in ("*.safetensors", "pytorch_model*.bin") for p in folder.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name}|{size}|".encode())
        with open(path, "rb") as file:
            digest.update(file.read(ENDS))
            file.seek(max(0, size - ENDS))
            digest.update(file.read(ENDS))
    return digest.hexdigest()


class FrozenWhisper(nn.Module):
    """Clips → the chosen hidden states of their own frames. Frozen, and always in evaluation mode.

    Padded (``trim`` False) each clip is followed by silence up to 30 s, as Whisper was trained and as transformers does it; trimmed
    it is heard alone, several times faster, with other hidden states. Either way only the clip's own frames come out, a frame for
    each 20 ms begun, and they do not depend on what the clip is batched with. A clip of more than 30 s is heard in windows of 30 s.

    Args:
        description: as :func:`describe_listener` makes it.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        super().__init__()
        self.description = dict(description)
        settings = description["config"]
        spec = MelSpec(RATE, N_FFT, HOP, N_FFT, settings["num_mel_bins"])
        self.encoder = WhisperEncoder(settings, mel_filters(spec)).requires_grad_(False)
        self.layers, self.numbers = Layers(description["layers"]), list(description["numbers"])
        self.trim = bool(description["trim"])
        self.train(self.training)

    def train(self, mode: bool = True) -> FrozenWhisper:
        super().train(mode)
        self.encoder.eval()
        return self

    def load_external(self, source: ExternalModel, offline: bool = False) -> None:
        """Fill the encoder from ``source``, which its description was made of. PretrainedError when it cannot be had, ValueError
        when it is a Whisper of another size."""
        weights = load_whisper(source, offline)[0].model.encoder.state_dict()  # type: ignore[union-attr,operator]
        own = self.encoder.state_dict()
        wrong = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
        if wrong or weights.keys() - own.keys():
            name = (wrong or sorted(weights.keys() - own.keys()))[0]
            there = tuple(weights[name].shape) if name in weights else "none"
            here = tuple(own[name].shape) if name in own else "none"
            raise ValueError(f"{describe(source)} is not the Whisper this run was made with: {name} is {there} there, {here} here")
        self.encoder.load_state_dict(weights)

    @torch.no_grad()
    def hear(self, waves: Tensor, lengths: Tensor) -> list[Tensor]:
        """The part that never learns and may be kept: waves [N, S], lengths [N] → the chosen layers of each clip, [T_i, C, D]."""
        count = lengths.tolist()
        silent = [index for index, samples in enumerate(count) if samples < 1]
        if silent:
            raise ValueError(f"recording {silent[0] + 1} of {len(count)} has no samples")
        window = self.encoder.longest
        parts = [
            (row, start, min(window, samples - start)) for row, samples in enumerate(count) for start in range(0, samples, window)
        ]
        size = max(samples for _, _, samples in parts)
        batch = waves.new_zeros(len(parts), size)
        for index, (row, start, samples) in enumerate(parts):
            batch[index, :samples] = waves[row, start : start + samples]
        states, frames = self.encoder(batch, torch.tensor([part[2] for part in parts], device=waves.device), self.trim)
        chosen = torch.stack([states[number] for number in self.numbers], dim=2)
        found: list[list[Tensor]] = [[] for _ in count]
        for (row, _, _), values, own in zip(parts, chosen, frames.tolist(), strict=True):
            found[row].append(values[:own])
        return [torch.cat(pieces) for pieces in found]


def frames_of(samples: int) -> int:
    """Frames of a clip of so many samples at 16 kHz."""
    return -(-samples // FRAME)
