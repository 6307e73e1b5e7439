"""``lalia crossval``: one run per fold of a prepared corpus, judged on the fold's test part."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lalia.commands.shared import WHICH_HELP, program, split_overrides

INTERRUPTED = 130


def crossval(
    items: Annotated[
        list[str], typer.Argument(metavar="CONFIG FOLDER [KEY=VALUE]...", help="A configuration, the folder of fold1, fold2 …")
    ],
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="Folder of the runs; runs/<name of CONFIG>-folds if absent.")
    ] = None,
    allow_leaks: Annotated[bool, typer.Option("--allow-leaks", help="Go on though test and training cross: marked.")] = False,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    which: Annotated[str, typer.Option(help=WHICH_HELP)] = "best",
) -> None:
    """Train one run per fold and judge each on its own test part: mean ± sd over folds, and the pooled CCC with its interval.

    lalia crossval configs/emotion/base.yaml data/iemocap -m runs/iemocap train.epochs=30

    The same command goes on after an interruption; a finished fold is not trained again. Leaks are looked for in every fold
    before training.
    """
    from lalia.crossval import Interrupted, text_table
    from lalia.crossval import crossval as run_folds

    files, overrides = split_overrides(items)
    if len(files) != 2:
        raise typer.BadParameter(f"name a configuration and a folder with fold1, fold2 …, got {', '.join(files) or 'neither'}")
    source, folder = Path(files[0]), Path(files[1])
    run = model or Path("runs") / f"{source.stem}-folds"
    try:
        result = run_folds(source, overrides, folder, run, allow_leaks=allow_leaks, which=which, seed=seed, say=typer.echo)
    except Interrupted as error:
        typer.echo(f"{error}. The same `{program()} crossval` command goes on from there.")
        raise typer.Exit(INTERRUPTED) from error
    for line in text_table(result):
        typer.echo(line)
    typer.echo(f"{run / 'crossval.json'}\n{run / 'crossval.html'}")
