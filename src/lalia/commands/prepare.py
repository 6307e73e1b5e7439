"""``lalia prepare``: a source of speech becomes manifests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lalia.corpora import Report

SOURCES_HELP = (
    "Speech with texts: asterisk, folder, jsonl, list, synth, ljspeech, librispeech. "
    "Emotion: dialogues, iemocap, msp_podcast, cremad, ravdess. For omni: text (no speech), sines, instructions."
)
EMOTION = "Emotion corpora"
COMMON = ("sample_rate", "min_seconds", "max_seconds", "min_rate", "max_rate", "trim", "limit")
FIXED = ("source", "out", "split", "max_bad_fraction", "fallback", "voice", "language", "settings")
SET_HELP = "Any other option of the source, KEY=VALUE (a list: a,b); may be repeated. A wrong KEY is told the right one."


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
    language: Annotated[list[str] | None, typer.Option(help="Language; asterisk and text take several.")] = None,
    limit: Annotated[int | None, typer.Option(help="Look at so many clips at most.")] = None,
    split: Annotated[str, typer.Option(help="Shares of train, valid and test.")] = "0.9,0.05,0.05",
    max_bad_fraction: Annotated[float, typer.Option(help="Share of unusable clips above which the exit code is 1.")] = 0.2,
    fallback: Annotated[str | None, typer.Option(help="Source to use when SOURCE cannot be had here: synth.")] = None,
    download: Annotated[str | None, typer.Option(help="asterisk, text: folder that keeps the packages.")] = None,
    metadata: Annotated[str | None, typer.Option(help="folder: the table of texts.")] = None,
    root: Annotated[str | None, typer.Option(help="list: folder the paths are relative to.")] = None,
    sentences: Annotated[int | None, typer.Option(help="synth: how many.")] = None,
    engine: Annotated[str | None, typer.Option(help="synth: espeak or flite.")] = None,
    voice: Annotated[list[str] | None, typer.Option(help="synth: a voice of the engine; may be repeated.")] = None,
    words_per_minute: Annotated[int | None, typer.Option(help="synth: pace of espeak.")] = None,
    texts: Annotated[list[str] | None, typer.Option(help="synth: manifest or .txt to speak; may be repeated.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="synth: manifest not to speak; may be repeated.")] = None,
    base: Annotated[
        list[str] | None,
        typer.Option(help="dialogues: asterisk, synth, manifest. instructions: manifests, folders.", rich_help_panel=EMOTION),
    ] = None,
    dialogues: Annotated[int | None, typer.Option(help="dialogues: how many.", rich_help_panel=EMOTION)] = None,
    turns: Annotated[int | None, typer.Option(help="dialogues: turns of each.", rich_help_panel=EMOTION)] = None,
    seed: Annotated[int | None, typer.Option(help="dialogues: other seed, other dialogues.", rich_help_panel=EMOTION)] = None,
    protocol: Annotated[str | None, typer.Option(help="iemocap: loso, or random5, which leaks.", rich_help_panel=EMOTION)] = None,
    improvised_only: Annotated[bool | None, typer.Option(help="iemocap: no scripted turns.", rich_help_panel=EMOTION)] = None,
    labels: Annotated[str | None, typer.Option(help="iemocap: a label table to use instead.", rich_help_panel=EMOTION)] = None,
    circumplex: Annotated[bool | None, typer.Option(help="cremad, ravdess: derive labels.", rich_help_panel=EMOTION)] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help=SET_HELP)] = None,
) -> None:
    """Turn recordings into train.jsonl, valid.jsonl, test.jsonl, rejected.jsonl and report.json (emotion: folds too).

    lalia prepare asterisk --sample-rate 16000 --fallback synth (real studio speech, no account, no root)

    lalia prepare folder ~/recordings --speaker me --language en -o data/me

    lalia prepare dialogues -o data/dialogues (valence and arousal, simulated)

    lalia prepare iemocap ~/IEMOCAP_full_release -o data/iemocap
    """
    given = {name: value for name, value in locals().items() if value is not None}
    options: dict[str, Any] = {name: value for name, value in given.items() if name not in FIXED}
    options.update(chosen(source, settings or [], voice or [], language or []))
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
        if source == "dialogues":
            return prepare(source, out or Path("data") / source, **settings, **{**options, "base": [fallback]})
        shared = {name: value for name, value in options.items() if name in COMMON}
        return prepare(fallback, out or Path("data") / fallback, **settings, **shared)


def chosen(source: str, settings: Sequence[str], voices: Sequence[str], languages: Sequence[str]) -> dict[str, Any]:
    """Options that depend on what the source has: ``--set``, ``--voice`` and one or several ``--language``."""
    from lalia.corpora import SOURCES

    types = {f.name: str(f.type) for f in fields(SOURCES[source].options)} if source in SOURCES else {}
    options: dict[str, Any] = {"voices": list(voices)} if voices else {}
    if "languages" in types and languages:
        options["languages"] = list(languages)
    elif len(languages) > 1:
        raise typer.BadParameter(f"prepare {source} takes one --language, got {', '.join(languages)}")
    elif languages:
        options["language"] = languages[0]
    for setting in settings:
        name, sign, text = setting.partition("=")
        if not sign:
            raise typer.BadParameter(f"--set needs KEY=VALUE, got {setting!r}")
        options[name] = _value(name, text, types.get(name, "str"))
    return options


def _value(name: str, text: str, kind: str) -> Any:
    """``text`` as the type that the option has; an unknown option stays text, and is refused by name later."""
    plain = kind.removesuffix(" | None")
    if plain.startswith("list"):
        return text.split(",")
    if plain == "bool" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    numeric = {"int": int, "float": float}
    try:
        return numeric[plain](text) if plain in numeric else {"str": text, "Path": Path(text)}[plain]
    except (ValueError, KeyError) as error:
        raise typer.BadParameter(f"--set {name} needs a {plain}, got {text!r}") from error


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"--split needs three numbers such as 0.9,0.05,0.05, got {text!r}") from error
