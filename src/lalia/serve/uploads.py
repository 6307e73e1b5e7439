"""What clients send → :class:`lalia.system.Message` and waves. Sound is decoded from memory; no name, path or address that a client
sends is ever opened."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lalia import audio
from lalia.config import nearest
from lalia.serve.limits import Limits, RequestError
from lalia.system import Message

RATE = 16_000  # Hz, of every recording that a model hears
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
#: fields of OpenAI's requests that say nothing about the answer
IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options", "model", "messages",
}  # fmt: skip
#: fields that are accepted at the value that changes nothing
NEUTRAL: dict[str, Any] = {
    "n": 1, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "stop": None, "tools": None,
    "modalities": ["text"], "response_format": {"type": "text"}, "logit_bias": {},
}  # fmt: skip
SETTINGS = ("max_tokens", "max_completion_tokens", "temperature", "top_k", "seed", "stream")


def wave_of(data: bytes, limits: Limits, hint: str = "") -> np.ndarray:
    """Sound in any container → float32 [S] at 16 kHz. AudioError says why not."""
    return audio.decode_bytes(data, RATE, hint.rsplit("/", 1)[-1], limits.seconds)[0]


# --- conversations --------------------------------------------------------------------------------------------------
def messages_of(given: Any, limits: Limits) -> list[Message]:
    """OpenAI's ``messages`` → ours, recordings decoded. RequestError names the place of a mistake."""
    if not isinstance(given, list) or not given:
        raise RequestError("messages must be a list of at least one message", param="messages")
    messages = [_message(item, f"messages[{place}]", limits) for place, item in enumerate(given)]
    if messages[-1].role != "user":
        raise RequestError("the last message must be the user's, the one to be answered", param=f"messages[{len(given) - 1}].role")
    recordings = sum(len(message.audio) for message in messages)
    if recordings > limits.recordings:
        raise RequestError(f"{recordings} recordings, but one request may hold {limits.recordings}", param="messages")
    if not messages[-1].text.strip() and not messages[-1].audio:
        raise RequestError("the last message is empty: it needs a text or an input_audio part", param="messages")
    return messages


def _message(item: Any, where: str, limits: Limits) -> Message:
    if not isinstance(item, dict) or item.get("role") not in ROLES:
        role = item.get("role") if isinstance(item, dict) else item
        raise RequestError(f"{where}: a message has a role of {', '.join(ROLES)}, not {role!r}", param=f"{where}.role")
    message = Message(ROLES[item["role"]])
    content = item.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise RequestError(f"{where}: content must be a text or a list of parts", param=f"{where}.content")
    if len(parts) > 4 * limits.recordings:
        raise RequestError(f"{where}: {len(parts)} parts are too many", param=f"{where}.content")
    texts = []
    for place, part in enumerate(parts):
        at = f"{where}.content[{place}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "input_audio" and message.role == "user":
            if len(message.audio) >= limits.recordings:
                raise RequestError(f"{at}: one request may hold {limits.recordings} recordings", param=at)
            message.audio.append(_recording(part.get("input_audio"), at, limits))
        else:
            raise RequestError(f"{at}: parts are text and, from the user, input_audio; not {kind!r}", param=at)
    message.text = "\n".join(texts)
    return message


def _recording(given: Any, at: str, limits: Limits) -> np.ndarray:
    data = given.get("data") if isinstance(given, dict) else None
    if not isinstance(data, str):
        raise RequestError(f'{at}: give {{"data": base64 text, "format": "wav"}}', param=f"{at}.input_audio")
    try:
        decoded = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        said = "addresses and paths are not opened; " if "://" in data[:40] or data[:1] in "/." else ""
        raise RequestError(f"{at}: data is not base64 ({said}send the file's bytes)", param=f"{at}.input_audio.data") from error
    try:
        return wave_of(decoded, limits, "." + str(given.get("format", "")))
    except audio.AudioError as error:
        raise type(error)(f"{at}: {error}") from error


def settings_of(given: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Keyword arguments of ``reply``. What Lalia does not know, or cannot honour, is an error and never left out silently."""
    for name, value in given.items():
        if name in NEUTRAL and value is not None and value != NEUTRAL[name] and value not in ([], {}):
            raise RequestError(f"{name}={value!r} is not supported; leave it out", param=name, code="unsupported_parameter")
        if name not in NEUTRAL and name not in IGNORED and name not in SETTINGS:
            hint = nearest(name, [*SETTINGS, *NEUTRAL])
            raise RequestError(f"unknown field {name!r}{hint}", param=name, code="unknown_parameter")
    name = "max_completion_tokens" if given.get("max_completion_tokens") is not None else "max_tokens"
    return {
        "max_tokens": number(given, name, min(256, limits.tokens), 1, limits.tokens, whole=True),
        "temperature": number(given, "temperature", 0.0, 0.0, 2.0),
        "top_k": number(given, "top_k", 0, 0, 1_000_000, whole=True),
        "seed": number(given, "seed", 0, -(2**63), 2**63 - 1, whole=True),
    }


def number(given: Mapping[str, Any], name: str, default: float, low: float, high: float, whole: bool = False) -> Any:
    """A field within bounds; RequestError otherwise."""
    value = given.get(name)
    if value is None:
        return default
    good = isinstance(value, int) or (isinstance(value, float) and not whole)
    if not good or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{name} must be a{' whole' if whole else ''} number from {low} to {high}, not {value!r}", param=name)
    return value


def one_of(given: Mapping[str, Any], name: str, allowed: Sequence[str]) -> str:
    """A field with one of a few values; the first is the default."""
    value = given.get(name) or allowed[0]
    if value not in allowed:
        raise RequestError(f"{name} can be {', '.join(allowed)}, not {value!r}", param=name, code="unsupported_value")
    return str(value)
