"""``lalia convert``: models that other programs trained become run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Turn a model that another program trained into a run folder.", no_args_is_help=True)


@app.callback()
def convert() -> None:
    """Turn a model that another program trained into a run folder."""


@app.command("nanochat")
def nanochat(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder with model_<step>.pt and meta_<step>.json.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder to write.")],
    step: Annotated[int, typer.Option(help="Which step; the last one if absent.")] = -1,
    tokenizer: Annotated[
        str, typer.Option(help="tokenizer.tiktoken, a folder with tokenizer.json, or byte; looked for beside FOLDER if absent.")
    ] = "",
) -> None:
    """A nanochat checkpoint as an omni-base run, for omni-align to start from.

    lalia convert nanochat ~/.cache/nanochat/base_checkpoints/d12 -o runs/d12

    nanochat's tokenizer.pkl is not opened, since a pickle runs code; the error says how to export it.
    """
    from lalia.system import converter

    report = converter("nanochat")(folder, out, step, tokenizer)
    typer.echo(f"{out}: {report.text()}")
