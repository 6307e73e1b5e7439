"""``lalia config``: the resolved configuration."""

from __future__ import annotations

from typing import Annotated

import typer

from lalia.commands.shared import split_overrides


def config(
    items: Annotated[list[str], typer.Argument(metavar="[FILE] [KEY=VALUE]...", help="A YAML or JSON file, and overrides.")],
) -> None:
    """Print the complete configuration that a file and overrides amount to, as YAML.

    lalia config configs/vits2/tiny.yaml train.minutes=30

    lalia config system=vits2 (all defaults of a system)
    """
    from lalia.config import load_run_config, to_yaml

    files, overrides = split_overrides(items)
    if len(files) > 1:
        raise typer.BadParameter(f"one configuration file at most, got {', '.join(files)}")
    typer.echo(to_yaml(load_run_config(files[0] if files else None, overrides)), nl=False)
