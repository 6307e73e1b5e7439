"""Synthetic speech from espeak-ng, for machines that cannot reach real speech. It needs pip alone, on every system.

The voice is robotic: a formant synthesiser, not a recording. It serves to try the whole path, and a model trained on it
sounds robotic too. espeak-ng is GPL-3; it is called in a process of its own, because its C library is one global state.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lalia.corpora._common import CorpusError, CorpusUnavailable, Options, PrepareResult, progress, select
from lalia.corpora._sentences import MOST_SENTENCES, sentences
from lalia.data import Row

CHUNK = 50  # sentences per process: the progress bar moves, and a crash names its neighbourhood
CHUNK_SECONDS = 300
NOTE = "this is synthetic, robotic speech made by espeak-ng, not recordings of people"


@dataclass
class SynthOptions(Options):
    """``voices`` are espeak-ng voices with an optional ``+variant`` that take turns from sentence to sentence."""

    sentences: int = 400
    voices: list[str] = field(default_factory=lambda: ["en-us", "en-us+f3", "en-gb-x-rp", "en-gb-scotland+m3"])
    words_per_minute: int = 165

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.sentences <= MOST_SENTENCES:
            raise CorpusError(f"sentences must be in 1…{MOST_SENTENCES}, got {self.sentences}")
        if not self.voices:
            raise CorpusError("voices must name at least one espeak-ng voice, such as en-us")
        if not 80 <= self.words_per_minute <= 450:
            raise CorpusError(f"words_per_minute must be in 80…450, got {self.words_per_minute}")


def prepare_synth(options: SynthOptions) -> PrepareResult:
    """Make ``options.sentences`` English clips. The same options give the same clips, sample by sample.

    Raises:
        CorpusUnavailable: espeakng-loader is not installed, or espeak-ng fails.
        CorpusError: an unknown voice.
    """
    if importlib.util.find_spec("espeakng_loader") is None:
        raise CorpusUnavailable("synthetic speech needs espeak-ng: `pip install espeakng-loader`")
    texts = sentences(min(options.sentences, options.limit or options.sentences))
    with tempfile.TemporaryDirectory(prefix="lalia-synth-") as folder:
        rows = list(_plan(texts, options.voices, Path(folder)))
        starts = range(0, len(rows), CHUNK)
        for start in progress(starts, "speaking with espeak-ng", options):
            _speak(rows[start : start + CHUNK], options.words_per_minute)
        result = select(rows, options, rewrite=True, trim=True)
    result.notes.append(NOTE)
    result.facts["voices"] = options.voices
    return result


def _plan(texts: list[str], voices: list[str], folder: Path) -> Iterator[Row]:
    for index, text in enumerate(texts):
        voice = voices[index % len(voices)]
        identifier = f"synth-{voice.replace('+', '-')}-{index:04d}"
        speaker = f"espeak-{voice}"
        yield Row(identifier, str(folder / f"{identifier}.wav"), text=text, speaker=speaker, language="en")


def _speak(rows: list[Row], words_per_minute: int) -> None:
    """Let a fresh process write the wavs of ``rows``."""
    jobs = [
        {"voice": row.speaker.removeprefix("espeak-"), "rate": words_per_minute, "text": row.text, "path": row.audio}
        for row in rows
    ]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("_espeak.py"))],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=CHUNK_SECONDS,
        check=False,
    )
    if done.returncode == 2:
        raise CorpusError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        complaint = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise CorpusUnavailable(f"espeak-ng failed at {rows[0].id} … {rows[-1].id}: {complaint}")
