"""Train the English letter-to-sound model of ``lalia.text.letters`` from the CMU dictionary and measure it.

    python tools/train_letters.py --out src/lalia/text/data/en_letters.npz

1. Letters and phones are aligned by expectation-maximisation (one letter emits no, one or two phones).
2. A small network learns the chunk of each letter from its context (see ``lalia.text.letters`` for the features).
3. The weights are stored in 8 bits; phone error rate and word accuracy are measured with that file on the 5 % of the
   words that training never saw (chosen by a hash of the word). A word is right when it equals any pronunciation of
   the dictionary.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections import Counter
from pathlib import Path

import numba
import numpy as np
import torch
from torch import nn

from lalia.text import letters
from lalia.text.lexicon import entries

PHONE_SETS = 40  # 39 ARPAbet phones without stress, 0 = none


def held_out(word: str) -> bool:
    """True for 5 % of the words, chosen by content so that the split never moves."""
    return hashlib.blake2b(word.encode(), digest_size=4).digest()[0] % 20 == 0


def usable() -> dict[str, list[list[str]]]:
    words: dict[str, list[list[str]]] = {}
    for word, phones in entries():
        if re.fullmatch("[a-z][a-z']*", word):
            words.setdefault(word, []).append(phones.split())
    return words


@numba.njit
def posteriors(word: np.ndarray, phones: np.ndarray, weights: np.ndarray, counts: np.ndarray) -> float:
    """Add the expected count of (letter, chunk) over all alignments to ``counts``; the word's probability comes back.

    ``weights`` [letters, 40, 40]: probability of the chunk (first, second), 0 = no phone.
    """
    rows, columns = len(word), len(phones)
    forward = np.zeros((rows + 1, columns + 1))
    backward = np.zeros((rows + 1, columns + 1))
    forward[0, 0] = 1.0
    backward[rows, columns] = 1.0
    for row in range(rows):
        for column in range(columns + 1):
            for size in range(min(2, columns - column) + 1):
                first = phones[column] if size > 0 else 0
                second = phones[column + 1] if size > 1 else 0
                forward[row + 1, column + size] += forward[row, column] * weights[word[row], first, second]
    total = forward[rows, columns]
    if total <= 0.0:
        return 0.0
    for row in range(rows - 1, -1, -1):
        for column in range(columns + 1):
            for size in range(min(2, columns - column) + 1):
                first = phones[column] if size > 0 else 0
                second = phones[column + 1] if size > 1 else 0
                after = weights[word[row], first, second] * backward[row + 1, column + size]
                backward[row, column] += after
                counts[word[row], first, second] += forward[row, column] * after / total
    return total


@numba.njit
def best_sizes(word: np.ndarray, phones: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Number of phones of each letter in the most probable alignment [len(word)]."""
    rows, columns = len(word), len(phones)
    score = np.zeros((rows + 1, columns + 1))
    choice = np.zeros((rows + 1, columns + 1), dtype=np.int64)
    score[0, 0] = 1.0
    for row in range(rows):
        for column in range(columns + 1):
            for size in range(min(2, columns - column) + 1):
                first = phones[column] if size > 0 else 0
                second = phones[column + 1] if size > 1 else 0
                value = score[row, column] * weights[word[row], first, second]
                if value > score[row + 1, column + size]:
                    score[row + 1, column + size] = value
                    choice[row + 1, column + size] = size
    sizes = np.zeros(rows, dtype=np.int64)
    column = columns
    for row in range(rows, 0, -1):
        sizes[row - 1] = choice[row, column]
        column -= choice[row, column]
    return sizes


def align(pairs: list[tuple[str, list[str]]], rounds: int = 8) -> list[list[str]]:
    """For each (word, phones): the chunk of every letter, phones of one chunk joined by ``+``; [] when it cannot be
    aligned.
    """
    names = sorted({phone.rstrip("012") for _, phones in pairs for phone in phones})
    ids = {name: index + 1 for index, name in enumerate(names)}
    coded = [
        (
            np.array([letters.LETTER_IDS[letter] for letter in word]),
            np.array([ids[phone.rstrip("012")] for phone in phones]),
        )
        for word, phones in pairs
    ]
    weights = np.full((len(letters.LETTERS), PHONE_SETS, PHONE_SETS), 0.1 / 1521)
    weights[:, :, 0] = 0.6 / 39
    weights[:, 0, 0] = 0.3
    for number in range(rounds):
        counts = np.full_like(weights, 1e-6)
        likelihood = sum(np.log(max(posteriors(word, phones, weights, counts), 1e-300)) for word, phones in coded)
        weights = counts / counts.sum(axis=(1, 2), keepdims=True)
        print(f"alignment round {number + 1}: log-likelihood per word {likelihood / len(coded):.3f}", flush=True)
    return [_chunks(phones, best_sizes(*code, weights)) for (_, phones), code in zip(pairs, coded, strict=True)]


def _chunks(phones: list[str], sizes: np.ndarray) -> list[str]:
    if int(sizes.sum()) != len(phones):
        return []
    ends = np.cumsum(sizes)
    return ["+".join(phones[end - size : end]) for end, size in zip(ends, sizes, strict=True)]


def features(word: str, chunks: list[int], names: list[str]) -> np.ndarray:
    """Teacher-forced rows of the feature table [len(word), features]."""
    history, state, past = (len(names),) * letters.HISTORY, 0, []
    for chunk in chunks:
        past.append(letters.past_features(history, state, len(names)))
        history, state = (chunk, *history[:-1]), letters.stress_state(state, names[chunk])
    return np.concatenate([letters.letter_features(word), np.array(past)], axis=1)


class Model(nn.Module):
    def __init__(self, rows: int, chunks: int, first: int, second: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(rows, first, mode="sum")
        nn.init.normal_(self.table.weight, std=0.15)
        self.hidden = nn.Linear(first, second)
        self.output = nn.Linear(second, chunks)
        self.dropout = nn.Dropout(0.1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.output(self.dropout(torch.relu(self.hidden(self.dropout(torch.relu(self.table(rows)))))))


def fit(inputs: torch.Tensor, targets: torch.Tensor, model: Model, epochs: int, batch: int = 1024) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    steps = epochs * (len(inputs) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(inputs))
        for start in range(0, len(inputs) - batch + 1, batch):
            chosen = order[start : start + batch]
            loss = nn.functional.cross_entropy(model(inputs[chosen].long()), targets[chosen].long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: cross-entropy {total / (len(inputs) // batch):.4f}", flush=True)


def quantized(name: str, weight: torch.Tensor) -> dict[str, np.ndarray]:
    """8-bit values with one scale per column."""
    values = weight.detach().numpy()
    scale = (np.abs(values).max(axis=0, keepdims=True) / 127).astype(np.float32)
    return {name: np.round(values / scale).astype(np.int8), name + "_scale": scale}


def save(path: Path, model: Model, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        "chunks": np.array(names),
        "hidden_bias": model.hidden.bias.detach().numpy(),
        "output_bias": model.output.bias.detach().numpy(),
        **quantized("table", model.table.weight),
        **quantized("hidden_weight", model.hidden.weight.T),
        **quantized("output_weight", model.output.weight.T),
    }
    np.savez_compressed(path, allow_pickle=False, **arrays)


def distance(one: list[str], two: list[str]) -> int:
    """Levenshtein distance of two phone sequences."""
    row = list(range(len(two) + 1))
    for index, left in enumerate(one):
        previous, row[0] = row[0], index + 1
        for column, right in enumerate(two):
            previous, row[column + 1] = (
                row[column + 1],
                min(row[column + 1] + 1, row[column] + 1, previous + (left != right)),
            )
    return row[-1]


def measure(words: dict[str, list[list[str]]], limit: int = 0) -> dict[str, float]:
    """Held-out error rates of the stored model, with and without stress; ``limit`` words, evenly spread, 0 = all."""
    chosen = [word for word in words if held_out(word)]
    chosen = [chosen[len(chosen) * index // limit] for index in range(limit)] if limit else chosen
    totals: Counter[str] = Counter()
    for word in chosen:
        found = letters.sound_out(word)
        for kind, strip in (("stressed", ""), ("plain", "012")):
            variants = [[phone.rstrip(strip) if strip else phone for phone in phones] for phones in words[word]]
            guess = [phone.rstrip(strip) if strip else phone for phone in found]
            error, size = min((distance(guess, variant), len(variant)) for variant in variants)
            totals[kind + " errors"] += error
            totals[kind + " phones"] += size
            totals[kind + " right"] += error == 0
    return {
        "words": len(chosen),
        "phone_error_rate": totals["plain errors"] / totals["plain phones"],
        "word_accuracy": totals["plain right"] / len(chosen),
        "phone_error_rate_with_stress": totals["stressed errors"] / totals["stressed phones"],
        "word_accuracy_with_stress": totals["stressed right"] / len(chosen),
    }


def training_set(words: dict[str, list[list[str]]]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    pairs = [(word, variants[0]) for word, variants in words.items() if not held_out(word)]
    aligned = align(pairs)
    counts = Counter(chunk for chunks in aligned for chunk in chunks)
    names = [name for name, count in counts.most_common() if count >= 25]
    ids = {name: index for index, name in enumerate(names)}
    kept = [
        (word, [ids[chunk] for chunk in chunks])
        for (word, _), chunks in zip(pairs, aligned, strict=True)
        if chunks and all(chunk in ids for chunk in chunks)
    ]
    print(f"{len(kept)} of {len(pairs)} words kept, {len(names)} chunks", flush=True)
    inputs = np.concatenate([features(word, chunks, names) for word, chunks in kept]).astype(np.int16)
    targets = np.concatenate([chunks for _, chunks in kept]).astype(np.int16)
    return torch.from_numpy(inputs), torch.from_numpy(targets), names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=letters.MODEL)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--measure-only", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(42)
    words = usable()
    if not options.measure_only:
        inputs, targets, names = training_set(words)
        rows = (2 * letters.REACH + 1) * len(letters.LETTERS) + letters.HISTORY * (len(names) + 1) + letters.STATES
        model = Model(rows, len(names), 256, 192)
        fit(inputs, targets, model, options.epochs)
        save(options.out, model.eval(), names)
    letters.MODEL = options.out
    for name, value in measure(words).items():
        print(f"{name}: {value:.4g}")
    print(f"file: {options.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
