"""Letter-to-sound: the pronunciation of English words that no dictionary has.

Every letter emits a *chunk* of no, one or two phones. A small network scores the chunks of a letter from the letters
around it, the chunks emitted before it and the stress given so far; a beam search keeps the best sequence. The letters
and phones of the CMU dictionary were aligned by expectation-maximisation (Jiampojamarn et al. 2007, "Applying many-to-
many alignments …"). ``tools/train_letters.py`` made ``data/en_letters.npz`` (8-bit weights) and prints its held-out
error rates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

LETTERS = "_'abcdefghijklmnopqrstuvwxyz"  # "_" stands for beyond the end of the word
LETTER_IDS = {letter: index for index, letter in enumerate(LETTERS)}
REACH = 6  # letters of context on each side
HISTORY = 3  # earlier chunks that the network sees
STATES = 4  # stress so far: no vowel, unstressed vowels only, secondary, primary
MODEL = Path(__file__).parent / "data" / "en_letters.npz"


def stress_state(state: int, chunk: str) -> int:
    """The strongest stress seen so far (0 no vowel, 1 unstressed, 2 secondary, 3 primary) after one more chunk."""
    rank = {"0": 1, "2": 2, "1": 3}
    return max([state] + [rank[phone[-1]] for phone in chunk.split("+") if phone and phone[-1] in rank])


@dataclass(frozen=True)
class Network:
    """Weights. ``table`` [features, D1]: one row per (place, value); then two dense layers [D1, D2] and [D2, K]."""

    chunks: list[str]
    table: np.ndarray
    hidden_weight: np.ndarray
    hidden_bias: np.ndarray
    output_weight: np.ndarray
    output_bias: np.ndarray

    def log_probabilities(self, first: np.ndarray) -> np.ndarray:
        """Summed feature rows [N, D1] → log-probability of each chunk [N, K]."""
        hidden = np.maximum(np.maximum(first, 0) @ self.hidden_weight + self.hidden_bias, 0)
        scores = hidden @ self.output_weight + self.output_bias
        scores -= scores.max(axis=1, keepdims=True)
        return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def letter_features(word: str) -> np.ndarray:
    """Rows of the feature table for the letters around each letter of the word: int [len(word), 2 · REACH + 1]."""
    padded = np.array([0] * REACH + [LETTER_IDS[letter] for letter in word] + [0] * REACH)
    window = np.lib.stride_tricks.sliding_window_view(padded, 2 * REACH + 1)
    return window + np.arange(2 * REACH + 1) * len(LETTERS)


def past_features(history: tuple[int, ...], state: int, chunk_count: int) -> list[int]:
    """Rows of the feature table for the last HISTORY chunks (newest first; ``chunk_count`` = none yet) and the stress
    state.
    """
    base = (2 * REACH + 1) * len(LETTERS)
    rows = [base + place * (chunk_count + 1) + chunk for place, chunk in enumerate(history)]
    return [*rows, base + HISTORY * (chunk_count + 1) + state]


@lru_cache(maxsize=1)
def network() -> Network:
    """The shipped model, widened from 8 bits to float32."""
    with np.load(MODEL, allow_pickle=False) as stored:

        def widen(name: str) -> np.ndarray:
            return stored[name].astype(np.float32) * stored[name + "_scale"]

        return Network(
            [str(chunk) for chunk in stored["chunks"]],
            widen("table"),
            widen("hidden_weight"),
            stored["hidden_bias"],
            widen("output_weight"),
            stored["output_bias"],
        )


@dataclass(frozen=True)
class _Path:
    score: float
    history: tuple[int, ...]
    state: int
    phones: tuple[str, ...]


def _extend(path: _Path, chunk: int, score: float, name: str) -> _Path:
    phones = path.phones + tuple(phone for phone in name.split("+") if phone)
    return _Path(path.score + score, (chunk, *path.history[:-1]), stress_state(path.state, name), phones)


def search(model: Network, word: str, beam: int = 4) -> list[str]:
    """Best phones of a lower-case word of ``a-z'`` by beam search; linear in the length of the word."""
    count = len(model.chunks)
    around = model.table[letter_features(word)].sum(axis=1)
    paths = [_Path(0.0, (count,) * HISTORY, 0, ())]
    for place in range(len(word)):
        past = model.table[np.array([past_features(p.history, p.state, count) for p in paths])].sum(axis=1)
        scores = model.log_probabilities(around[place] + past)
        total = scores + np.array([[p.score] for p in paths], dtype=np.float32)
        best = np.argsort(total, axis=None)[::-1][:beam]
        paths = [
            _extend(paths[index // count], index % count, float(scores.flat[index]), model.chunks[index % count])
            for index in (int(flat) for flat in best)
        ]
    return list(paths[0].phones)


@lru_cache(maxsize=4096)
def _sound_out(word: str) -> tuple[str, ...]:
    phones = search(network(), word)
    vowels = [index for index, phone in enumerate(phones) if phone[-1].isdigit()]
    if vowels and not any(phones[index].endswith("1") for index in vowels):
        full = [index for index in vowels if not phones[index].endswith("0")] or vowels
        phones[full[0]] = phones[full[0]][:-1] + "1"
    return tuple(phones)


def sound_out(word: str) -> list[str]:
    """ARPAbet phones with stress for a lower-case word of ``a-z'``; empty when the letters give no vowel (then spell
    it).
    """
    phones = _sound_out(word)
    return list(phones) if any(phone[-1].isdigit() for phone in phones) else []
