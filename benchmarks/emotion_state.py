"""Does state pay? Simulated dialogues, five seeds: no state, EMA and Mamba, on labels that need history and on labels that need
none; and scheduled sampling against teacher forcing for a model that hears its own answers.

Everything but ``model.state`` is the same. The corpus (``lalia prepare dialogues``) is made in ``data/dialogues`` if it is not
there; the whole takes about half an hour on one core. Each figure is the CCC of the whole test set, mean over the two
dimensions, then the mean over seeds with its 95 % interval (Student's t).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lalia import checkpoint
from lalia.config import load_run_config
from lalia.data import Corpus, Row
from lalia.dialogues import group_rows
from lalia.features import egemaps_of, egemaps_store, extract, recordings
from lalia.nn.ccc import Moments
from lalia.train import train

ROOT = Path(__file__).resolve().parents[1]
CORPUS = Path(os.environ.get("LALIA_DIALOGUES", ROOT / "data" / "dialogues"))
SEEDS = range(5)
T_95 = 2.776  # two-sided 95 % of Student's t with four degrees of freedom
LABELS = {"history": "[valence, arousal]", "now": "[valence_now, arousal_now]"}
STATES = {
    "stateless": ["model.state.kind=none", "data.batch_size=64"],
    "ema": ["model.state.kind=ema"],
    "mamba": ["model.state.kind=mamba"],
}
HEARS_ITSELF = ["model.state.kind=mamba", "model.autoregressive=true"]
FEEDBACK = {
    "teacher_forcing": [*HEARS_ITSELF, "sampling.start=1", "sampling.end=1"],
    "scheduled_sampling": [*HEARS_ITSELF, "sampling.start=1", "sampling.end=0", "sampling.steps=150"],
}
Scores = dict[str, list[float]]


def run() -> dict[str, dict[str, Any]]:
    prepare()
    test = group_rows(Corpus.read([CORPUS / "test.jsonl"]))
    variants: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for label, dimensions in LABELS.items():
            for state, options in STATES.items():
                scores = [score(fit(Path(scratch), [f"labels.dimensions={dimensions}", *options], seed), test) for seed in SEEDS]
                variants[f"{label}/{state}"] = interval(scores)
        for name, options in FEEDBACK.items():
            systems = [fit(Path(scratch), [f"labels.dimensions={LABELS['history']}", *options], seed) for seed in SEEDS]
            own, told = ([score(system, test, feedback) for system in systems] for feedback in ("own", "labels"))
            variants[f"{name}/own_answers"], variants[f"{name}/true_labels"] = interval(own), interval(told)
            variants[f"{name}/gap"] = interval([b - a for a, b in zip(own, told, strict=True)])
    return {"emotion_state": {"variants": variants, "seeds": len(SEEDS), "note": note(variants)}}


def prepare() -> None:
    if not (CORPUS / "test.jsonl").is_file():
        from lalia.corpora import prepare

        prepare("dialogues", CORPUS)
    heard = extract(recordings([CORPUS / "test.jsonl"]), egemaps_store(CORPUS / "features" / "egemaps"), egemaps_of)
    if heard.failed:
        raise SystemExit(f"{len(heard.failed)} test turns could not be heard, the first: {heard.failed[0]}")


def fit(scratch: Path, options: Sequence[str], seed: int) -> Any:
    """The best checkpoint, by validation, of a run of ``configs/emotion/tiny.yaml`` with ``options``."""
    folder = tempfile.mkdtemp(dir=scratch)
    manifests = [f"data.{part}=[{CORPUS / f'{part}.jsonl'}]" for part in ("train", "valid")]
    fixed = ["data.workers=0", "train.device=cpu", "train.threads=1", "train.save_every=0", f"train.seed={seed}"]
    train(load_run_config(ROOT / "configs" / "emotion" / "tiny.yaml", [*manifests, *fixed, *options]), folder)
    return checkpoint.load(folder, which="best")


def score(system: Any, test: Sequence[Sequence[Row]], feedback: str = "own") -> float:
    moments = Moments(len(system.dimensions), shift=3.0)
    for rows, answers in zip(test, system.recognize_emotion(test, feedback=feedback), strict=True):
        said = torch.tensor([[answer.values[name] for name in system.dimensions] for answer in answers])
        moments.add(said, torch.tensor([[row.labels[name] for name in system.dimensions] for row in rows]))
    return float(moments.ccc().mean())


def interval(scores: Sequence[float]) -> dict[str, float]:
    mean, half = float(np.mean(scores)), T_95 * float(np.std(scores, ddof=1)) / len(scores) ** 0.5
    return {"mean": round(mean, 4), "low": round(mean - half, 4), "high": round(mean + half, 4)}


def note(variants: dict[str, dict[str, float]]) -> str:
    def shown(name: str) -> str:
        return "{mean:.3f} ({low:.3f}–{high:.3f})".format(**variants[name])

    parts = [f"{label}: " + ", ".join(f"{state} {shown(f'{label}/{state}')}" for state in STATES) for label in LABELS]
    parts += [f"{name}: own answers {shown(f'{name}/own_answers')}, gap {shown(f'{name}/gap')}" for name in FEEDBACK]
    return "test CCC, 95 % interval over seeds. " + "; ".join(parts)
