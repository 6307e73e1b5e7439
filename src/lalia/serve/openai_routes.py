"""The routes that OpenAI's clients call: chat completions with sound, transcriptions, speech, models.

Each takes Starlette's ``Request`` and raises :class:`lalia.serve.limits.RequestError` or what the model raised;
:mod:`lalia.serve.app` turns both into OpenAI's error JSON. Reference: OpenAI's API reference, version 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lalia.serve.engine import Engine
from lalia.serve.limits import RequestError, refusal
from lalia.serve.uploads import RATE, messages_of, number, one_of, settings_of, wave_of
from lalia.system import Message, SpeakRequest, Speech

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

TRANSCRIPTS = ("json", "text", "verbose_json")
SOUNDS = {"wav": "audio/wav", "flac": "audio/flac", "pcm": "audio/pcm"}
TRANSCRIBE_FIELDS = ("file", "model", "language", "response_format", "temperature", "stream")
SPEAK_FIELDS = ("model", "input", "voice", "response_format", "speed", "language", "seed", "stream_format")


class Routes:
    """The handlers, bound to one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.limits = engine, engine.limits
        self.started = int(time.time())
        self.decoding = asyncio.Semaphore(2)  # uploads decoded at a time: each may take max seconds of memory

    async def _json(self, request: Request) -> dict[str, Any]:
        try:
            given = json.loads(await request.body())
        except ValueError as error:
            raise RequestError(f"the body is not JSON: {error}") from error
        if not isinstance(given, dict):
            raise RequestError("the body must be a JSON object")
        self._model(given.get("model"))
        return given

    def _model(self, name: Any) -> None:
        if name != self.engine.name:
            raise RequestError(f"no model {name!r} here; this server has {self.engine.name!r}", 404, "model", "model_not_found")

    async def _decode(self, function: Any, *arguments: Any) -> Any:
        async with self.decoding:
            return await asyncio.to_thread(function, *arguments)

    # --- what there is ----------------------------------------------------------------------------------------------
    async def health(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        engine = self.engine
        return JSONResponse(
            {"status": "ok", "model": engine.name, "capabilities": engine.capabilities, "waiting": engine.count}
        )

    def _card(self) -> dict[str, Any]:
        engine = self.engine
        return {
            "id": engine.name, "object": "model", "created": self.started, "owned_by": "lalia", "capabilities": engine.capabilities,
        }  # fmt: skip

    async def models(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        from starlette.responses import JSONResponse

        self._model(request.path_params["name"])
        return JSONResponse(self._card())

    # --- chat -------------------------------------------------------------------------------------------------------
    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``: text and ``input_audio`` parts in, text out, whole or as server-sent events."""
        from starlette.responses import JSONResponse, StreamingResponse

        given = await self._json(request)
        system, settings = self.engine.require("reply"), settings_of(given, self.limits)
        messages = await self._decode(messages_of, given.get("messages"), self.limits)
        stream = self.engine.stream(lambda: system.reply(messages, **settings))
        first = await anext(stream, "")  # a refusal comes before the status line is sent
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.engine.name}
        if given.get("stream"):
            wanted = bool((given.get("stream_options") or {}).get("include_usage"))
            events = self._events(head, first, stream, messages, settings["max_tokens"], wanted)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        async with contextlib.aclosing(stream):
            pieces = [first]
            async for piece in stream:
                pieces.append(piece)
                if await request.is_disconnected():
                    raise RequestError("the client went away", 499)
        text = "".join(pieces)
        usage = await self.engine.run(self.engine.usage, messages, text)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": _finish(usage, settings["max_tokens"], len(pieces)),
        }
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})

    async def _events(
        self, head: dict[str, Any], first: str, stream: AsyncGenerator[str, None], messages: list[Message], limit: int, wanted: bool
    ) -> AsyncIterator[str]:
        """The answer as chunks. An error in the middle becomes an event, since the status is already sent."""
        head = {**head, "object": "chat.completion.chunk"}

        def event(delta: dict[str, str], finish: str | None = None) -> str:
            return _sse({**head, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]})

        pieces = [first]
        async with contextlib.aclosing(stream):
            yield event({"role": "assistant", "content": first})
            try:
                async for piece in stream:
                    pieces.append(piece)
                    yield event({"content": piece})
                usage = await self.engine.run(self.engine.usage, messages, "".join(pieces))
            except (ValueError, RuntimeError) as error:
                known = refusal(error)
                yield _sse((known or RequestError("the model failed; see the server's log", 500)).body())
                if known is None:
                    raise
                return
        yield event({}, _finish(usage, limit, len(pieces)))
        if wanted:
            yield _sse({**head, "choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    # --- transcription ----------------------------------------------------------------------------------------------
    async def transcriptions(self, request: Request) -> Response:
        """``POST /v1/audio/transcriptions``: a multipart ``file`` → json, text or verbose_json (without times: none are known)."""
        from starlette.datastructures import UploadFile
        from starlette.responses import JSONResponse, PlainTextResponse

        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise RequestError("send multipart/form-data with a part named file", 415)
        async with request.form(max_files=1, max_fields=20) as form:
            fields = {name: value for name, value in form.items() if isinstance(value, str)}
            unknown = set(form) - set(TRANSCRIBE_FIELDS)
            if unknown:
                raise RequestError(f"{', '.join(sorted(unknown))}: not supported; leave it out", code="unknown_parameter")
            upload = form.get("file")
            if not isinstance(upload, UploadFile):
                raise RequestError("no audio: the form needs a part named file, with a file name", param="file")
            self._model(fields.get("model"))
            system, kind = self.engine.require("transcribe"), one_of(fields, "response_format", TRANSCRIPTS)
            if fields.get("stream", "false").lower() not in ("false", "0") or fields.get("temperature", "0") not in ("0", "0.0"):
                raise RequestError("stream and a temperature above 0 are not supported here", code="unsupported_parameter")
            data, hint = await upload.read(), upload.filename or upload.content_type or ""
        wave = await self._decode(wave_of, data, self.limits, hint)
        language = fields.get("language", "")
        text = (await self.engine.run(system.transcribe, [wave], language))[0]
        if kind == "text":
            return PlainTextResponse(text + "\n")
        seconds = round(len(wave) / RATE, 3)
        more = {"task": "transcribe", "language": language or "unknown", "duration": seconds} if kind == "verbose_json" else {}
        return JSONResponse({"text": text, **more, "usage": {"type": "duration", "seconds": int(np.ceil(seconds))}})

    # --- speech -----------------------------------------------------------------------------------------------------
    async def speech(self, request: Request) -> Response:
        """``POST /v1/audio/speech``: text → wav, flac, or pcm (16-bit little-endian mono at the rate in ``X-Sample-Rate``).

        ``voice`` is a speaker of the run, or ``default`` for its first.
        """
        from starlette.responses import Response

        given = await self._json(request)
        system, kind = self.engine.require("speak"), one_of(given, "response_format", list(SOUNDS))
        unknown = set(given) - set(SPEAK_FIELDS)
        if unknown or given.get("stream_format", "audio") != "audio":
            raise RequestError(f"{', '.join(sorted(unknown)) or 'stream_format'}: not supported", code="unknown_parameter")
        asked = SpeakRequest(_text(given, self.limits.characters), max_seconds=self.limits.seconds)
        asked.length_scale = 1.0 / number(given, "speed", 1.0, 0.25, 4.0)
        asked.seed = number(given, "seed", 0, 0, 2**31 - 1, whole=True)
        voice, asked.language = given.get("voice") or "", str(given.get("language") or "en")
        asked = replace(asked, speaker="" if voice == "default" else str(voice))
        spoken: Speech = (await self.engine.run(system.speak, [asked]))[0]
        headers = {"X-Sample-Rate": str(spoken.sample_rate)}
        if spoken.notes:
            headers["X-Notes"] = "; ".join(spoken.notes).encode("ascii", "replace").decode()
        return Response(encode(spoken, kind), media_type=SOUNDS[kind], headers=headers)


def to_16_bit(wave: np.ndarray) -> np.ndarray:
    """float [S] in [-1, 1] → int16 [S]."""
    return np.rint(np.clip(wave, -1, 1) * 32767).astype(np.int16)


def encode(speech: Speech, kind: str) -> bytes:
    """16-bit ``wav``, ``flac`` or bare ``pcm`` of a speech."""
    import soundfile

    samples = to_16_bit(speech.wave)  # here, since soundfile rounds differently for each format
    if kind == "pcm":
        return samples.astype("<i2").tobytes()
    held = io.BytesIO()
    soundfile.write(held, samples, speech.sample_rate, format=kind.upper(), subtype="PCM_16")
    return held.getvalue()


def _text(given: dict[str, Any], longest: int) -> str:
    text = given.get("input")
    if not isinstance(text, str) or not text.strip():
        raise RequestError("input must be a text to speak", param="input")
    if len(text) > longest:
        raise RequestError(f"input has {len(text)} characters, the limit is {longest}; send it in parts", param="input")
    return text


def _sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _finish(usage: dict[str, int] | None, limit: int, pieces: int) -> str:
    """``length`` when the answer was cut at the limit. Where tokens cannot be counted, pieces are."""
    return "length" if (usage["completion_tokens"] if usage else pieces) >= limit else "stop"
