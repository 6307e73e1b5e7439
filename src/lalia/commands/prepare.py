"""``lalia prepare``: a source of speech becomes manifests."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lalia.corpora import Report

SOURCES_HELP = "asterisk, folder, jsonl, list, synth, ljspeech or librispeech."
COMMON = ("sample_rate", "min_seconds", "max_seconds", "min_rate", "max_rate", "trim", "limit")


def prepare(
    source: Annotated[str, typer.Argument(help=SOURCES_HELP)],
    inputs: Annotated[list[str] | None, typer.Argument(help="Folders or files, for the sources that read some.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write; data/SOURCE if absent.")] = None,
    sample_rate: Annotated[int | None, typer.Option(help="Resample to this rate (Hz) and rewrite as flac.")] = None,
    min_seconds: Annotated[float | None, typer.Option(help="Shorter clips are rejected.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Longer clips are rejected.")] = None,
    min_rate: Annotated[float | None, typer.Option(help="Fewest letters a second.")] = None,
    max_rate: Annotated[float | None, typer.Option(help="Most letters a second.")] = None,
    trim: Annotated[bool | None, typer.Option(help="Cut silence at both ends.")] = None,
    speaker: Annotated[str | None, typer.Option(help="For sources that do not name the speaker.")] = None,
    language: Annotated[list[str] | None, typer.Option(help="Language; asterisk takes several (en es fr it ru).")] = None,
    limit: Annotated[int | None, typer.Option(help="Look at so many clips at most.")] = None,
    split: Annotated[str, typer.Option(help="Shares of train, valid and test.")] = "0.9,0.05,0.05",
    max_bad_fraction: Annotated[float, typer.Option(help="Share of unusable clips above which the exit code is 1.")] = 0.2,
    fallback: Annotated[str | None, typer.Option(help="Source to use when SOURCE cannot be had here: synth.")] = None,
    download: Annotated[str | None, typer.Option(help="asterisk: folder that keeps the packages.")] = None,
    metadata: Annotated[str | None, typer.Option(help="folder: the table of texts.")] = None,
    root: Annotated[str | None, typer.Option(help="list: folder the paths are relative to.")] = None,
    sentences: Annotated[int | None, typer.Option(help="synth: how many.")] = None,
    voice: Annotated[list[str] | None, typer.Option(help="synth: an espeak-ng voice; may be repeated.")] = None,
    words_per_minute: Annotated[int | None, typer.Option(help="synth: pace.")] = None,
) -> None:
    """Turn recordings with texts into train.jsonl, valid.jsonl, test.jsonl, rejected.jsonl and report.json.

    lalia prepare asterisk --sample-rate 16000 --fallback synth (real studio speech, no account, no root)

    lalia prepare folder ~/recordings --speaker me --language en -o data/me

    lalia prepare list filelists/train.list --root ~/Data -o data/mine
    """
    given = {name: value for name, value in locals().items() if value is not None}
    fixed = ("source", "out", "split", "max_bad_fraction", "fallback", "voice", "language")
    options: dict[str, Any] = {name: value for name, value in given.items() if name not in fixed}
    if voice:
        options["voices"] = voice
    if language:
        options.update(_languages(source, language))
    shares = _shares(split)
    typer.echo(run(source, out, fallback, options, split=shares, max_bad_fraction=max_bad_fraction).summary())


def run(source: str, out: Path | None, fallback: str | None, options: dict[str, Any], **settings: Any) -> Report:
    """Prepare ``source``; where it cannot be had, say so and prepare ``fallback`` with the options both understand."""
    from lalia.corpora import CorpusUnavailable, prepare

    try:
        return prepare(source, out or Path("data") / source, **settings, **options)
    except CorpusUnavailable as error:
        if not fallback or fallback == source:
            raise
        typer.secho(f"{source} cannot be had on this machine: {error}", fg="yellow", err=True)
        typer.secho(f"preparing {fallback!r} instead, as asked by --fallback: not real recordings", fg="yellow", err=True)
        shared = {name: value for name, value in options.items() if name in COMMON}
        return prepare(fallback, out or Path("data") / fallback, **settings, **shared)


def _languages(source: str, given: list[str]) -> dict[str, Any]:
    if source == "asterisk":
        return {"languages": given}
    if len(given) > 1:
        raise typer.BadParameter(f"prepare {source} takes one --language, got {', '.join(given)}")
    return {"language": given[0]}


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--split needs three numbers such as 0.9,0.05,0.05, got {text!r}") from error
