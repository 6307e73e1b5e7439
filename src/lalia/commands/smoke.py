"""``lalia smoke``: a few steps that show whether a system works at all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lalia.commands.shared import split_overrides


def smoke(
    items: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="configs/omni/smoke.yaml if absent.")
    ] = None,
    model: Annotated[Path, typer.Option("--model", "-m", help="Run folder, new; its control goes beside it.")] = Path("runs/smoke"),
) -> None:
    """Train a few steps and judge the losses; the exit code is 1 when they do not fall as they should.

    lalia prepare sines -o data/audio_smoke && lalia smoke

    lalia smoke listen.whisper.source=tiny checks.control= -m runs/tiny (no weights of Whisper, no control)
    """
    from lalia.config import load_run_config
    from lalia.smoke import smoke as run

    files, overrides = split_overrides(items or [])
    if len(files) > 1:
        raise typer.BadParameter(f"one configuration, got {', '.join(files)}")
    source = Path(files[0] if files else "configs/omni/smoke.yaml")
    verdict = run(load_run_config(source, overrides), model, source)
    typer.echo(verdict.text())
    if verdict.failures:
        raise typer.Exit(1)
