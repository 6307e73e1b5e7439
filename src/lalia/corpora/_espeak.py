"""espeak-ng through ctypes, as a script: reads jobs as JSON from stdin and writes 16-bit wavs.

It runs in a process of its own, because the C library is one global state, and imports nothing of Lalia, so that it
starts at once. A job is ``{"voice", "rate", "text", "path"}``; exit status 2 with a message on stderr means an unknown
voice.
The constants are those of espeak-ng's ``speak_lib.h`` (API 12).
"""

from __future__ import annotations

import ctypes
import json
import sys
import wave

AUDIO_OUTPUT_SYNCHRONOUS = 2
CHARS_UTF8 = 1
POSITION_CHARACTER = 1
RATE_PARAMETER = 1
UNKNOWN_VOICE = 2  # exit status
SEED = 1

Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)


class Espeak:
    """The library, opened once; the 16-bit samples of each sentence are collected by its callback."""

    def __init__(self) -> None:
        import espeakng_loader  # here, so that the module can be imported without it

        self.library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = str(espeakng_loader.get_data_path()).encode()
        self.sample_rate = int(self.library.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data, 0))
        if self.sample_rate <= 0:
            raise OSError(f"espeak_Initialize failed with {self.sample_rate}")
        self.samples = bytearray()
        self.callback = Callback(self._collect)  # kept: ctypes frees a callback that Python no longer holds
        self.library.espeak_SetSynthCallback(self.callback)

    def _collect(self, samples: int | None, count: int, _events: int | None) -> int:
        if samples and count > 0:
            self.samples += ctypes.string_at(samples, 2 * count)
        return 0

    def speak(self, voice: str, rate: int, text: str) -> bytes:
        """Mono 16-bit samples in the machine's byte order; KeyError for an unknown voice."""
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise KeyError(voice)
        self.library.espeak_SetParameter(RATE_PARAMETER, rate, 0)
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(SEED))  # breath noise is random, by the clock if not told
        self.samples = bytearray()
        encoded = text.encode("utf-8")
        status = self.library.espeak_Synth(
            encoded, ctypes.c_size_t(len(encoded) + 1), 0, POSITION_CHARACTER, 0, CHARS_UTF8, None, None
        )
        if status or self.library.espeak_Synchronize() or not self.samples:
            raise OSError(f"espeak-ng said nothing for {text!r}")
        return bytes(self.samples)


def main() -> int:
    """Speak every job on stdin."""
    espeak = Espeak()
    for job in json.load(sys.stdin):
        try:
            samples = espeak.speak(job["voice"], job["rate"], job["text"])
        except KeyError:
            print(f"espeak-ng has no voice {job['voice']!r}", file=sys.stderr)
            return UNKNOWN_VOICE
        with wave.open(job["path"], "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(espeak.sample_rate)
            file.writeframes(samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
