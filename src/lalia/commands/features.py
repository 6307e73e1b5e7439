"""``lalia features``: features that training reads instead of computing them again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lalia.features import Failures

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
    from lalia.features import egemaps_of, egemaps_store, extract, recordings

    folder = out or manifests[0].parent / "features" / "egemaps"
    rows = recordings(manifests)
    result = extract(rows, egemaps_store(folder), egemaps_of, (os.cpu_count() or 1) if workers is None else workers)
    _report(folder, result, len(rows), max_bad_fraction)


@app.command("whisper")
def whisper(
    manifests: Annotated[list[Path], typer.Argument(metavar="MANIFEST...", help="JSONL manifests; a row in several counts once.")],
    source: Annotated[str, typer.Option("--whisper", help="Folder, hub id or tiny (random).")] = "openai/whisper-base",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of feature folders; features beside the first manifest if absent.")
    ] = None,
    trim: Annotated[bool, typer.Option(help="Hear clips alone instead of in 30 s of silence: faster, other values.")] = False,
    layers: Annotated[str, typer.Option(help="last, index, list or weighted, as listen.layers of the run.")] = "last",
    numbers: Annotated[str, typer.Option(help="Layer numbers for these, such as 2,4,6.")] = "",
    batch_seconds: Annotated[float, typer.Option(help="Padded seconds encoded at once; bounds the memory.")] = 60.0,
    shard_mb: Annotated[float, typer.Option(help="Megabytes of a shard; a kill loses at most one.")] = 128.0,
    max_seconds: Annotated[float, typer.Option(help="Longer recordings fail; 0 = no limit.")] = 600.0,
    device: Annotated[str, typer.Option(help="auto (cuda, then mps, then cpu), cpu, mps, cuda or cuda:N.")] = "auto",
    max_bad_fraction: Annotated[float, typer.Option(help="Share of failed rows above which the exit code is 1.")] = 0.1,
) -> None:
    """What a frozen Whisper encoder hears, as WebDataset tar shards in float16. What is there is kept; a kill loses one shard.

    lalia features whisper data/asr/train.jsonl data/asr/valid.jsonl --trim (where omni-align looks for them)
    """
    from lalia import dist
    from lalia.cache import fill, whisper_store
    from lalia.features import recordings
    from lalia.pretrained.whisper import FrozenWhisper, describe_listener
    from lalia.sections import ExternalModel

    wanted = [int(number) for number in numbers.replace(",", " ").split()]
    description = describe_listener(ExternalModel(source=source), layers=layers, numbers=wanted, trim=trim)
    store = whisper_store(out or manifests[0].parent / "features", description)
    rows, place = recordings(manifests), dist.choose_device(device)
    ear = FrozenWhisper(description).to(place)
    ear.load_external(ExternalModel(source=source))
    result = fill(
        rows,
        store,
        lambda waves, lengths: ear.hear(waves.to(place), lengths.to(place)),
        batch_seconds=batch_seconds,
        shard_mb=shard_mb,
        longest_seconds=max_seconds,
    )
    typer.echo(f"{len(store)} recordings, {store.bytes / 1e6:.1f} MB in {len(store.shards)} shards, of {description['source']}")
    _report(store.folder, result, len(rows), max_bad_fraction)


def _report(folder: Path, result: Failures, rows: int, max_bad_fraction: float) -> None:
    """Say what was done; exit code 1 when too many rows failed."""
    from lalia.features import FAILURES

    typer.echo(f"{folder}: {result.text()}")
    for row, reason in result.failed[:10]:
        typer.secho(f"  {row}: {reason}", fg="yellow", err=True)
    if result.failed:
        typer.secho(f"all failures: {folder / FAILURES}", fg="yellow", err=True)
    if result.fraction > max_bad_fraction:
        share = f"{len(result)} of {rows} rows failed, above --max-bad-fraction {max_bad_fraction:g}"
        typer.secho(f"error: {share}", fg="red", err=True)
        raise typer.Exit(1)
