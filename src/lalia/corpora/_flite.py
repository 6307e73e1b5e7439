"""The program ``flite`` of Carnegie Mellon University: small English voices, several made from recordings of people.

It is called as a program, a process for each sentence. An unknown voice does not make it fail (it speaks with another), so voices
are compared with its own list first; nor does a file that it cannot write, so the sound is looked for afterwards.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lalia.config import nearest
from lalia.corpora._common import CorpusError, CorpusUnavailable

PROGRAM = "LALIA_FLITE"  # environment variable with the path of the program
VOICES = ("slt", "rms", "awb", "kal16")
STRETCHES = (0.9, 1.0, 1.15)
SECONDS = 60.0  # one sentence takes a twentieth of a second
HEADER_BYTES = 44  # a wav without a sample has no more
INSTALL = f"`apt-get install flite` (Debian, Ubuntu) or `brew install flite` (macOS); {PROGRAM}=PATH names one elsewhere"


@dataclass(frozen=True)
class Flite:
    """The program as it was found. ``version`` is '' where it does not tell; ``voices`` are those that it lists."""

    program: str
    version: str
    voices: tuple[str, ...]

    def check(self, voices: list[str]) -> None:
        """CorpusError names the first voice that it lacks."""
        for name in voices:
            if name not in self.voices:
                known = ", ".join(self.voices)
                raise CorpusError(f"flite has no voice {name!r}{nearest(name, self.voices)}; `flite -lv` lists {known}")

    def speak(self, text: str, voice: str, stretch: float, path: Path) -> str:
        """Write ``text`` to ``path`` as wav, whole or not at all. ``stretch`` multiplies durations. The complaint, '' if none."""
        said = f" {text}" if text.startswith("-") else text  # nothing that is spoken may look like an option
        part = path.with_suffix(".part")
        part.unlink(missing_ok=True)
        pace = ["--setf", f"duration_stretch={stretch:g}"]
        try:
            done = _run([self.program, "-voice", voice, *pace, "-t", said, "-o", str(part)])
        except (OSError, subprocess.TimeoutExpired, ValueError) as error:  # ValueError: a zero byte, half a surrogate
            return str(error)
        if done.returncode or not part.is_file() or part.stat().st_size <= HEADER_BYTES:
            part.unlink(missing_ok=True)
            return f"flite said nothing: {_last(done.stderr) or f'exit status {done.returncode}'}"
        os.replace(part, path)
        return ""


def find() -> Flite:
    """The program named by ``LALIA_FLITE``, else the one on PATH. CorpusUnavailable where there is none, or it does not run."""
    named = os.environ.get(PROGRAM, "")
    program = shutil.which(named or "flite")
    if program is None:
        missing = f"{PROGRAM}={named}: no such program" if named else "flite is not on this machine"
        raise CorpusUnavailable(f"{missing}. Install it: {INSTALL}")
    try:
        listed = _run([program, "-lv"])
        told = _run([program, "--version"])  # its exit status is 1 even so
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CorpusUnavailable(f"{program} does not run: {error}") from error
    names = listed.stdout.partition(":")[2].split()
    if listed.returncode or not names:
        raise CorpusUnavailable(f"`{program} -lv` lists no voices: {_last(listed.stderr) or f'exit status {listed.returncode}'}")
    version = re.search(r"flite-(\S+)", told.stdout)
    return Flite(program, version[1] if version else "", tuple(sorted(names)))


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
    )


def _last(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
