"""The routes, called by the real ``openai`` package over a real socket."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from factories import make_wave, write_container
from serve_fake import Fake, served, write_voice

from lalia import checkpoint
from lalia.serve.limits import Limits

openai = pytest.importorskip("openai", reason="the extra 'dev' installs openai")
pytest.importorskip("fastapi", reason="the extra 'serve' installs fastapi")
LIMITS = Limits(upload_mb=2, seconds=20, recordings=4, tokens=50, characters=200, waiting=3)


def client_of(address: str) -> Any:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def system() -> Fake:
    return Fake()


@pytest.fixture(scope="module")
def address(system: Fake) -> Iterator[str]:
    with served(system, LIMITS) as at:
        yield at


@pytest.fixture(scope="module")
def client(address: str) -> Any:
    return client_of(address)


def wav(seconds: float, rate: int = 16000, form: str = "WAV") -> bytes:
    held = io.BytesIO()
    soundfile.write(held, make_wave(seconds, rate), rate, format=form)
    return held.getvalue()


def part(data: bytes, form: str = "wav") -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": form}}


def ask(*parts: Any) -> list[Any]:
    return [{"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}]


def chat(client: Any, *parts: Any, **more: Any) -> Any:
    return client.chat.completions.create(model="fake", messages=ask(*parts), **more)


def error_of(run: Any, status: int) -> dict[str, Any]:
    with pytest.raises(openai.APIStatusError) as caught:
        run()
    assert caught.value.status_code == status, caught.value
    body = caught.value.response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return body


# --- chat -----------------------------------------------------------------------------------------------------------
def test_chat_hears_the_recording_and_counts(client: Any, system: Fake) -> None:
    said = chat(client, "what is said", part(wav(1.5)), temperature=0)
    assert said.choices[0].message.content == "1.5s what is said"
    assert said.choices[0].finish_reason == "stop" and said.model == "fake"
    assert (said.usage.prompt_tokens, said.usage.completion_tokens, said.usage.total_tokens) == (18, 4, 22)
    heard = system.asked[-1][0].audio[0]
    assert heard.dtype == np.float32 and np.allclose(heard, make_wave(1.5), atol=1e-4)


def test_the_stream_says_the_same_in_pieces(client: Any) -> None:
    chunks = list(chat(client, "one two three", part(wav(1)), stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert pieces == ["1.0s", " one", " two", " three"]
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage.completion_tokens == 4
    assert len({chunk.id for chunk in chunks}) == 1


def test_history_system_message_and_two_recordings(client: Any, system: Fake) -> None:
    messages = [{"role": "system", "content": "be short"}, *ask(part(wav(1)), "a"), {"role": "assistant", "content": "1.0s a"}]
    said = client.chat.completions.create(model="fake", messages=[*messages, *ask(part(wav(2)), part(wav(1)), "b")])
    assert said.choices[0].message.content == "2.0s 1.0s b"
    assert [message.role for message in system.asked[-1]] == ["system", "user", "assistant", "user"]


def test_text_alone_and_the_limit_of_tokens(client: Any) -> None:
    said = chat(client, "a b c d e", max_tokens=2)
    assert (said.choices[0].message.content, said.choices[0].finish_reason) == ("a b", "length")
    drawn = [chat(client, "a b c d e f g", temperature=1, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("form", ["FLAC", "OGG", "MP3"])
def test_every_container_is_heard(client: Any, form: str) -> None:
    assert chat(client, part(wav(1.5, 22050, form), form.lower())).choices[0].message.content == "1.5s"


@pytest.mark.parametrize("container", [("libopus", "webm", 48000), ("aac", "mp4", 16000)])
def test_what_browsers_and_telephones_record(client: Any, tmp_path: Path, container: tuple[str, str, int]) -> None:
    codec, name, rate = container
    write_container(tmp_path / name, make_wave(2, rate), rate, codec, name)
    said = chat(client, part((tmp_path / name).read_bytes(), name)).choices[0].message.content
    assert abs(float(said[:-1]) - 2) < 0.15


# --- bad input ------------------------------------------------------------------------------------------------------
def test_sound_that_cannot_be_used(client: Any) -> None:
    assert error_of(lambda: chat(client, part(b"")), 400)["code"] == "audio_empty"
    assert error_of(lambda: chat(client, part(wav(0))), 400)["code"] == "audio_empty"
    assert error_of(lambda: chat(client, part(b"this is a letter, not a sound" * 50)), 415)["code"] == "unsupported_audio"
    assert error_of(lambda: chat(client, part(wav(2)[:20000])), 422)["code"] == "audio_damaged"
    told = error_of(lambda: chat(client, part(wav(21, 8000, "FLAC"))), 413)
    assert told["code"] == "audio_too_long" and "limit of 20 s" in told["message"] and "messages[0].content[0]" in told["message"]


def test_an_hour_in_a_small_file_is_refused_before_it_is_decoded(client: Any, tmp_path: Path) -> None:
    held = io.BytesIO()
    soundfile.write(held, np.zeros(8000 * 3600, np.int16), 8000, format="FLAC")
    assert len(held.getvalue()) < 1_400_000
    assert error_of(lambda: chat(client, part(held.getvalue(), "flac")), 413)["code"] == "audio_too_long"
    write_container(tmp_path / "minute", np.zeros(8000 * 60, np.float32), 8000, "aac", "adts")  # no length in the header
    assert error_of(lambda: chat(client, part((tmp_path / "minute").read_bytes(), "aac")), 413)["code"] == "audio_too_long"


def test_a_request_above_the_limit(client: Any) -> None:
    told = error_of(lambda: chat(client, part(bytes(2_000_000))), 413)
    assert told["code"] == "request_too_large" and "2 MB" in told["message"]


def test_what_the_model_cannot_answer(client: Any) -> None:
    for stream in (False, True):
        told = error_of(lambda stream=stream: chat(client, "word " * 500, stream=stream), 400)
        assert "500 positions" in told["message"]
    assert "3 recordings" in error_of(lambda: chat(client, *[part(wav(0.5))] * 3), 400)["message"]
    assert "hold 4" in error_of(lambda: chat(client, *[part(wav(0.5))] * 5), 400)["message"]
    assert "is empty" in error_of(lambda: chat(client, " "), 400)["message"]


@pytest.mark.parametrize("address_", ["/etc/passwd", "file:///etc/passwd", "http://127.0.0.1/x.wav", "../x.wav"])
def test_no_path_or_address_is_opened(client: Any, address_: str) -> None:
    bad = {"type": "input_audio", "input_audio": {"data": address_, "format": "wav"}}
    assert "are not opened" in error_of(lambda: chat(client, bad), 400)["message"]


def test_playlists_open_nothing(client: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret.wav"
    secret.write_bytes(wav(1))
    lists = [
        f"ffconcat version 1.0\nfile '{secret}'\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=audio 9 RTP/AVP 0\na=control:file://{secret}\n",
    ]
    for sent in [part(text.encode(), form) for text in lists for form in ("wav", "ffconcat", "m3u8")]:
        assert error_of(lambda sent=sent: chat(client, sent), 415)["code"] == "unsupported_audio"


def test_requests_that_are_not_understood(client: Any, address: str) -> None:
    image = {"type": "image_url", "image_url": {"url": "x"}}
    assert error_of(lambda: chat(client, image), 400)["param"] == "messages[0].content[0]"
    assert error_of(lambda: chat(client, "a", n=2), 400)["param"] == "n"
    assert error_of(lambda: chat(client, "a", max_tokens=51), 400)["param"] == "max_tokens"
    assert error_of(lambda: chat(client, "a", temperature="hot"), 400)["param"] == "temperature"
    assert "did you mean" in error_of(lambda: chat(client, "a", extra_body={"temprature": 1}), 400)["message"]
    unknown = lambda: client.chat.completions.create(model="gpt", messages=ask("a"))  # noqa: E731
    assert error_of(unknown, 404)["code"] == "model_not_found"
    for messages in ([], "a", [{"role": "tool", "content": "x"}], [{"role": "assistant", "content": "x"}], [{"role": "user"}]):
        error_of(lambda messages=messages: client.chat.completions.create(model="fake", messages=messages), 400)
    assert "cannot speak" in error_of(lambda: client.audio.speech.create(model="fake", input="a", voice="x"), 400)["message"]


def test_a_fault_of_the_model_is_told_without_its_insides(system: Fake) -> None:
    broken = Fake()
    broken.broken = "secret state"
    with served(broken, LIMITS) as at:
        assert "secret" not in error_of(lambda: chat(client_of(at), "a b"), 500)["message"]
        with pytest.raises(openai.APIError, match="the model failed"):
            list(chat(client_of(at), "a b", stream=True))
        broken.broken = ""
        assert chat(client_of(at), "still alive").choices[0].message.content == "still alive"


# --- transcription, speech, models ----------------------------------------------------------------------------------
def test_transcriptions(client: Any) -> None:
    said = client.audio.transcriptions.create(model="fake", file=("x.flac", wav(2.5, 8000, "FLAC")))
    assert said.text.startswith("2.50 seconds, peak 0.")
    text = client.audio.transcriptions.create(model="fake", file=("x.wav", wav(1)), response_format="text")
    assert text.startswith("1.00 seconds, peak 0.")
    full = client.audio.transcriptions.create(model="fake", file=("x.wav", wav(1.5)), response_format="verbose_json", language="en")
    assert (full.duration, full.language, full.text[:4]) == (1.5, "en", "1.50")


def test_transcriptions_refuse(client: Any) -> None:
    make = client.audio.transcriptions.create
    assert "srt" in error_of(lambda: make(model="fake", file=("x.wav", wav(1)), response_format="srt"), 400)["message"]
    assert "'xx'" in error_of(lambda: make(model="fake", file=("x.wav", wav(1)), language="xx"), 400)["message"]
    assert error_of(lambda: make(model="fake", file=("x.wav", b"")), 400)["code"] == "audio_empty"
    assert error_of(lambda: make(model="fake", file=("../../x.wav", wav(21, 8000))), 413)["code"] == "audio_too_long"
    assert "prompt" in error_of(lambda: make(model="fake", file=("x.wav", wav(1)), prompt="p"), 400)["message"]
    bare = client.with_options()
    assert "no audio" in error_of(lambda: bare.post("/audio/transcriptions", cast_to=object, body={"model": "fake"},
        files={}, options={"headers": {"Content-Type": "multipart/form-data; boundary=x"}}), 400)["message"]  # fmt: skip


def test_models(client: Any) -> None:
    models = client.models.list().data
    assert [(model.id, model.capabilities) for model in models] == [("fake", ["reply", "transcribe"])]
    assert client.models.retrieve("fake").id == "fake"
    assert error_of(lambda: client.models.retrieve("other"), 404)["code"] == "model_not_found"


def test_speech_of_a_voice(tmp_path: Path) -> None:
    with served(checkpoint.load(write_voice(tmp_path)), Limits(seconds=1, characters=200)) as at:
        voice = client_of(at).audio.speech

        def say(text: str = "Alpha.", **more: Any) -> Any:
            return voice.create(**{"model": "fake", "input": text, "voice": "s0", "response_format": "wav", **more})

        sound, rate = soundfile.read(io.BytesIO(say(voice="default").content))
        again, _ = soundfile.read(io.BytesIO(say(response_format="flac").content))
        bare, fast = say(response_format="pcm"), say("Alpha bravo charlie.", response_format="pcm", speed=4)
        slow = say("Alpha bravo charlie.", response_format="pcm", speed=0.5)
        assert rate == 16000 and len(sound) > 1000 and np.abs(sound).max() > 0
        assert np.array_equal(sound, again)  # the default voice is the first, s0
        assert bare.response.headers["x-sample-rate"] == "16000"
        assert np.array_equal(np.frombuffer(bare.content, "<i2"), (sound * 32768).astype(np.int16))
        assert 0 < len(fast.content) < len(slow.content)
        assert "this run has s0, s1" in error_of(lambda: say(voice="alloy"), 400)["message"]
        assert "mp3" in error_of(lambda: say(response_format="mp3"), 400)["message"]
        assert "201 characters" in error_of(lambda: say("a" * 201), 400)["message"]
        assert "it can: speak" in error_of(lambda: chat(client_of(at), "hello"), 400)["message"]


# --- many clients ---------------------------------------------------------------------------------------------------
def test_one_at_a_time_and_a_full_line_is_told() -> None:
    slow = Fake(wait=0.15)
    with served(slow, LIMITS) as at:
        answers: list[Any] = []

        def one() -> None:
            try:
                answers.append(chat(client_of(at), "a b c").choices[0].message.content)
            except openai.RateLimitError as error:
                answers.append(error.status_code)

        threads = [threading.Thread(target=one) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert slow.most == 1
        assert sorted(map(str, answers)) == ["429"] * 3 + ["a b c"] * 3


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_stops_the_decoding(stream: bool) -> None:
    slow = Fake(wait=0.05)
    with served(slow, Limits(tokens=300)) as at:
        if stream:
            answer = chat(client_of(at), "word " * 300, stream=True, max_tokens=300)
            next(iter(answer))
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                chat(client_of(at).with_options(timeout=0.5), "word " * 300, max_tokens=300)
        end = time.monotonic() + 5
        while not slow.closed and time.monotonic() < end:
            time.sleep(0.05)
        assert slow.closed == 1 and slow.pieces < 100
        assert chat(client_of(at), "next").choices[0].message.content == "next"
