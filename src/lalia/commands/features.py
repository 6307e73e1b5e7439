"""``lalia features``: features that training reads instead of computing them again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Compute features of a corpus once, so that training and evaluation read them.", no_args_is_help=True)


@app.callback()
def features() -> None:
    """Compute features of a corpus once, so that training and evaluation read them."""


@app.command("egemaps")
def egemaps(
    manifests: Annotated[list[Path], typer.Argument(metavar="MANIFEST...", help="JSONL manifests; a row in several counts once.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to fill; features/egemaps beside the first manifest if absent.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes; all cores if absent, 0 for none.")] = None,
    max_bad_fraction: Annotated[float, typer.Option(help="Share of failed rows above which the exit code is 1.")] = 0.1,
) -> None:
    """The 88 eGeMAPS functionals of every recording, one .pt each. What is there is kept, failures are listed.

    lalia features egemaps data/dialogues/train.jsonl data/dialogues/valid.jsonl (where training looks for them)

    lalia features egemaps data/iemocap/fold*/*.jsonl -o data/iemocap/features/egemaps

    A label CSV with --label-file and --audio-root first becomes manifests with lalia prepare iemocap.
    """
    from lalia.features import FAILURES, egemaps_of, egemaps_store, extract, recordings

    folder = out or manifests[0].parent / "features" / "egemaps"
    rows = recordings(manifests)
    result = extract(rows, egemaps_store(folder), egemaps_of, (os.cpu_count() or 1) if workers is None else workers)
    typer.echo(f"{folder}: {result.text()}")
    for row, reason in result.failed[:10]:
        typer.secho(f"  {row}: {reason}", fg="yellow", err=True)
    if result.failed:
        typer.secho(f"all failures: {folder / FAILURES}", fg="yellow", err=True)
    if result.fraction > max_bad_fraction:
        share = f"{len(result)} of {len(rows)} rows failed, above --max-bad-fraction {max_bad_fraction:g}"
        typer.secho(f"error: {share}", fg="red", err=True)
        raise typer.Exit(1)
