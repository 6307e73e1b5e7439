"""``lalia doctor env|data|config``: what would go wrong, said before the run. Exit code 1 where something would."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lalia.commands.shared import JSON_HELP, split_overrides

if TYPE_CHECKING:
    from lalia.doctor.report import Report

app = typer.Typer(help="Examine the machine, a corpus or a configuration before a run.", no_args_is_help=True)
JsonFile = Annotated[Path | None, typer.Option("--json", help=JSON_HELP)]


def _finish(report: Report, json: Path | None) -> None:
    from lalia.data import write_json
    from lalia.doctor import show

    show(report)
    if json is not None:
        write_json(json, report.to_dict())
    raise typer.Exit(report.exit_status)


@app.command("env")
def env(json: JsonFile = None) -> None:
    """Try each library on the device it would use; name missing extras.

    lalia doctor env
    """
    from lalia.doctor import doctor_env

    _finish(doctor_env(), json)


@app.command("data")
def data(
    items: Annotated[list[str], typer.Argument(metavar="[MANIFEST]... [KEY=VALUE]...", help="JSONL manifests.")],
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Judge as this configuration would.")] = None,
    valid: Annotated[list[Path] | None, typer.Option(help="A validation manifest, for phones unseen in training.")] = None,
    decode: Annotated[bool, typer.Option(help="Decode every clip; --no-decode trusts the file headers.")] = True,
    json: JsonFile = None,
) -> None:
    """Tell every clip's fate and reason, hours by speaker and language, batches, and phones unseen in training.

    lalia doctor data data/asterisk/train.jsonl --valid data/asterisk/valid.jsonl

    lalia doctor data data/asterisk/train.jsonl -c configs/vits2/tiny.yaml
    """
    from lalia.config import load_run_config
    from lalia.doctor import doctor_data

    manifests, overrides = split_overrides(items)
    if not manifests:
        raise typer.BadParameter("name at least one manifest")
    if overrides and config is None:
        raise typer.BadParameter(f"{overrides[0]} changes a configuration: give one with --config")
    settings = load_run_config(config, overrides) if config is not None else None
    _finish(doctor_data(manifests, settings, decode, valid or []), json)


@app.command("config")
def config(
    items: Annotated[list[str], typer.Argument(metavar="FILE [KEY=VALUE]...", help="A configuration, and overrides.")],
    json: JsonFile = None,
) -> None:
    """Check the files and models a configuration names; count parameters and estimate the memory of a step.

    lalia doctor config configs/vits2/tiny.yaml data.batch_size=32
    """
    from lalia.config import load_run_config
    from lalia.doctor import doctor_config

    files, overrides = split_overrides(items)
    if len(files) != 1:
        raise typer.BadParameter(f"name one configuration file, got {len(files)}")
    _finish(doctor_config(load_run_config(files[0], overrides)), json)
