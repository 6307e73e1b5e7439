"""The command line: ``lalia`` and ``python -m lalia``. Commands are in :mod:`lalia.commands`; what they do is elsewhere.

Nothing heavy is imported here or there at the top, so that ``--help`` and ``config`` answer at once.
"""

from __future__ import annotations

import logging
import os
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lalia import __version__
from lalia.allocator import keep_freed_memory
from lalia.commands import (
    chat,
    config,
    convert,
    crossval,
    demo,
    doctor,
    emotion,
    evaluate,
    features,
    prepare,
    serve,
    smoke,
    speak,
    train,
)

PACKAGE = Path(__file__).resolve().parent
HANDLER = "lalia.cli"
INTERRUPTED = 130  # 128 + SIGINT, as shells count


class Commands(TyperGroup):
    """Prints errors that are for users as one line and exits with 1; errors of the program keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            typer.secho("interrupted", fg="yellow", err=True)
            raise typer.Exit(INTERRUPTED) from error
        except Exception as error:
            if not is_for_user(error):
                raise
            if debugging(ctx):
                traceback.print_exc()
            typer.secho(f"error: {error}", fg="red", err=True)
            raise typer.Exit(1) from error


def is_for_user(error: Exception) -> bool:
    """Whether the message says all that a user needs.

    True for every exception class of Lalia, for a ValueError or OSError that Lalia's own code raised, and for an OSError
    that names a file. A ValueError out of a library is a fault of the program: its traceback is needed.
    """
    if type(error).__module__.startswith("lalia."):
        return True
    if isinstance(error, OSError) and error.filename is not None:
        return True
    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and PACKAGE in Path(frames[-1].filename).resolve().parents
    return ours and isinstance(error, (ValueError, OSError))


def debugging(ctx: Any) -> bool:
    """Whether tracebacks are wanted: ``--verbose``, or ``LALIA_DEBUG`` in the environment."""
    return bool(ctx.params.get("verbose")) or os.environ.get("LALIA_DEBUG", "") not in ("", "0")


app = typer.Typer(
    name="lalia",
    cls=Commands,
    help="Lalia: train speech models and use them. Each command has examples in its own --help.",
    epilog="Begin with: lalia demo (15 minutes), or lalia prepare … and lalia train …",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("prepare")(prepare.prepare)
app.add_typer(doctor.app, name="doctor")
app.add_typer(features.app, name="features")
app.add_typer(convert.app, name="convert")
app.command("train")(train.train)
app.command("smoke")(smoke.smoke)
app.command("speak")(speak.speak)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("emotion")(emotion.emotion)
app.command("evaluate")(evaluate.evaluate)
app.command("crossval")(crossval.crossval)
app.command("config")(config.config)
app.command("demo")(demo.demo)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lalia {__version__}")
        raise typer.Exit


@app.callback()
def options(
    offline: Annotated[bool, typer.Option("--offline", help="Use no network: models come from folders and the cache.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="More messages, and tracebacks of errors.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    if offline:
        os.environ["LALIA_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    _log_to_stderr(verbose)


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Messages of Lalia as ``warning: …``. Silent while a training run writes the same messages to its own logs."""

    def filter(self, record: logging.LogRecord) -> bool:
        return logging.getLogger("lalia").handlers == [self]

    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {record.getMessage()}"


def _log_to_stderr(verbose: bool) -> None:
    logger = logging.getLogger("lalia")
    for old in [handler for handler in logger.handlers if handler.get_name() == HANDLER]:
        logger.removeHandler(old)
    handler = _Stderr()
    handler.set_name(HANDLER)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)


def main() -> None:
    """Entry point of the ``lalia`` script."""
    keep_freed_memory()
    app()
