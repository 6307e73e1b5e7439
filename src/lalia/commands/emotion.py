"""``lalia emotion``: what recordings and dialogues sound like, from files or live."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from lalia.commands.shared import DEVICE_HELP, WHICH_HELP, load_system

if TYPE_CHECKING:
    from lalia.data import Row
    from lalia.system import Emotion, EmotionSession, RecognizesEmotion

AUDIO_HELP = "Recordings (several: one dialogue, in this order), folders, or JSONL manifests."
SUFFIXES = (".jsonl", ".csv")


@dataclass
class Request:
    """Dialogues to be heard, and (turn, reason) of what cannot be."""

    dialogues: list[list[Row]] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)


def emotion(
    run: Annotated[Path, typer.Argument(help="Run folder, or one of its step-… folders.")],
    audio: Annotated[list[Path] | None, typer.Argument(metavar="[AUDIO]...", help=AUDIO_HELP)] = None,
    speaker: Annotated[list[str] | None, typer.Option(help="Who speaks: once for all files, or once for each.")] = None,
    dialogue: Annotated[bool, typer.Option("--dialogue", help="The files of a folder are one dialogue, by name.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write a .jsonl or .csv file.")] = None,
    calibrate: Annotated[int, typer.Option(help="Adapt by each speaker's first so many labelled turns of a manifest.", min=0)] = 0,
    online: Annotated[bool, typer.Option("--online", help="Read turns from stdin, answer each at once as a JSON line.")] = False,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    which: Annotated[str, typer.Option(help=WHICH_HELP)] = "best",
) -> None:
    """Valence and arousal of each turn, in the units of the labels of the run.

    lalia emotion runs/emotion hello.wav

    lalia emotion runs/emotion a1.wav b1.wav a2.wav --speaker anna --speaker ben --speaker anna (one dialogue)

    lalia emotion runs/emotion data/iemocap/fold1/test.jsonl --calibrate 3 -o emotion.csv

    printf 'a1.wav\\tanna\\nb1.wav\\tben\\n' | lalia emotion runs/emotion --online

    A line of --online is a path, a tab and the speaker, a tab and labels as JSON such as {"valence": 3.5}, the last two optional;
    labels calibrate what follows. An empty line begins a new dialogue. Where a turn fails, the others are answered, and the exit
    code is 1.
    """
    from lalia.system import RecognizesEmotion

    _check_options(audio or [], speaker or [], out, online, calibrate)
    request = Request() if online else read_request(audio or [], speaker or [], dialogue)
    if calibrate and not any(row.labels for rows in request.dialogues for row in rows):
        raise ValueError("--calibrate needs labelled turns: name a manifest with labels")
    system = load_system(run, which, device)
    if not isinstance(system, RecognizesEmotion):
        raise ValueError(f"{run} was trained as {system.config.system!r}, which cannot recognise emotion")
    system.for_inference()
    failed = listen_live(system, sys.stdin.buffer) if online else _offline(system, request, calibrate, out)
    if failed:
        for turn, reason in failed:
            typer.secho(f"failed: {turn}: {reason}", fg="red", err=True)
        turns = "1 turn" if len(failed) == 1 else f"{len(failed)} turns"
        typer.secho(f"error: {turns} could not be heard", fg="red", err=True)
        raise typer.Exit(1)


def _check_options(audio: Sequence[Path], speaker: Sequence[str], out: Path | None, online: bool, calibrate: int) -> None:
    """Wrong combinations are told before the model is loaded."""
    if online and (audio or speaker or calibrate or out):
        raise typer.BadParameter("--online reads turns, speakers and labels from stdin and answers on stdout: give it nothing else")
    if not online and not audio:
        raise typer.BadParameter("name a recording, a folder or a manifest, or use --online")
    if len(speaker) > 1 and len(speaker) != len(audio):
        raise typer.BadParameter(f"{len(speaker)} speakers for {len(audio)} files: give one for all, or one for each")
    if out is not None and out.suffix.lower() not in SUFFIXES:
        raise typer.BadParameter(f"--out is a {' or '.join(SUFFIXES)} file, not {out}")


# --- what is asked --------------------------------------------------------------------------------------------------
def read_request(paths: Sequence[Path], speakers: Sequence[str], together: bool = False) -> Request:
    """Files → dialogues. Turns without usable audio are listed; FileNotFoundError or ValueError where a path is nothing at all."""
    from lalia.data import read_manifest
    from lalia.dialogues import dialogues

    names = list(speakers) * len(paths) if len(speakers) == 1 else list(speakers) or [""] * len(paths)
    request, single = Request(), list["Row"]()
    for path, name in zip(paths, names, strict=True):
        if path.is_dir():
            files = [_row(file, name) for file in _audio_files(path)]
            request.dialogues += [files] if together else [[row] for row in files]
        elif path.suffix.lower() == ".jsonl":
            corpus = read_manifest(path, max_bad_fraction=1.0)
            request.failed += corpus.rejected
            request.dialogues += [[corpus[index] for index in turns] for turns in dialogues(corpus)]
        else:
            single.append(_row(path, name))
    request.dialogues += [single] if single else []
    request.dialogues = [kept for rows in request.dialogues if (kept := _heard(rows, request.failed))]
    return request


def _row(path: Path, speaker: str) -> Row:
    from lalia.data import Row

    return Row(str(path), os.path.abspath(path), speaker=speaker)


def _audio_files(folder: Path) -> list[Path]:
    from lalia.corpora._common import audio_files

    found = audio_files(folder)
    if not found:
        raise ValueError(f"{folder} holds no audio file")
    return found


def _heard(rows: Sequence[Row], failed: list[tuple[str, str]]) -> list[Row]:
    """The rows whose recording can be opened, numbered by their place where they have no number; the others go to ``failed``."""
    from lalia.loader import measure

    kept = []
    for row in rows:
        reason = measure(row) if row.audio else "the row names no audio"
        if reason:
            failed.append((row.id, reason))
        else:
            kept.append(row)
    for place, row in enumerate(kept):
        row.turn = place if row.turn < 0 else row.turn
    return kept


# --- answers --------------------------------------------------------------------------------------------------------
def _offline(system: RecognizesEmotion, request: Request, calibrate: int, out: Path | None) -> list[tuple[str, str]]:
    from lalia.evaluate.emotion import recognise

    failed = list(request.failed)
    answers = recognise(system, request.dialogues, lambda turn, reason: failed.append((turn, reason)), calibrate=calibrate)
    pairs = [
        (row, said)
        for rows, answer in zip(request.dialogues, answers, strict=True)
        if answer is not None
        for row, said in zip(rows, answer, strict=True)
    ]
    for line in table(pairs, system.dimensions):
        typer.echo(line)
    if out is not None:
        _write(out, pairs, system.dimensions)
        typer.echo(f"{out}: {len(pairs)} turns")
    return failed


def table(pairs: Sequence[tuple[Row, Emotion]], dimensions: Sequence[str]) -> list[str]:
    """Lines of a table: id, speaker and the dimensions; turns that calibrated are marked."""
    if not pairs:
        return []
    header = ["turn", "speaker", *dimensions, ""]
    body = []
    for _, said in pairs:
        values = [f"{said.values[name]:.3f}" for name in dimensions]
        body.append([said.id, said.speaker or "–", *values, "calibration" if said.calibration else ""])
    widths = [max(len(row[column]) for row in [header, *body]) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [header, *body]]


def _record(said: Emotion, dimensions: Sequence[str], **more: Any) -> dict[str, Any]:
    values = {name: round(said.values[name], 6) for name in dimensions}
    return {"id": said.id, "speaker": said.speaker, **more, **values, **({"calibration": True} if said.calibration else {})}


def _write(path: Path, pairs: Sequence[tuple[Row, Emotion]], dimensions: Sequence[str]) -> None:
    from lalia.runfolder import write_atomic

    records = [_record(said, dimensions, dialogue=row.dialogue, turn=row.turn) for row, said in pairs]
    if path.suffix.lower() == ".jsonl":
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    else:
        buffer = io.StringIO()
        columns = ["id", "speaker", "dialogue", "turn", *dimensions, "calibration"]
        writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        text = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)


# --- live -----------------------------------------------------------------------------------------------------------
def listen_live(system: RecognizesEmotion, lines: BinaryIO) -> list[tuple[str, str]]:
    """Answer each line of ``lines`` on stdout as soon as it is there; returns what failed, which is answered with ``error``."""
    session, failed = system.listen(), list[tuple[str, str]]()
    for number, raw in enumerate(lines, start=1):
        line = raw.strip(b"\r\n")
        if not line.strip():
            session = system.listen()
            continue
        try:
            answer = _live_turn(session, line, system.dimensions)
        except (ValueError, OSError) as error:
            turn = line.split(b"\t")[0].decode("utf-8", "replace")
            failed.append((f"line {number}: {turn}", str(error)))
            answer = {"id": turn, "error": str(error)}
        sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")
        sys.stdout.flush()
    return failed


def _live_turn(session: EmotionSession, line: bytes, dimensions: Sequence[str]) -> dict[str, Any]:
    from lalia import audio

    parts = [part.strip() for part in line.decode("utf-8").split("\t")]
    if len(parts) > 3:
        raise ValueError("a line is: path, tab, speaker, tab, labels as JSON")
    path, speaker, labels = [*parts, "", ""][:3]
    wave, rate = audio.read(path)
    return _record(session.turn(wave, rate, speaker, path, _labels(labels, dimensions)), dimensions)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _labels(text: str, dimensions: Sequence[str]) -> dict[str, float] | None:
    if not text:
        return None
    given = json.loads(text)
    if not isinstance(given, dict) or not all(map(_is_number, given.values())):
        raise ValueError(f'labels are a JSON object of numbers such as {{"valence": 3.5}}, got {text}')
    unknown = [name for name in given if name not in dimensions]
    if unknown:
        raise ValueError(f"unknown label {unknown[0]!r}; this run knows {', '.join(dimensions)}")
    return {name: float(value) for name, value in given.items()}
