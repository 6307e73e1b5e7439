"""``lalia demo``: the whole path in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lalia.commands.shared import program


def demo(
    run: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    minutes: Annotated[float, typer.Option(help="Minutes of training, over all starts of this run.")] = 8.0,
    clips: Annotated[int, typer.Option(help="Test clips of the evaluation.")] = 24,
    config: Annotated[Path, typer.Option("--config", "-c", help="Configuration.")] = Path("configs/vits2/tiny.yaml"),
    data: Annotated[Path, typer.Option(help="Folder of the corpus folders.")] = Path("data"),
    asr: Annotated[str, typer.Option(help="Recogniser; Whisper-base if it can be had, else pocketsphinx.")] = "",
    which: Annotated[str, typer.Option(help="Checkpoint that speaks: latest, best, or a step.")] = "latest",
    install_seconds: Annotated[float, typer.Option(hidden=True)] = 0.0,
) -> None:
    """Real speech, a trained voice, samples, figures and a report, in about 15 minutes on two cores.

    lalia demo

    lalia demo --minutes 30 --run runs/longer
    """
    from lalia.demo import Demo, Options

    Demo(Options(run, config, data, minutes, clips, asr, which, install_seconds, program())).play()
