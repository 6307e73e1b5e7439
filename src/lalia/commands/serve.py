"""``lalia serve``: a page to talk to and OpenAI's routes, for any run that can reply, transcribe or speak."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lalia.commands.shared import DEVICE_HELP, WHICH_HELP, load_system, run_root


def serve(
    run: Annotated[Path, typer.Argument(help="Run folder, or one of its step-… folders.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.", min=0, max=65535)] = 7860,
    name: Annotated[str, typer.Option(help="Name of the model for clients; the run folder's if absent.")] = "",
    page: Annotated[bool, typer.Option("--page/--no-page", help="With or without the page to talk to.")] = True,
    max_upload_mb: Annotated[float, typer.Option(help="Largest request.")] = 25.0,
    max_seconds: Annotated[float, typer.Option(help="Longest recording.")] = 300.0,
    max_recordings: Annotated[int, typer.Option(help="Most recordings in one conversation.")] = 8,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 1024,
    max_waiting: Annotated[int, typer.Option(help="Most requests in line for the model.")] = 8,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    which: Annotated[str, typer.Option(help=WHICH_HELP)] = "best",
) -> None:
    """Serve a trained model on http://127.0.0.1:7860.

    lalia serve runs/omni

    lalia serve runs/omni --port 8000 --max-seconds 60 --no-page

    Clients of OpenAI's API take http://127.0.0.1:7860/v1 as their base URL (the routes chat/completions, audio/transcriptions,
    audio/speech and models) and any key.
    """
    from lalia.serve import app
    from lalia.serve.engine import Engine
    from lalia.serve.limits import Limits

    app.require_packages()
    limits = Limits(max_upload_mb, max_seconds, max_recordings, max_tokens, waiting=max_waiting)
    listener = app.listen(host, port)  # a taken port is told before the model is loaded
    system = load_system(run, which, device)
    engine = Engine(system, name or run_root(run).resolve().name, limits)
    if not engine.capabilities:
        raise ValueError(f"{run} was trained as {system.config.system!r}, which can neither reply nor transcribe nor speak")
    system.for_inference()
    if not app.is_local(host):
        typer.secho(f"warning: {host} lets other machines in, and nobody is asked for a password", fg="yellow", err=True)
    where = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    typer.echo(f"{engine.name} ({', '.join(engine.capabilities)}) at {where}; stop with Ctrl-C")
    app.run(engine, listener, host, page)
