"""``lalia speak``: text to a sound file, with any run whose system can speak."""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lalia.commands.shared import DEVICE_HELP, WHICH_HELP, load_system, run_root

if TYPE_CHECKING:
    from lalia.system import SpeakRequest, Speaks, System


def speak(
    run: Annotated[Path, typer.Argument(help="Run folder, or one of its step-… folders.")],
    text: Annotated[str | None, typer.Argument(help="What to say; long texts are split into sentences.")] = None,
    out: Annotated[str, typer.Option("--out", "-o", help="A .wav or .flac file, a folder, or - (stdout).")] = "out.wav",
    text_file: Annotated[Path | None, typer.Option(help="Texts to say, one a line, instead of TEXT.")] = None,
    speaker: Annotated[str, typer.Option(help="Name of the voice; the first of the run if absent.")] = "",
    language: Annotated[str, typer.Option(help="Language of the text.")] = "en",
    noise_scale: Annotated[float, typer.Option(help="Variety of the sound.")] = 0.667,
    noise_scale_w: Annotated[float, typer.Option(help="Variety of the rhythm.")] = 0.8,
    length_scale: Annotated[float, typer.Option(help="Above 1 is slower.")] = 1.0,
    sdp_ratio: Annotated[float, typer.Option(help="Durations: 1 all stochastic, 0 all deterministic.")] = 0.2,
    seed: Annotated[int, typer.Option(help="The same seed gives the same speech.")] = 0,
    max_seconds: Annotated[float, typer.Option(help="Limit of one sentence.")] = 60.0,
    pause: Annotated[float, typer.Option(help="Seconds of silence between sentences.")] = 0.25,
    reference: Annotated[str, typer.Option(help="A recording of the voice, for models that take one.")] = "",
    stream: Annotated[bool, typer.Option("--stream", help="Write as it is decoded; -o - writes raw 16-bit PCM.")] = False,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    which: Annotated[str, typer.Option(help=WHICH_HELP)] = "best",
) -> None:
    """Say a text with a trained voice.

    lalia speak runs/demo "Please hold the line." -o hold.wav --length-scale 1.1

    lalia speak runs/demo --text-file lines.txt -o spoken/ (one file a line)

    lalia speak runs/demo "A long story." --stream -o - | aplay -f S16_LE -r 16000
    """
    from lalia.system import SpeakRequest, Speaks

    texts = _texts(text, text_file)
    _check_out(out, stream, len(texts))
    system = load_system(run, which, device)
    if not isinstance(system, Speaks):
        raise ValueError(f"{run} was trained as {_name(system)!r}, which cannot speak; `lalia speak` needs a speaking system")
    system.for_inference()
    request = SpeakRequest(
        "", speaker, language, noise_scale, noise_scale_w, length_scale, sdp_ratio, seed, max_seconds, pause, reference
    )
    requests = [replace(request, text=line) for line in texts]
    if stream:
        _stream(system, requests[0], out, sample_rate(run))
    else:
        _offline(system, requests, out)


def _name(system: System) -> str:
    return system.config.system or type(system).__name__


def _texts(text: str | None, file: Path | None) -> list[str]:
    if (text is None) == (file is None):
        raise typer.BadParameter("give a TEXT or --text-file, one of them")
    if file is None:
        return [text or ""]
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text") from error
    if not lines:
        raise ValueError(f"{file} holds no text")
    return lines


def _check_out(out: str, stream: bool, texts: int) -> None:
    """Wrong combinations are told before the model is loaded."""
    if stream and texts > 1:
        raise typer.BadParameter("--stream says one text; a file of several lines goes without it")
    if out == "-" and not stream:
        raise typer.BadParameter("-o - needs --stream")
    if stream and out != "-" and Path(out).suffix.lower() != ".wav":
        raise typer.BadParameter(f"--stream writes a .wav file, not {out}")


def _offline(system: Speaks, requests: list[SpeakRequest], out: str) -> None:
    """One file per text when ``out`` is a folder (or has no suffix), else all texts in one file."""
    import numpy as np

    from lalia import audio

    started = time.perf_counter()
    speeches = system.speak(requests)
    took, rate = time.perf_counter() - started, speeches[0].sample_rate
    path = Path(out)
    if path.suffix and not path.is_dir():
        gap = np.zeros(int(requests[0].pause * rate), np.float32)
        waves = [piece for speech in speeches for piece in (gap, speech.wave)][1:]
        audio.write(path, np.concatenate(waves), rate)
    else:
        for number, speech in enumerate(speeches, start=1):
            audio.write(path / f"{number:04d}.wav", speech.wave, rate)
    for note in dict.fromkeys(note for speech in speeches for note in speech.notes):
        typer.secho(f"note: {note}", fg="yellow", err=True)
    seconds = sum(len(speech.wave) for speech in speeches) / rate
    typer.echo(f"{out}: {seconds:.2f} s of speech at {rate} Hz, made in {took:.2f} s ({took / seconds:.3f} s a second)")


def sample_rate(run: Path) -> int:
    """The rate of a run's sound, from its configuration: a stream has to be opened before its first sample is there."""
    from lalia.config import load_run_config

    return int(load_run_config(run_root(run) / "config.yaml")["audio"]["sample_rate"])


def _stream(system: Speaks, request: SpeakRequest, out: str, rate: int) -> None:
    import numpy as np
    import soundfile

    started = time.perf_counter()
    chunks = system.speak_stream(request)
    first = next(chunks)  # before the file is opened: a text that cannot be said leaves no file
    delay = time.perf_counter() - started
    if out == "-":
        for chunk in itertools.chain([first], chunks):
            sys.stdout.buffer.write((np.clip(chunk, -1, 1) * 32767).astype("<i2").tobytes())
            sys.stdout.buffer.flush()
        return
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    with soundfile.SoundFile(out, "w", rate, 1, "PCM_16") as file:
        for chunk in itertools.chain([first], chunks):
            file.write(np.clip(chunk, -1, 1))
            file.flush()
        samples = file.tell()
    typer.echo(f"{out}: {samples / rate:.2f} s of speech at {rate} Hz, the first of it after {delay:.2f} s")
