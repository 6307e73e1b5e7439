"""The application: OpenAI's routes, the page, errors as OpenAI's JSON, bounded uploads. FastAPI carries it; uvicorn runs it."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import logging
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lalia.serve.engine import Engine
from lalia.serve.limits import RequestError, refusal
from lalia.serve.openai_routes import Routes

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger(__name__)

NEEDED = ("fastapi", "uvicorn", "python_multipart", "gradio")
LOCAL = ("127.0.0.1", "localhost", "[::1]")
CONNECTIONS = 64


def require_packages() -> None:
    """ImportError-free check that the extra ``serve`` is installed; ValueError says how to get it."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"serving needs {', '.join(missing)}: pip install 'lalia[serve]'")


def build(engine: Engine, *, page: bool = True, hosts: Sequence[str] = ("*",)) -> FastAPI:
    """The application of one engine.

    Args:
        page: mount the page to talk to at ``/`` (Gradio).
        hosts: values of the ``Host`` header that are answered; others get 400, which stops a foreign web page from reaching a
            server on this machine through a name of its own (DNS rebinding).
    """
    from fastapi import FastAPI
    from starlette.exceptions import HTTPException
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.routing import BaseRoute, Route

    routes = Routes(engine)
    folder = tempfile.TemporaryDirectory(prefix="lalia-serve-", ignore_cleanup_errors=True)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()
        folder.cleanup()

    table: list[BaseRoute] = [
        Route("/healthz", routes.health),
        Route("/v1/models", routes.models),
        Route("/v1/models/{name:path}", routes.model),
        Route("/v1/chat/completions", routes.chat, methods=["POST"]),
        Route("/v1/audio/transcriptions", routes.transcriptions, methods=["POST"]),
        Route("/v1/audio/speech", routes.speech, methods=["POST"]),
    ]
    # FastAPI's own pages of documentation load scripts from another host
    app = FastAPI(title="Lalia", docs_url=None, redoc_url=None, openapi_url=None, routes=table, lifespan=lifespan)
    app.add_exception_handler(Exception, _failed)
    app.add_exception_handler(ValueError, _failed)
    app.add_exception_handler(HTTPException, _failed)
    app.add_middleware(OwnContent)
    app.add_middleware(BodyLimit, most=engine.limits.upload_bytes)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    if page:
        from lalia.serve.studio import mount

        app = mount(app, engine, Path(folder.name))
    return app


async def _failed(request: Request, error: Exception) -> Response:
    """An error → OpenAI's JSON. A fault of the program is logged with its traceback and not shown to the client."""
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse

    if isinstance(error, HTTPException):
        error = RequestError(f"{request.url.path}: {error.detail}", error.status_code)
    known = refusal(error)
    if known is None:
        log.error("%s failed", request.url.path, exc_info=error)
        known = RequestError("the server failed; its log says why", 500)
    headers = {"Retry-After": "1"} if known.status == 429 else None
    return JSONResponse(known.body(), known.status, headers)


class BodyLimit:
    """ASGI middleware: a request body above ``most`` bytes is refused with 413, by its header or as it arrives."""

    def __init__(self, app: Any, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.most:
            await self._refuse(scope, receive, send)
            return
        got, begun = 0, False

        async def limited() -> Any:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > self.most:
                raise _TooLarge
            return message

        async def noted(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, limited, noted)
        except _TooLarge:
            if not begun:
                await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import JSONResponse

        message = f"the request is larger than {self.most / 1e6:g} MB; send less sound, or flac or ogg instead of wav"
        body = RequestError(message, 413, None, "request_too_large").body()
        await JSONResponse(body, 413, {"Connection": "close"})(scope, receive, send)


class OwnContent:
    """ASGI middleware: browsers load nothing from another host (a picture that an answer names would be fetched from there), and
    no other site may show the page in a frame."""

    POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'; form-action 'self'"
    HEADERS = ((b"content-security-policy", POLICY), (b"x-content-type-options", b"nosniff"))

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *self.HEADERS]
            await send(message)

        await self.app(scope, receive, with_headers)


class _TooLarge(BaseException):
    """Passes through the application, which would turn an Exception into its own answer."""


def is_local(host: str) -> bool:
    """Whether only this machine can reach a server bound to ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at ``host`` and ``port`` (0 = a free one), so that a port that cannot be had is told before a model
    is loaded. OSError says why not."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise OSError(f"--host {host}: no such address ({error.strerror})") from error
    held = socket.socket(family, kind)
    try:
        if os.name == "posix":  # elsewhere the option lets two programs have one port
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(address)
        held.listen(CONNECTIONS)
    except OSError as error:
        held.close()
        raise OSError(f"cannot listen at {host} port {port} ({error.strerror}); --port takes another, 0 a free one") from error
    return held


def run(engine: Engine, listener: socket.socket, host: str, page: bool = True) -> None:
    """Serve what comes to ``listener``, which :func:`listen` made for ``host``, until Ctrl-C or SIGTERM."""
    import uvicorn

    app = build(engine, page=page, hosts=LOCAL if is_local(host) else ("*",))
    config = uvicorn.Config(app, log_level="warning", limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=5)
    with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again once it has ended in order
        uvicorn.Server(config).run([listener])
