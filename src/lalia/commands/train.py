"""``lalia train``: begin a run or go on with it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lalia.commands.shared import program, split_overrides

if TYPE_CHECKING:
    from lalia.sections import RunConfig
    from lalia.train import Counters

INTERRUPTED = 130


def train(
    items: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="A configuration, and overrides.")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="The configuration, given by name.")] = None,
    model: Annotated[Path | None, typer.Option("--model", "-m", help="Run folder; runs/<name of CONFIG> if absent.")] = None,
) -> None:
    """Train, or go on: the same command takes up a run where it stands, after Ctrl-C, a crash or kill -9.

    lalia train configs/vits2/tiny.yaml -m runs/first train.minutes=30 data.batch_size=8

    lalia train -m runs/first train.minutes=60 (goes on with the configuration of the run folder)

    torchrun --nproc-per-node 2 -m lalia train configs/vits2/tiny.yaml -m runs/first
    """
    from lalia.config import load_run_config

    files, overrides = split_overrides(items or [])
    source, run = _source(files + ([str(config)] if config is not None else []), model)
    settings = load_run_config(source, overrides)
    from lalia.train import train as fit

    counters = fit(settings, run, source if source.parent != run else None)
    if int(os.environ.get("RANK", "0")) == 0:
        _closing(settings, run, counters, shlex.join([str(source), "-m", str(run), *overrides]))
    if counters.interrupted:
        raise typer.Exit(INTERRUPTED)


def _source(files: list[str], model: Path | None) -> tuple[Path, Path]:
    """(configuration file, run folder). A run that has begun has its own configuration."""
    if len(files) > 1:
        raise typer.BadParameter(f"one configuration, got {', '.join(files)}")
    if files:
        return Path(files[0]), model or Path("runs") / Path(files[0]).stem
    if model is not None and (model / "config.yaml").is_file():
        return model / "config.yaml", model
    if model is not None:
        raise typer.BadParameter(f"{model} is not a run yet: name a configuration too, such as configs/vits2/tiny.yaml")
    raise typer.BadParameter("name a configuration, such as configs/vits2/tiny.yaml")


def _closing(config: RunConfig, run: Path, counters: Counters, arguments: str) -> None:
    from lalia.system import Speaks, system_class

    if counters.interrupted:
        typer.echo(f"stopped at step {counters.step}, saved in {run}. To go on:\n  {program()} train {arguments}")
        return
    typer.echo(f"done: step {counters.step}, epoch {counters.epoch}, saved in {run}")
    system, name = system_class(config.system), shlex.quote(str(run))
    if issubclass(system, Speaks):
        typer.echo(f'to hear it:\n  {program()} speak {name} "Good morning." -o morning.wav')
    if hasattr(system, "recognize_emotion"):
        typer.echo(f"to use it:\n  {program()} emotion {name} recording.wav\n  {program()} evaluate {name} --data test.jsonl")
