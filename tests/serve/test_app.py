"""The application without a socket: whose requests it takes, how much it reads of them, which packages it needs."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from serve_fake import Fake

pytest.importorskip("fastapi", reason="the extra 'serve' installs fastapi")

from lalia.serve import app as serving
from lalia.serve.engine import Engine
from lalia.serve.limits import Limits


@pytest.fixture
def engine() -> Iterator[Engine]:
    held = Engine(Fake(), "fake", Limits(upload_mb=0.1))
    yield held
    held.close()


def ask(
    app: Any, path: str, host: str = "localhost", chunks: list[bytes] | None = None, **headers: str
) -> tuple[int, bytes, int, Any]:
    """Status and body of the answer to one request whose body comes in ``chunks``, how many of them were read, and headers."""
    left, sent = list(chunks or [b""]), []
    total = len(left)

    async def receive() -> dict[str, Any]:
        if not left:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    fields = [(name.replace("_", "-").encode(), value.encode()) for name, value in {"host": host, **headers}.items()]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST" if chunks else "GET", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": fields,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))
    return (
        sent[0]["status"],
        b"".join(message.get("body", b"") for message in sent[1:]),
        total - len(left),
        dict(sent[0]["headers"]),
    )


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "localhost:7860", "127.0.0.1:7860", "[::1]:7860", "[::1]"])
def test_this_machines_names_are_answered(engine: Engine, host: str) -> None:
    status, body, *_ = ask(serving.build(engine, page=False, hosts=serving.LOCAL), "/healthz", host)
    assert status == 200 and json.loads(body)["status"] == "ok"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", ""]
)
def test_a_name_that_a_foreign_page_bound_to_this_machine_is_refused(engine: Engine, host: str) -> None:
    app = serving.build(engine, page=False, hosts=serving.LOCAL)
    for path in ("/healthz", "/v1/models", "/v1/chat/completions"):
        assert ask(app, path, host)[0] == 400
    assert ask(serving.build(engine, page=False), "/healthz", host or "any.example")[0] == 200  # --host 0.0.0.0


def test_a_body_without_a_length_is_read_up_to_the_limit_only(engine: Engine) -> None:
    app = serving.build(engine, page=False)
    for path, kind in (
        ("/v1/chat/completions", "application/json"),
        ("/v1/audio/transcriptions", "multipart/form-data; boundary=x"),
    ):
        chunks = [b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n', *[bytes(10_000)] * 1000]
        status, body, read, _ = ask(app, path, chunks=chunks, transfer_encoding="chunked", content_type=kind)
        assert status == 413 and json.loads(body)["error"]["code"] == "request_too_large"
        assert read <= 12


def test_a_declared_length_above_the_limit_is_refused_unread(engine: Engine) -> None:
    app = serving.build(engine, page=False)
    status, body, read, _ = ask(app, "/v1/chat/completions", chunks=[bytes(10)] * 3, content_length="100001")
    assert (status, read) == (413, 0) and "0.1 MB" in json.loads(body)["error"]["message"]


def test_browsers_are_told_to_load_nothing_foreign(engine: Engine) -> None:
    for path, chunks in (("/healthz", None), ("/none", None), ("/v1/chat/completions", [b"{}"])):
        headers = ask(serving.build(engine, page=False), path, chunks=chunks)[3]
        assert headers[b"content-security-policy"].startswith(b"default-src 'self' ") and b"://" not in serving.OwnContent.POLICY
        assert headers[b"x-content-type-options"] == b"nosniff"


def test_what_is_not_there_is_told_as_openai_does(engine: Engine) -> None:
    app = serving.build(engine, page=False)
    assert json.loads(ask(app, "/v1/embeddings", chunks=[b"{}"])[1])["error"]["type"] == "invalid_request_error"
    assert ask(app, "/v1/chat/completions")[0] == 405
    assert ask(app, "/docs")[0] == ask(app, "/openapi.json")[0] == 404


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.0.0.2", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("a.b", False),
    ],
)
def test_who_can_reach_an_address(host: str, local: bool) -> None:
    assert serving.is_local(host) is local


def test_a_port_that_cannot_be_had(engine: Engine) -> None:
    with serving.listen("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        assert port > 0 and socket.create_connection(("127.0.0.1", port)).close() is None
        with pytest.raises(OSError, match=f"cannot listen at 127.0.0.1 port {port} .*--port takes another"):
            serving.listen("127.0.0.1", port)
    serving.listen("127.0.0.1", port).close()  # free again at once
    with pytest.raises(OSError, match="--host no host: no such address"):
        serving.listen("no host", 0)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    with pytest.raises(ValueError, match=r"serving needs gradio: pip install 'lalia\[serve\]'"):
        serving.require_packages()
