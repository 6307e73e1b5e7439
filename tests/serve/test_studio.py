"""What the buttons of the page do, called without a page: recordings do not stay, foreign files are not opened."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import make_wave, write_wav
from serve_fake import Fake

from lalia.serve.engine import Engine
from lalia.serve.limits import Limits, RequestError
from lalia.serve.studio import Studio
from lalia.system import Message, SpeakRequest, Speech, System


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    (tmp_path / "held").mkdir()
    return Studio(Engine(Fake(), "fake", Limits(upload_mb=0.1, seconds=5, recordings=2)), tmp_path / "held")


def ask(studio: Studio, text: str, path: Path | None = None, shown: Any = (), told: Any = ()) -> list[Any]:
    """Everything that the page is given in answer to one question."""

    async def all_of() -> list[Any]:
        given = studio.ask(text, str(path) if path else None, list(shown), list(told))
        return [(list(map(dict, history)), known, *rest) async for history, known, *rest in given]

    return asyncio.run(all_of())


def test_a_recording_is_deleted_once_it_is_heard(studio: Studio) -> None:
    path = studio.folder / "a" / "recording.wav"
    write_wav(path, 1.0)
    wave = studio.wave(str(path))
    assert wave is not None and np.allclose(wave, make_wave(1.0), atol=1e-4)
    assert not path.exists()


@pytest.mark.parametrize("content", [b"", b"no sound at all" * 100, bytes(200_000)])
def test_a_recording_that_cannot_be_heard_is_deleted_too(studio: Studio, content: bytes) -> None:
    path = studio.folder / "recording.wav"
    path.write_bytes(content)
    with pytest.raises(ValueError):
        studio.wave(str(path))
    assert not path.exists()


def test_files_of_others_are_neither_read_nor_deleted(studio: Studio, tmp_path: Path) -> None:
    write_wav(tmp_path / "own.wav", 1.0)
    (studio.folder / "link.wav").symlink_to(tmp_path / "own.wav")
    for path in (tmp_path / "own.wav", studio.folder / ".." / "own.wav", studio.folder / "link.wav", studio.folder / "none.wav"):
        with pytest.raises(RequestError, match="gone from the server"):
            studio.wave(str(path))
    assert (tmp_path / "own.wav").is_file()


def test_the_history_grows_and_the_model_is_told_all_of_it(studio: Studio) -> None:
    write_wav(studio.folder / "first.wav", 2.0)
    first = ask(studio, "one two", studio.folder / "first.wav")
    assert [history[-1]["content"] for history, *_ in first] == ["…", "2.0s", "2.0s one", "2.0s one two", "2.0s one two"]
    history, told, text, sound = first[-1]
    assert history[0] == {"role": "user", "content": "🎤 2.0 s\n\none two"} and (text, sound) == ("", None)
    ask(studio, "three", None, history, told)
    assert [(message.role, len(message.audio)) for message in studio.engine.system.asked[-1]] == [
        ("user", 1), ("assistant", 0), ("user", 0),
    ]  # fmt: skip


def test_errors_stand_in_the_history_and_are_not_told_to_the_model(studio: Studio) -> None:
    for text, said in (("", "record or choose a sound"), ("word " * 500, "500 positions")):
        history, told, *_ = ask(studio, text)[-1]
        assert history[-1]["content"].startswith("⚠️") and said in history[-1]["content"] and told == []
        assert all(message["content"] != "…" for message in history)
    full = [Message("user", "", [make_wave(0.1)] * 3)]
    assert "3 recordings" in ask(studio, "more", None, [], full)[-1][0][-1]["content"]


def test_a_model_that_only_transcribes_or_speaks(studio: Studio) -> None:
    class Scribe(System):
        def __init__(self) -> None: ...

        def transcribe(self, waves: Any, language: str = "") -> list[str]:
            return [f"{len(wave)} samples" for wave in waves]

    class Voice(System):
        def __init__(self) -> None: ...

        def speak(self, requests: list[SpeakRequest]) -> list[Speech]:
            return [Speech(np.array([0.0, 2.0, -0.5], np.float32), 8000, [f"spoken by {requests[0].speaker}"])]

        def speak_stream(self, request: SpeakRequest, chunk_frames: int = 64) -> Any: ...

    studio.engine.system = Scribe()
    write_wav(studio.folder / "said.wav", 0.5)
    assert ask(studio, "", studio.folder / "said.wav")[-1][0][-1]["content"] == "8000 samples"
    assert "only writes down" in ask(studio, "hello")[-1][0][-1]["content"]
    studio.engine.system = Voice()
    sound, note = asyncio.run(studio.say("hello", " anna "))
    assert sound is not None and sound[0] == 8000 and sound[1].tolist() == [0, 32767, -16384] and note == "spoken by anna"
    assert asyncio.run(studio.say(" ", ""))[1].startswith("⚠️ write 1 to")
