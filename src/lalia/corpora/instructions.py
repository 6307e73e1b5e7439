"""Instructions about recordings, made from speech whose text, speaker and language are known; and AudioBench-mini.

``train``, ``valid`` and ``test`` are conversations for ``omni-chat``; ``audiobench-mini.jsonl`` holds four-way questions on clips
of the test part alone. What is asked in evaluation is kept out of training by clip, by recording and by text, and what was written
is counted again afterwards (``report.json``, ``facts.overlap``).
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lalia import audio
from lalia.corpora._common import CorpusError, Options, PrepareResult, Reason, Rejected, broken, file_name, lines, share_position
from lalia.corpora._questions import (
    CHOICES,
    OPEN,
    SOUNDS,
    SPEECH,
    Item,
    NotEnough,
    Questioner,
    Ranges,
    length_ranges,
    plain,
    word_ranges,
    words_of,
)
from lalia.data import ManifestError, Row, read_manifest, write_manifest

MINI = "audiobench-mini.jsonl"
PARTS = ("train", "valid", "test")
RATE = 16000
LETTERS = "ABCD"
PER_CLIP = 6  # questions for each training clip where no number is asked for
MADE_SHARE = 10  # one made sound of each kind for so many clips


@dataclass
class InstructionsOptions(Options):
    """``base``: manifests, or folders with train, valid and test.jsonl. ``weights``: kind=weight of training questions, 0 = never.

    ``genders``: speaker=man or speaker=woman, where the rows have no ``extra.gender``. ``mix``: JSONL of text-only instructions.
    """

    needs_text: ClassVar[bool] = False

    base: list[str] = field(default_factory=list)
    count: int = 0  # training questions; 0 = six for each clip
    questions: int = 200  # of AudioBench-mini
    choice_share: float = 0.3  # of the training questions that have four options
    weights: list[str] = field(default_factory=list)
    genders: list[str] = field(default_factory=list)
    mix: list[str] = field(default_factory=list)
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.base = [*self.base, *self.inputs]
        if not self.base:
            raise CorpusError("`prepare instructions` needs --base: manifests or prepared folders of labelled speech")
        if self.count < 0 or self.questions < 0 or not 0 <= self.choice_share <= 1 or self.seed < 0:
            raise CorpusError("need count >= 0, questions >= 0, 0 <= choice_share <= 1, seed >= 0")
        for name in self.kinds():
            if name not in {*OPEN, *CHOICES}:
                raise CorpusError(f"weights: no kind {name!r}; kinds are {', '.join(dict.fromkeys([*OPEN, *CHOICES]))}")

    def kinds(self) -> dict[str, float]:
        """Kind → weight as given; ``said`` counts four times where nothing is said of it."""
        return {"said": 4.0, **{name: _number(name, value) for name, value in _pairs(self.weights, "weights")}}


def prepare_instructions(options: InstructionsOptions) -> PrepareResult:
    """Questions on the clips of ``options.base``. The same options and base give the same bytes.

    Raises:
        CorpusError: no clips, no clips for evaluation, or too few for any question.
    """
    rows, rejected = _clips(options)
    parts, dropped = _apart(rows)
    if not parts["train"] or not parts["test"]:
        raise CorpusError(f"need clips to train and to test on, got {len(parts['train'])} and {len(parts['test'])}")
    makers = _questioners(parts, options)
    counts = {"train": options.count or PER_CLIP * len(parts["train"])}
    counts |= {name: len(parts[name]) for name in ("valid", "test")}
    result = PrepareResult([], rejected)
    tally: dict[str, dict[str, int]] = {}
    for name in PARTS:
        items = _mixed(makers[name], options, counts[name], name, result.notes) if parts[name] else []
        tally[name] = dict(Counter(item.kind for item in items))
        for number, item in enumerate(items):
            row = _row(item, f"{name}-{number:06d}-{item.kind}")
            result.rows.append(row)
            result.official[row.id] = name
    mini = _mini(makers["mini"], options, result.notes)
    held = {plain(row.text) for row in parts["test"]} - {""}
    texts = _text_only(options, held, rejected, dropped)
    result.rows += texts
    result.official |= {row.id: "train" for row in texts}
    write_manifest(options.out / MINI, mini)
    trained = [row for row in result.rows if result.official[row.id] == "train"]
    overlap = overlap_of(trained, mini)
    if any(overlap.values()):
        raise CorpusError(f"evaluation leaked into training: {overlap}")  # the check of the whole, not of its parts
    result.facts = {
        "kinds": tally, "audiobench_mini": dict(Counter(row.task for row in mini)), "text_only": len(texts),
        "kept_out_of_training": dict(dropped), "overlap": overlap,
        "letters": dict(Counter(LETTERS[row.extra["right"]] for row in mini)),
    }  # fmt: skip
    result.notes.append(f"{len(mini)} four-way questions → {options.out / MINI}; overlap with training: {_shown(overlap)}")
    return result


def overlap_of(train: Iterable[Row], held: Iterable[Row]) -> dict[str, int]:
    """What is in both, counted anew from the rows: clip ids, recordings and spoken texts of ``held`` that ``train`` has too."""
    a, b = _traces(train), _traces(held)
    return {name: len(a[name] & b[name]) for name in a}


def _traces(rows: Iterable[Row]) -> dict[str, set[str]]:
    traces: dict[str, set[str]] = {"clip ids": set(), "recordings": set(), "texts": set()}
    for row in rows:
        traces["clip ids"].update(row.extra.get("clips", []))
        others = row.extra.get("others", [])
        folder = os.path.dirname(row.audio)
        files = [(row.audio, row.start), *((os.path.join(folder, o["audio"]), o["start"]) for o in others)] if row.audio else []
        traces["recordings"].update(f"{os.path.abspath(path)}@{start:g}" for path, start in files)
        traces["texts"].update(plain(text) for text in [row.text, *row.extra.get("texts", [])])
    traces["texts"].discard("")
    return traces


def _shown(overlap: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in overlap.items())


# --- clips ----------------------------------------------------------------------------------------------------------
def _clips(options: InstructionsOptions) -> tuple[list[tuple[str, Row]], list[Rejected]]:
    """(part, clip) of every base manifest, and what cannot be used of them."""
    genders = dict(_pairs(options.genders, "genders"))
    found: list[tuple[str, Row]] = []
    rejected: list[Rejected] = []
    seen: set[str] = set()
    for path, part in _manifests(options.base):
        try:
            corpus = read_manifest(path)
        except ManifestError as error:
            raise CorpusError(str(error)) from error
        rejected += [Rejected("", where, Reason.broken, why) for where, why in corpus.rejected]
        for row in corpus:
            reason = _unfit(row, seen, options)
            if reason is not None:
                rejected.append(Rejected(row.id, row.audio, *reason))
                continue
            seen.add(row.id)
            gender = genders.get(row.speaker) or row.extra.get("gender", "")
            found.append((part or _part(row.id), replace(row, extra={"gender": gender} if gender else {})))
    return found[: options.limit or None], rejected


def _unfit(row: Row, seen: set[str], options: InstructionsOptions) -> tuple[Reason, str] | None:
    if row.id in seen:
        return Reason.duplicate, ""
    if not row.audio or not os.path.isfile(row.audio):
        return Reason.missing_audio, row.audio
    if not words_of(row.text):
        return Reason.no_transcript, ""
    if not row.duration:
        row.duration = audio.info(row.audio).seconds - row.start
    if row.duration < options.min_seconds:
        return Reason.too_short, f"{row.duration:.3f} s < {options.min_seconds:g} s"
    return (Reason.too_long, f"{row.duration:.3f} s > {options.max_seconds:g} s") if row.duration > options.max_seconds else None


def _manifests(base: Sequence[str]) -> list[tuple[Path, str]]:
    """(manifest, part; '' = by the hash of each id)."""
    found = []
    for item in base:
        path = Path(item).expanduser()
        if path.is_dir():
            there = [(file, part) for part in PARTS if (file := path / f"{part}.jsonl").is_file() and file.stat().st_size]
            if not there:
                raise CorpusError(f"--base {item}: no train.jsonl, valid.jsonl and test.jsonl in it; run `lalia prepare` first")
            found += there
        elif path.is_file():
            found.append((path, path.stem if path.stem in PARTS else ""))
        else:
            raise CorpusError(f"--base {item}: no such manifest or folder")
    return found


def _part(identifier: str) -> str:
    position = share_position(identifier)
    return "test" if position < 0.1 else "valid" if position < 0.15 else "train"


def _apart(rows: Sequence[tuple[str, Row]]) -> tuple[dict[str, list[Row]], Counter[str]]:
    """Clips by part. One whose recording or text is also in a later part (train < valid < test) is left out of the earlier."""
    parts: dict[str, list[Row]] = {name: [] for name in PARTS}
    dropped: Counter[str] = Counter()
    texts: set[str] = set()
    files: set[tuple[str, float]] = set()
    for name in reversed(PARTS):
        chosen = [row for part, row in rows if part == name]
        for row in chosen:
            if (row.audio, row.start) in files:
                dropped["recordings"] += 1
            elif plain(row.text) in texts:
                dropped["texts"] += 1
            else:
                parts[name].append(row)
        texts |= {plain(row.text) for row in chosen}
        files |= {(row.audio, row.start) for row in chosen}
    return parts, dropped


# --- questions ------------------------------------------------------------------------------------------------------
def _questioners(parts: dict[str, list[Row]], options: InstructionsOptions) -> dict[str, Questioner]:
    everything = [row for rows in parts.values() for row in rows]
    lengths = length_ranges([row.duration for row in everything])
    words = word_ranges([len(words_of(row.text)) for row in everything])
    makers: dict[str, Questioner] = {}
    for number, name in enumerate(PARTS):
        if parts[name]:
            makers[name] = _questioner(parts[name], name, lengths, words, options, options.seed * 10 + number)
    makers["mini"] = Questioner(parts["test"], makers["test"].made, lengths, words, options.seed * 10 + 9)
    return makers


def _questioner(clips: list[Row], part: str, lengths: Ranges, words: Ranges, options: InstructionsOptions, seed: int) -> Questioner:
    """With sounds made on the spot, as long as clips of speech are."""
    rng = np.random.default_rng([seed, 7])
    made: dict[str, list[Row]] = {}
    for kind in SOUNDS:
        if kind == SPEECH:
            continue
        for number in range(max(8, len(clips) // MADE_SHARE)):
            name = f"made-{part}-{kind.split()[-1]}-{number:04d}"
            seconds = clips[int(rng.integers(len(clips)))].duration
            path = options.out / "audio" / f"{file_name(name)}.flac"
            wave = sound(kind, seconds, rng)
            audio.write(path, wave, RATE)
            made.setdefault(kind, []).append(Row(name, str(path), duration=len(wave) / RATE))
    return Questioner(clips, made, lengths, words, seed)


def sound(kind: str, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Silence (a noise floor near −80 dB), noise (white to brown) or a tone (steady, 150 … 2000 Hz): float32 [S] at 16 kHz."""
    count = round(seconds * RATE)
    if kind == "silence":
        return (1e-4 * rng.standard_normal(count)).astype(np.float32)
    level = 10 ** rng.uniform(-1.7, -0.5)
    if kind == "noise":
        spectrum = np.fft.rfft(rng.standard_normal(count))
        spectrum /= np.maximum(1, np.arange(len(spectrum))) ** rng.uniform(0, 1)
        wave = np.fft.irfft(spectrum, count)
    else:
        wave = np.sin(2 * np.pi * rng.uniform(150, 2000) * np.arange(count) / RATE + rng.uniform(0, 6))
    return (level * wave / np.abs(wave).max()).astype(np.float32)


def _mixed(maker: Questioner, options: InstructionsOptions, count: int, part: str, notes: list[str]) -> list[Item]:
    """``count`` questions, kinds by weight; a kind with too few clips is named and its share goes to the others."""
    weights = options.kinds()
    forms = [(kind, False, 1 - options.choice_share) for kind in OPEN] + [(kind, True, options.choice_share) for kind in CHOICES]
    live = {(kind, choice): weights.get(kind, 1.0) * share for kind, choice, share in forms if weights.get(kind, 1.0) * share > 0}
    chooser = random.Random(options.seed * 31 + PARTS.index(part))
    items: list[Item] = []
    while live and len(items) < count:
        kind, choice = chooser.choices(list(live), list(live.values()))[0]
        try:
            items.append(maker.draw(kind, choice))
        except NotEnough as error:
            del live[(kind, choice)]
            notes.append(f"{part}, {'four options' if choice else 'open'}: {error}")
    if len(items) < count:
        notes.append(f"{part}: {len(items)} questions, {count} were asked for; more clips are needed")
    return items


def _mini(maker: Questioner, options: InstructionsOptions, notes: list[str]) -> list[Row]:
    """Four-way questions, as many of each kind, the right letter spread evenly."""
    left, items = list(CHOICES), list[Item]()
    while left and len(items) < options.questions:
        for kind in list(left):
            if len(items) == options.questions:
                break
            try:
                items.append(maker.draw(kind, True))
            except NotEnough as error:
                left.remove(kind)
                notes.append(f"AudioBench-mini: {error}")
    if len(items) < options.questions:
        notes.append(f"AudioBench-mini has {len(items)} questions, {options.questions} were asked for: the test part is small")
    letters = [index % 4 for index in range(len(items))]
    random.Random(options.seed).shuffle(letters)
    rows = []
    for number, (item, right) in enumerate(zip(items, letters, strict=True)):
        wrong = [option for option in item.options if option != item.answer]
        item.options = [*wrong[:right], item.answer, *wrong[right:]]
        row = _row(item, f"mini-{number:03d}-{item.kind}")
        row.extra |= {"question": item.question, "options": item.options, "right": right}
        rows.append(row)
    return rows


def _row(item: Item, identifier: str) -> Row:
    """A question as a row: the first clip is its audio, ``extra`` has the conversation and what else is needed."""
    first = item.clips[0]
    question = item.question
    answer = item.answer
    if item.options:
        question = with_options(question, item.options)
        answer = f"{LETTERS[item.options.index(item.answer)]}. {item.answer}"
    messages = [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]
    extra: dict[str, Any] = {"messages": messages, "clips": [clip.id for clip in item.clips]}
    if len(item.clips) > 1:
        folder = os.path.dirname(first.audio)
        extra["others"] = [
            {"audio": Path(os.path.relpath(clip.audio, folder)).as_posix(), "start": clip.start, "duration": clip.duration}
            for clip in item.clips[1:]
        ]
        extra["texts"] = [clip.text for clip in item.clips]
    return replace(first, id=identifier, task=item.kind, extra=extra)


def with_options(question: str, options: Sequence[str]) -> str:
    """A question with its options below, a letter each."""
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))])


# --- instructions without sound -------------------------------------------------------------------------------------
def _text_only(options: InstructionsOptions, held: set[str], rejected: list[Rejected], dropped: Counter[str]) -> list[Row]:
    """Conversations of ``options.mix``, but those that say a text of the evaluation."""
    rows: list[Row] = []
    seen: set[str] = set()
    for name in options.mix:
        path = Path(name).expanduser()
        if not path.is_file():
            raise CorpusError(f"mix: no such file {name}")
        for number, text in lines(path):
            try:
                messages = _conversation(text)
            except ValueError as error:
                rejected.append(broken(path, number, str(error)))
                continue
            key = json.dumps(messages, ensure_ascii=False)
            if key in seen or any(plain(message["text"]) in held for message in messages):
                dropped["repeated text-only" if key in seen else "text-only with a text of the evaluation"] += 1
                continue
            seen.add(key)
            said = [message["text"] for message in messages]
            rows.append(Row(f"{path.stem}-{number:06d}", task="text", extra={"messages": messages, "texts": said}))
    return rows


def _conversation(text: str | None) -> list[dict[str, str]]:
    """One line → messages; ValueError says what is wrong."""
    record = json.loads(text) if text is not None else None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object in UTF-8")
    if "messages" in record:
        messages = [{"role": str(m["role"]), "text": str(m.get("content", m.get("text", "")))} for m in record["messages"]]
    else:
        asked = record.get("instruction", record.get("question", ""))
        asked = "\n".join(part for part in (asked, record.get("input", "")) if part)
        said = str(record.get("output", record.get("answer", "")))
        messages = [{"role": "user", "text": str(asked)}, {"role": "assistant", "text": said}]
    if not all(m["text"] for m in messages) or messages[-1:][0]["role"] != "assistant":
        raise ValueError("a conversation needs texts, and the assistant's answer at its end")
    return messages


def _pairs(items: Sequence[str], option: str) -> list[tuple[str, str]]:
    pairs = [item.partition("=") for item in items]
    if not all(name and value for name, _, value in pairs):
        raise CorpusError(f"{option} needs NAME=VALUE,NAME=VALUE, got {', '.join(items)}")
    return [(name, value) for name, _, value in pairs]


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise CorpusError(f"weights: {name} needs a number, got {text!r}") from error
    if not 0 <= value < float("inf"):
        raise CorpusError(f"weights: {name} must be 0 or above, got {text}")
    return value
