"""An honest evaluation of any system that recognises emotion, on the dialogues of a test corpus.

Before anything is measured, the manifests of the run are held against the test corpus: figures of a test set that shares a
speaker, session, dialogue or row with training are refused, or marked when they are asked for all the same. Where scripted
sentences of the test were also trained on, the headline is over the other turns. CCC is over all turns at once: a mean over
batches or dialogues is not the CCC of the set.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from lalia.data import BadRow, Corpus, ManifestError, Row
from lalia.dialogues import dialogues as group
from lalia.evaluate import emotion_pictures
from lalia.evaluate.agreement import Agreement, Pair
from lalia.evaluate.emotion_results import CALIBRATION, EmotionEvaluation, TurnResult
from lalia.evaluate.machine import machine
from lalia.leaks import Leaks, audit, clean_rows
from lalia.loader import usable
from lalia.sections import DataConfig, RunConfig
from lalia.system import Emotion, RecognizesEmotion

log = logging.getLogger(__name__)

SHOTS = (0, 1, 3, 5, 10)
MIN_SCORED = 20  # few-shot: fewer turns than this say nothing
BLOCK = 8  # dialogues given to the system at once
ROW_ERRORS = (ValueError, OSError)
SPEAKER_DEPENDENT = "SPEAKER-DEPENDENT: test and training share speakers, sessions, dialogues or rows"
UNAUDITED = "NOT AUDITED: the training manifests are not known"


class LeakError(ValueError):
    """The test set crosses with training. The message names what is in both."""


@dataclass
class RunData:
    """The manifests that a run learnt from, ``train``, and chose its best checkpoint by, ``valid``. None: not known."""

    train: Corpus | None = None
    valid: Corpus | None = None

    @classmethod
    def of(cls, config: RunConfig, train: Sequence[str | Path] = (), tolerant: bool = False) -> RunData:
        """The manifests named in the configuration of a run; ``train`` where those of training are now.

        ManifestError when one cannot be read; ``tolerant`` turns that into a warning and None, as does a given ``train`` for the
        validation manifests, which are then likely to have moved too.
        """
        data = config["data"]
        return cls(_read(train or data.train, "training", tolerant), _read(data.valid, "validation", tolerant or bool(train)))


def _read(paths: Sequence[str | Path], what: str, tolerant: bool) -> Corpus | None:
    if not paths:
        return None
    try:
        return Corpus.read(paths, max_bad_fraction=1.0)
    except ManifestError as error:
        if tolerant:
            log.warning("the %s manifests cannot be read, so nothing is proved about leaks: %s", what, error)
            return None
        hint = "name the training manifests with --train, or --allow-leaks for figures that are marked"
        what = f"the {what} manifests of this run cannot be read, so leaks cannot be ruled out"
        raise ManifestError(f"{what} ({error}); {hint}") from error


def check_leaks(data: RunData, test: Corpus, allow: bool = False) -> dict[str, Leaks]:
    """``train`` and ``valid`` → what they share with ``test``. LeakError when that is fatal, or unknown, unless ``allow``."""
    known = {"train": data.train, "valid": data.valid}
    found = {name: audit(corpus, test) for name, corpus in known.items() if corpus is not None}
    fatal = [f"{name} and test: {leaks.text()}" for name, leaks in found.items() if leaks.fatal]
    if data.train is None:
        fatal.append("the training manifests are not known, so nothing can be proved")
    if fatal and not allow:
        hint = "Use a split without crossings (`lalia prepare` makes them), or --allow-leaks: every figure is then marked"
        raise LeakError("the test set is not independent of training.\n" + "\n".join(fatal) + f"\n{hint}")
    for line in fatal:
        log.warning("%s", line)
    return found


def evaluate_emotion(
    system: Any,
    test: Corpus,
    data: RunData,
    *,
    out: str | Path,
    allow_leaks: bool = False,
    few_shot: bool = True,
    feedback: bool = True,
    seed: int = 0,
    label: str = "",
    progress: bool = True,
) -> EmotionEvaluation:
    """Measure ``system`` on the dialogues of ``test`` and write ``out/eval.json`` and ``out/eval/calibration.png``.

    Args:
        data: what the run learnt from, for the audit.
        few_shot: also measure adaptation by the first k labelled turns of each speaker of a dialogue.
        feedback: also measure an autoregressive system with the true previous labels, which no use of it can have.

    Raises:
        LeakError: the test set crosses with training and ``allow_leaks`` is not set.
        ManifestError: no usable row, or turns of a dialogue without an order.
        ValueError: the system cannot recognise emotion, no turn has a label, or a prediction is not finite.
    """
    if not isinstance(system, RecognizesEmotion):
        raise ValueError(f"{type(system).__name__} cannot recognise emotion")
    started = time.monotonic()
    leaks = check_leaks(data, test, allow_leaks)
    job = _Job(system, test, seed, progress, _mark(data, leaks))
    job.find_clean(data)
    job.predict_all()
    if not any(turn.truth for turn in job.turns):
        raise ValueError(f"no turn of the test set has a label of {', '.join(system.dimensions)}")
    figures = job.headline()
    shots = job.few_shot(figures) if few_shot else {}
    if feedback and getattr(system, "autoregressive", False):
        figures += job.feedback()
    parameters = system.parameters() if hasattr(system, "parameters") else ()
    evaluation = EmotionEvaluation(
        system=getattr(getattr(system, "config", None), "system", "") or type(system).__name__,
        dimensions=list(system.dimensions),
        figures=figures,
        turns=job.turns,
        mark=job.mark,
        leaks={name: found.to_dict() for name, found in leaks.items()},
        audit={name: found.text() for name, found in leaks.items()},
        notes=job.notes,
        few_shot=shots,
        skipped=job.skipped,
        label=label,
        machine=machine(),
        parameters=sum(p.numel() for p in parameters),
        seed=seed,
        corpus_rows=len(test) + len(test.rejected),
        seconds=round(time.monotonic() - started, 2),
    )
    evaluation.save(Path(out) / "eval.json")
    emotion_pictures.write_calibration(Path(out) / CALIBRATION, evaluation)
    return evaluation


def _mark(data: RunData, leaks: dict[str, Leaks]) -> str:
    if any(found.fatal for found in leaks.values()):
        return SPEAKER_DEPENDENT
    return UNAUDITED if data.train is None else ""


@dataclass
class _Job:
    system: RecognizesEmotion
    test: Corpus
    seed: int
    progress: bool
    mark: str
    clean: set[str] = field(default_factory=set)
    dialogues: list[list[Row]] = field(default_factory=list)
    turns: list[TurnResult] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def find_clean(self, data: RunData) -> None:
        """Ids of turns whose scripted sentence was not trained on; all where none or nothing would be left."""
        ids = self.test.column("id")
        kept = range(len(ids)) if data.train is None else clean_rows(data.train, self.test)
        self.clean = {ids[index] for index in kept} or set(ids)
        if not len(kept):
            self.notes.append("Every sentence of the test was also trained on: the figures are over sentences the model has heard.")

    def predict_all(self) -> None:
        """Predictions of every turn that can be heard; the rest is listed with its reason."""
        rows, rejected = usable(self.system, self.test, DataConfig(max_bad_fraction=0.5))  # type: ignore[arg-type]
        for row in rejected:
            self.skip(*row)
        dialogues = [[rows[i] for i in turns] for turns in group(rows)]
        answers = recognise(self.system, dialogues, self.skip, progress=self.progress)
        self.dialogues = [dialogue for dialogue, answer in zip(dialogues, answers, strict=True) if answer is not None]
        given = [answer for answer in answers if answer is not None]
        self.turns = [
            self._turn(row, said.values)
            for dialogue, answer in zip(self.dialogues, given, strict=True)
            for row, said in zip(dialogue, answer, strict=True)
        ]
        self._count_clipped()

    def skip(self, row: str, reason: str) -> None:
        self.skipped[row] = reason
        log.warning("%s is left out of the evaluation: %s", row, reason)

    def _turn(self, row: Row, values: dict[str, float]) -> TurnResult:
        truth = {name: row.labels[name] for name in self.system.dimensions if name in row.labels}
        return TurnResult(row.id, row.dialogue or row.id, row.turn, row.speaker, dict(values), truth, row.id in self.clean)

    def _count_clipped(self) -> None:
        """Labels outside the scale count as its end, as in training."""
        scale = getattr(getattr(self.system, "config", None), "labels", None)
        if scale is None:
            return
        outside = 0
        for turn in self.turns:
            clipped = {name: min(max(value, scale.low), scale.high) for name, value in turn.truth.items()}
            outside += clipped != turn.truth
            turn.truth = clipped
        if outside:
            self.notes.append(f"{outside} turns have a label outside {scale.low:g} … {scale.high:g}: it counts as that end.")

    # --- figures ----------------------------------------------------------------------------------------------------
    def note(self, text: str = "") -> str:
        return "; ".join(part for part in (self.mark, text) if part)

    def agreement(self, turns: Iterable[TurnResult]) -> Agreement:
        return Agreement(self.system.dimensions, [Pair(t.dialogue, t.predicted, t.truth) for t in turns])

    def headline(self) -> list[Any]:
        """CCC, r and RMSE over clean turns, and over all turns where that is another set."""
        clean = [turn for turn in self.turns if turn.clean and turn.truth]
        every = [turn for turn in self.turns if turn.truth]
        unlike = len(clean) != len(every)
        what = "turns whose scripted sentence is not in training" if unlike else ""
        if not clean:
            raise ValueError("no labelled turn that could be heard has a sentence that is not in training")
        figures = self.agreement(clean).figures(note=self.note(what), seed=self.seed)
        if unlike:
            marked = self.note("ALL turns, also those whose scripted sentence was trained on")
            figures += self.agreement(every).figures(".all", marked, self.seed)
        return figures

    def few_shot(self, figures: list[Any]) -> dict[str, Any]:
        """Adds the figures after k = 0, 1, 3, 5, 10 labelled turns of each speaker, over the same turns for every k."""
        most, scored = self._scored()
        if not most:
            self.notes.append(f"Too few labelled turns a speaker to measure personalisation: {MIN_SCORED} must remain.")
            return {}
        shots = [k for k in SHOTS if k <= most]
        runs = {k: self._again(calibrate=k) for k in shots if k}
        runs[0] = {turn.id: Emotion(turn.id, turn.speaker, turn.predicted) for turn in self.turns}
        scored = [t for t in scored if all(t.id in said and not said[t.id].calibration for said in runs.values())]
        names = sorted({turn.dialogue for turn in scored})
        found = {k: self._rescored(scored, runs[k], names) for k in shots}
        for k, agreement in found.items():
            note = self.note(f"k = {k} labelled turns of each speaker of a dialogue")
            figures += agreement.figures(f".k{k}", note, self.seed, ["ccc"])
            if k:
                figures.append(agreement.gain(f"ccc_gain.mean.k{k}", found[0], self.note("against k = 0, same turns"), self.seed))
        speakers = {(turn.dialogue, turn.speaker) for turn in scored}
        return {"shots": shots, "after": most, "turns": len(scored), "speakers": len(speakers), "dialogues": len(names)}

    def _scored(self) -> tuple[int, list[TurnResult]]:
        """The most labelled turns that can be given away so that enough remain, and the turns that then remain."""
        before: dict[tuple[str, str], int] = {}
        place: list[tuple[int, TurnResult]] = []
        for turn in self.turns:
            if turn.truth:
                who = (turn.dialogue, turn.speaker)
                place.append((before.get(who, 0), turn))
                before[who] = before.get(who, 0) + 1
        for most in sorted(SHOTS, reverse=True):
            left = [turn for count, turn in place if count >= most and turn.clean]
            if most and len(left) >= MIN_SCORED and len({turn.dialogue for turn in left}) > 1:
                return most, left
        return 0, []

    def feedback(self) -> list[Any]:
        """The figures when the true label of the previous turn is fed back, and how far that is above real use."""
        said = self._again(feedback="labels")
        scored = [turn for turn in self.turns if turn.truth and turn.clean and turn.id in said]
        names = sorted({turn.dialogue for turn in scored})
        forced, own = self._rescored(scored, said, names), self.agreement(scored)
        note = self.note("teacher forcing: the true previous labels are fed back, which no use of the model can have")
        gap = self.note("teacher forcing minus own feedback")
        return [*forced.figures(".labels", note, self.seed, ["ccc"]), forced.gain("ccc_gap.mean", own, gap, self.seed)]

    def _again(self, **options: Any) -> dict[str, Emotion]:
        answers = recognise(self.system, self.dialogues, self.skip, progress=self.progress, **options)
        return {said.id: said for answer in answers if answer is not None for said in answer}

    def _rescored(self, scored: Sequence[TurnResult], said: dict[str, Emotion], names: Sequence[str]) -> Agreement:
        pairs = [Pair(turn.dialogue, said[turn.id].values, turn.truth) for turn in scored]
        return Agreement(self.system.dimensions, pairs, names)


# --- running the system ---------------------------------------------------------------------------------------------
def recognise(
    system: RecognizesEmotion,
    dialogues: Sequence[Sequence[Row]],
    skip: Callable[[str, str], None],
    *,
    progress: bool = False,
    **options: Any,
) -> list[list[Emotion] | None]:
    """What the system says of each dialogue, a few dialogues at a time; None for one that it cannot hear.

    ``skip(row id, reason)`` is called for each turn of such a dialogue. ValueError when a prediction is not finite.
    """
    blocks = [dialogues[first : first + BLOCK] for first in range(0, len(dialogues), BLOCK)]
    shown = track(blocks, "listening", console=Console(stderr=True), disable=not progress)
    return [answer for block in shown for answer in _block(system, block, skip, options)]


def _block(
    system: RecognizesEmotion, block: Sequence[Sequence[Row]], skip: Callable[[str, str], None], options: dict[str, Any]
) -> list[list[Emotion] | None]:
    try:
        answers = system.recognize_emotion(block, **options)
    except ROW_ERRORS as error:
        if len(block) > 1:
            return [answer for dialogue in block for answer in _block(system, [dialogue], skip, options)]
        reason = str(error) if isinstance(error, BadRow) else f"its dialogue cannot be heard: {error or type(error).__name__}"
        for row in block[0]:
            skip(row.id, reason)
        return [None]
    for rows, answer in zip(block, answers, strict=True):
        assert [row.id for row in rows] == [said.id for said in answer], "one answer a turn, in their order"
        wrong = [said.id for said in answer if not all(math.isfinite(value) for value in said.values.values())]
        if wrong:
            raise NonFiniteAnswer(f"the system's answer for {wrong[0]} is not finite; {len(wrong)} turns of this dialogue are so")
    return list(answers)


class NonFiniteAnswer(RuntimeError):
    """A prediction was NaN or infinite: a fault of the trained weights, not of a row."""
