"""``lalia chat``: talk to a run in the terminal, with recordings."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lalia.commands.shared import DEVICE_HELP, WHICH_HELP, load_system

if TYPE_CHECKING:
    from lalia.system import Message, Replies

RATE = 16_000
HELP = "/audio FILE: a recording for the next question   /new: forget the conversation   /quit: leave"


def chat(
    run: Annotated[Path, typer.Argument(help="Run folder, or one of its step-… folders.")],
    text: Annotated[str | None, typer.Argument(help="One question; without it the terminal is asked for questions.")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="A recording that goes with the first question (repeatable).")] = None,
    system_text: Annotated[str, typer.Option("--system", help="A text that stands before the conversation.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0.0)] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the likeliest so many tokens; 0 = all.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answer.")] = 0,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    which: Annotated[str, typer.Option(help=WHICH_HELP)] = "best",
) -> None:
    """Ask a trained model about recordings; the answer is written as it is decoded.

    lalia chat runs/omni "What is said?" --audio question.wav

    lalia chat runs/omni (asks for questions until the end of input; /help lists what else it takes)
    """
    from lalia.audio import read
    from lalia.system import Message, Replies

    waves = [read(path, RATE)[0] for path in audio or []]  # before the model is loaded
    system = load_system(run, which, device)
    if not isinstance(system, Replies):
        raise ValueError(f"{run} was trained as {system.config.system!r}, which cannot reply; `lalia chat` needs one that can")
    system.for_inference()
    settings = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "seed": seed}
    start = [Message("system", system_text)] if system_text else []
    if text is not None:
        answer(system, [*start, Message("user", text, waves)], settings)
        return
    talk(system, lines_of(sys.stdin), start, waves, settings)


def lines_of(source: Iterable[str]) -> Iterator[str]:
    """The lines of ``source``; one empty line where it has none, so that a recording alone is answered."""
    line = None
    for line in source:
        yield line
    if line is None:
        yield ""


def answer(system: Replies, messages: list[Message], settings: dict[str, Any]) -> str:
    """Write the reply to stdout piece by piece, and return it."""
    pieces = []
    for piece in system.reply(messages, **settings):
        pieces.append(piece)
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo()
    return "".join(pieces)


def talk(system: Replies, lines: Iterable[str], start: list[Message], waves: list[Any], settings: dict[str, Any]) -> None:
    """A conversation, one line of input a question. What cannot be answered is told, and the conversation goes on without it."""
    from lalia.audio import AudioError, read
    from lalia.system import Message

    messages = list(start)
    typer.echo(HELP, err=True)
    for line in map(str.strip, lines):
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command == "/new":
            messages, waves = list(start), []
        elif command == "/audio":
            try:
                waves = [*waves, read(rest.strip(), RATE)[0]]
                typer.echo(f"recording {len(waves)}: {len(waves[-1]) / RATE:.2f} s", err=True)
            except AudioError as error:
                typer.secho(f"error: {error}", fg="red", err=True)
        elif command.startswith("/"):
            typer.echo(HELP, err=True)
        elif line or waves:
            asked = Message("user", line, waves)
            try:
                messages += [asked, Message("assistant", answer(system, [*messages, asked], settings))]
                waves = []
            except ValueError as error:
                typer.secho(f"error: {error}", fg="red", err=True)
