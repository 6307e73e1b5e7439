"""Cross-validation: one run per fold of a prepared corpus, each judged on its own test part, and all of them together.

The folds of a folder are ``FOLDER/fold*/{train,valid,test}.jsonl``. Nothing is trained before every fold is proved to be free of
leaks. The mean over folds says how much runs differ; the pooled figure is the CCC over all folds' predictions at once, which is
not that mean.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lalia import checkpoint, dist
from lalia.config import ConfigError, load_run_config, to_yaml
from lalia.crossval_report import text_table, write_crossval_report
from lalia.data import Corpus, ManifestError
from lalia.evaluate.agreement import Agreement, Pair
from lalia.evaluate.emotion import SPEAKER_DEPENDENT, LeakError, RunData, check_leaks, evaluate_emotion
from lalia.evaluate.emotion_report import write_emotion_report
from lalia.evaluate.emotion_results import EmotionEvaluation
from lalia.evaluate.results import Better, Figure, write_json
from lalia.runfolder import write_atomic
from lalia.sections import RunConfig
from lalia.system import system_class
from lalia.train import train

__all__ = ["CrossValidation", "Fold", "Interrupted", "audit_folds", "crossval", "folds_of", "pooled", "summarise", "text_table"]

log = logging.getLogger(__name__)

FINISHED = "finished.json"
BEGUN = "manifests.sha256"  # of the rows that the run began with
PARTS = ("train", "valid", "test")
SCHEMA = "crossval-1"


class Interrupted(RuntimeError):
    """A fold was stopped by the user; it is saved, and the same command goes on."""


@dataclass(frozen=True)
class Fold:
    """The three manifests of one fold."""

    name: str
    train: Path
    valid: Path
    test: Path


@dataclass
class CrossValidation:
    """``folds``: name → figures of that fold; ``figures``: mean and sample standard deviation over folds (``fold_mean.…``,
    ``fold_sd.…``), and the CCC of all folds' predictions at once (``pooled.…``, with bootstrap intervals over dialogues)."""

    system: str
    folds: dict[str, list[Figure]]
    figures: list[Figure]
    dimensions: list[str]
    mark: str = ""
    audit: dict[str, dict[str, str]] = field(default_factory=dict)
    skipped: dict[str, dict[str, str]] = field(default_factory=dict)
    schema: str = SCHEMA

    def figure(self, name: str) -> Figure | None:
        return next((figure for figure in self.figures if figure.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        record = asdict(self)
        record["folds"] = {name: [f.to_dict() for f in figures] for name, figures in self.folds.items()}
        record["figures"] = [f.to_dict() for f in self.figures]
        return {"schema": record.pop("schema"), **record}


# --- folds ----------------------------------------------------------------------------------------------------------
def folds_of(folder: str | Path) -> list[Fold]:
    """The folds of a prepared corpus in the order of their numbers; ManifestError for fewer than two, or missing parts."""
    root = Path(folder)
    found = sorted((path for path in root.glob("fold*") if path.is_dir()), key=_numbered)
    if len(found) < 2:
        there = f"{len(found)} in {root}" if root.is_dir() else f"no folder {root}"
        raise ManifestError(f"cross-validation needs at least two folders fold1, fold2 …: {there} (see `lalia prepare iemocap`)")
    missing = [str(path / f"{part}.jsonl") for path in found for part in PARTS if not (path / f"{part}.jsonl").is_file()]
    if missing:
        raise ManifestError(f"folds are not whole: no {', '.join(missing[:5])}")
    return [Fold(path.name, *(path / f"{part}.jsonl" for part in PARTS)) for path in found]


def _numbered(path: Path) -> tuple[int, str]:
    digits = re.findall(r"\d+", path.name)
    return (int(digits[-1]) if digits else 0, path.name)


def audit_folds(folds: Sequence[Fold], allow: bool = False) -> dict[str, dict[str, str]]:
    """What train, and valid, share with test in each fold, in words. LeakError with every fold that leaks, unless ``allow``;
    ManifestError when a row is tested in two folds, because pooled figures would count it twice."""
    words: dict[str, dict[str, str]] = {}
    tested: dict[str, str] = {}
    fatal: list[str] = []
    for fold in folds:
        test = Corpus.read([fold.test], max_bad_fraction=1.0)
        twice = next((row for row in test.column("id") if row in tested), None)
        if twice is not None:
            raise ManifestError(f"row {twice!r} is tested in {tested[twice]} and in {fold.name}: folds must not share test rows")
        tested.update(dict.fromkeys(test.column("id"), fold.name))
        data = RunData(Corpus.read([fold.train], max_bad_fraction=1.0), Corpus.read([fold.valid], max_bad_fraction=1.0))
        try:
            found = check_leaks(data, test, allow)
        except LeakError as error:
            fatal.append(f"{fold.name}: {error}")
            continue
        words[fold.name] = {name: leaks.text() for name, leaks in found.items()}
    if fatal:
        raise LeakError("\n".join(fatal))
    return words


# --- runs -----------------------------------------------------------------------------------------------------------
def crossval(
    source: Path,
    overrides: Sequence[str],
    folder: Path,
    run: Path,
    *,
    allow_leaks: bool = False,
    which: str = "best",
    seed: int = 0,
    say: Callable[[str], None] = log.info,
) -> CrossValidation:
    """Train ``run/<fold>`` for each fold of ``folder`` (a finished one is not trained again), evaluate, and write
    ``run/crossval.json`` and ``run/crossval.html``.

    Args:
        source: configuration file; its manifests are those of the fold.
        which: checkpoint of each run that is judged.
        say: is told what is being done.

    Raises:
        LeakError, ManifestError: see :func:`audit_folds` and :func:`folds_of`; before anything is trained.
        Interrupted: a fold was stopped.
    """
    _refuse(source, overrides)
    folds = folds_of(folder)
    words = audit_folds(folds, allow_leaks)
    configs = {fold.name: fold_config(source, overrides, fold, folder) for fold in folds}
    evaluations: dict[str, EmotionEvaluation] = {}
    for fold in folds:
        fit_fold(configs[fold.name], run / fold.name, source, say)
        evaluations[fold.name] = _judge(fold, configs[fold.name], run / fold.name, which, allow_leaks, seed)
        say(f"{fold.name}: " + ", ".join(f"{f.name} {f.value:.3f}" for f in _headline(evaluations[fold.name])))
    result = summarise(evaluations, seed)
    result.audit = words
    write_json(run / "crossval.json", result.to_dict())
    write_crossval_report(run / "crossval.html", result)
    return result


def _refuse(source: Path, overrides: Sequence[str]) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("crossval trains one fold after the other in one process; train single folds with torchrun … lalia train")
    given = [item for item in overrides if item.startswith(("data.train=", "data.valid="))]
    if given:
        raise ConfigError(f"{given[0]}: the manifests are those of each fold")
    system = load_run_config(source, overrides).system
    if not hasattr(system_class(system), "recognize_emotion"):
        raise ConfigError(f"crossval is for systems that recognise emotion, and {system!r} does not")


def fold_config(source: Path, overrides: Sequence[str], fold: Fold, folder: Path) -> RunConfig:
    """The configuration of one fold's run. Folds share the feature folder ``FOLDER/features`` unless it names one."""
    manifests = [f"data.train={json.dumps([str(fold.train)])}", f"data.valid={json.dumps([str(fold.valid)])}"]
    config = load_run_config(source, [*overrides, *manifests])
    if getattr(config["data"], "features", None) == "":
        config = load_run_config(source, [*overrides, *manifests, f"data.features={folder / 'features'}"])
    return config


def fit_fold(config: RunConfig, run: Path, source: Path, say: Callable[[str], None]) -> None:
    """Train, or go on, unless this configuration was trained to its end here.

    Raises Interrupted when the user stops it, ConfigError when the folds were made anew since the run began: its weights may have
    learnt what is tested now.
    """
    rows, begun = _manifests(config), run / BEGUN
    if begun.is_file() and begun.read_text(encoding="utf-8").strip() != rows:
        raise ConfigError(f"{run} was trained on other manifests than {run.name} has now: delete it, or name another with -m")
    run.mkdir(parents=True, exist_ok=True)
    write_atomic(begun, rows + "\n")
    digest = hashlib.sha256(to_yaml(config).encode()).hexdigest()
    mark = run / FINISHED
    if mark.is_file() and json.loads(mark.read_text(encoding="utf-8")).get("config") == digest:
        say(f"{run.name}: trained before")
        return
    say(f"{run.name}: training in {run}")
    counters = train(config, run, source)
    if counters.interrupted:
        raise Interrupted(f"stopped in {run.name} at step {counters.step}, saved in {run}")
    write_atomic(mark, json.dumps({"config": digest, "step": counters.step}) + "\n")


def _manifests(config: RunConfig) -> str:
    """A digest of what the manifests of training and validation say."""
    total = hashlib.sha256()
    for path in (*config["data"].train, *config["data"].valid):
        total.update(Path(path).read_bytes())
    return total.hexdigest()


def _judge(fold: Fold, config: RunConfig, run: Path, which: str, allow_leaks: bool, seed: int) -> EmotionEvaluation:
    system = checkpoint.load(run, str(dist.choose_device(config.train.device)), which)
    system.for_inference()
    found = (checkpoint.best_set(run) if which == "best" else None) or checkpoint.latest_set(run)
    evaluation = evaluate_emotion(
        system,
        Corpus.read([fold.test]),
        RunData.of(config),
        out=run,
        allow_leaks=allow_leaks,
        few_shot=False,
        seed=seed,
        label=f"{fold.name}, step {found.step}" if found else fold.name,
    )
    write_emotion_report(run / "report.html", evaluation, run)
    return evaluation


# --- the table ------------------------------------------------------------------------------------------------------
def _headline(evaluation: EmotionEvaluation) -> list[Figure]:
    return [f for f in evaluation.figures if f.name.startswith("ccc.") and f.name.count(".") == 1]


def summarise(evaluations: dict[str, EmotionEvaluation], seed: int = 0) -> CrossValidation:
    """Figures of each fold, their mean ± sd, and pooled figures over all folds' predictions."""
    first = next(iter(evaluations.values()))
    mark = SPEAKER_DEPENDENT if any(e.mark for e in evaluations.values()) else ""
    folds = _all_turns({name: [f for f in e.figures if f.name in _names(first.dimensions)] for name, e in evaluations.items()})
    names = list(dict.fromkeys(f.name for figures in folds.values() for f in figures))
    figures = [figure for name in names for figure in _over_folds(name, folds, mark)]
    figures += pooled(evaluations, first.dimensions, mark, seed)
    skipped = {name: e.skipped for name, e in evaluations.items() if e.skipped}
    return CrossValidation(first.system, folds, figures, first.dimensions, mark, skipped=skipped)


def _names(dimensions: Sequence[str]) -> list[str]:
    return [f"ccc.{name}{suffix}" for suffix in ("", ".all") for name in (*dimensions, "mean")]


def _all_turns(folds: dict[str, list[Figure]]) -> dict[str, list[Figure]]:
    """Where some fold has figures over all turns besides its headline, those of the others are their headline."""
    if not any(f.name.endswith(".all") for figures in folds.values() for f in figures):
        return folds
    completed = {}
    for fold, figures in folds.items():
        there = any(f.name.endswith(".all") for f in figures)
        completed[fold] = figures if there else figures + [replace(f, name=f"{f.name}.all") for f in figures]
    return completed


def _over_folds(name: str, folds: dict[str, list[Figure]], mark: str) -> list[Figure]:
    """Mean over folds and their sample standard deviation; ``n`` is the number of folds."""
    values = np.array([f.value for figures in folds.values() for f in figures if f.name == name and math.isfinite(f.value)])
    mean = float(values.mean()) if len(values) else math.nan
    deviation = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    name = name.removeprefix("ccc.")
    notes = [text for text in (mark, "over folds, n is their number") if text]
    note = "; ".join([*notes, "a mean of CCCs is not the CCC of all"])
    return [
        Figure(f"fold_mean.{name}", mean, math.nan, math.nan, len(values), "", Better.higher, note),
        Figure(f"fold_sd.{name}", deviation, math.nan, math.nan, len(values), "", Better.lower, "; ".join(notes)),
    ]


def pooled(evaluations: dict[str, EmotionEvaluation], dimensions: Sequence[str], mark: str, seed: int) -> list[Figure]:
    """CCC over all folds' predictions at once, over clean turns and, where that differs, over all."""
    turns = [turn for evaluation in evaluations.values() for turn in evaluation.turns if turn.truth]
    clean = [turn for turn in turns if turn.clean]
    figures = []
    for suffix, chosen in (("", clean), (".all", turns)):
        if chosen and (not suffix or len(clean) != len(turns)):
            agreement = Agreement(dimensions, [Pair(t.dialogue, t.predicted, t.truth) for t in chosen])
            figures += agreement.figures(suffix, "; ".join(p for p in (mark, "all folds' predictions at once") if p), seed, ["ccc"])
    return [replace(f, name=f"pooled.{f.name.removeprefix('ccc.')}") for f in figures]
