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
from lalia.serve.studio import UNANSWERED, Studio, settled
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
    page = [{"role": "user", "content": "🎤"}]
    assert "3 recordings" in ask(studio, "more", None, page, full)[-1][0][-1]["content"]


def stopped(studio: Studio, text: str, after: int, shown: Any = (), told: Any = ()) -> tuple[Any, Any]:
    """The page and what the model is told when somebody stops the answer after so many updates of the page."""

    async def some() -> tuple[Any, Any]:
        answer = studio.ask(text, None, list(shown), list(told))
        for _ in range(after):
            history, known, *_ = await anext(answer)
        await answer.aclose()  # type: ignore[attr-defined]
        return list(map(dict, history)), known

    return asyncio.run(some())


def in_parts(history: Any) -> Any:
    """The history as Gradio hands it back."""
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in history]


@pytest.mark.parametrize("after", [2, 3, 4])
def test_a_stopped_answer_is_told_as_far_as_it_is_on_the_page(studio: Studio, after: int) -> None:
    first = ask(studio, "before")[-1]
    history, told = stopped(studio, "one two three", after, *first[:2])
    assert [m["content"] for m in settled(in_parts(history), told)[-1:]] == [history[-1]["content"]]
    page = in_parts(settled(history, told))
    said = "one two three"[: (3, 7, 13)[after - 2]]
    assert page[-1]["content"][0]["text"] == said
    later = ask(studio, "then", None, page, told)[-1]
    heard = [(message.role, message.text) for message in studio.engine.system.asked[-1]]
    assert heard[2:] == [("user", "one two three"), ("assistant", said), ("user", "then")]
    assert [(message.role, message.text) for message in later[1]] == [*heard, ("assistant", "then")]


def test_a_piece_that_was_told_and_did_not_arrive_is_shown(studio: Studio) -> None:
    history, _ = stopped(studio, "one two three", 2)
    _, told = stopped(studio, "one two three", 3)
    assert settled(history, told)[-1]["content"] == told[-1].text == "one two"


def test_a_question_stopped_before_its_answer_is_marked_and_not_told(studio: Studio) -> None:
    history, told = stopped(studio, "lost", 1, *ask(studio, "before")[-1][:2])
    assert settled(history, told)[-1]["content"] == UNANSWERED and settled(settled(history, told), told) == settled(history, told)
    page = ask(studio, "next", None, in_parts(history), told)[-1][0]
    assert [message.text for message in studio.engine.system.asked[-1]] == ["before", "before", "next"]
    assert page[3]["content"] == UNANSWERED


def test_an_error_in_the_middle_keeps_what_was_said(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(messages: Any, **_: Any) -> Any:
        yield "half"
        raise RequestError("no more")

    monkeypatch.setattr(studio.engine.system, "reply", broken)
    history, told, *_ = ask(studio, "say")[-1]
    assert [message["content"] for message in history] == ["say", "half", "⚠️ no more"]
    assert [message.text for message in told] == ["say", "half"] and settled(history, told) == history


def test_an_emptied_page_and_an_empty_answer(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(studio, "fresh", None, [], ask(studio, "old")[-1][1])
    assert [message.text for message in studio.engine.system.asked[-1]] == ["fresh"]
    monkeypatch.setattr(studio.engine.system, "reply", lambda messages, **_: iter(()))
    history, told, *_ = ask(studio, "silence")[-1]
    assert history[-1]["content"] == "∅" and told[-1].text == "" and settled(history, told) == history


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
