"""How much one request may ask for, and how a request is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Limits:
    """Bounds of the server. The model's own (its context, its number of recordings) come on top."""

    upload_mb: float = 25.0  # one HTTP request
    seconds: float = 300.0  # one recording
    recordings: int = 8  # one conversation
    tokens: int = 1024  # one answer
    characters: int = 4096  # one text to be spoken
    waiting: int = 8  # requests that wait for the model or use it

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"the limit {name} must be above 0, got {value}")

    @property
    def upload_bytes(self) -> int:
        return round(self.upload_mb * MEGABYTE)


class RequestError(ValueError):
    """A request that is refused: HTTP ``status``, and what OpenAI's clients show: message, ``param`` and ``code``."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The JSON of OpenAI's errors."""
        kind = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def refusal(error: Exception) -> RequestError | None:
    """The answer to an error that says what the client can do about it; None for a fault of the program."""
    from lalia import audio
    from lalia.cli import is_for_user

    if isinstance(error, RequestError):
        return error
    for kind, status, code in (
        (audio.AudioTooLong, 413, "audio_too_long"),
        (audio.EmptyAudio, 400, "audio_empty"),
        (audio.NotAudio, 415, "unsupported_audio"),
        (audio.AudioError, 422, "audio_damaged"),
    ):
        if isinstance(error, kind):
            return RequestError(str(error), status, "audio", code)
    if isinstance(error, ValueError) and is_for_user(error):
        return RequestError(str(error), 400, None, "model_refused")
    return None
