"""One model, one thread: requests wait in line for it, and a client that goes away gives its place up."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from lalia.serve.limits import Limits, RequestError
from lalia.system import CountsTokens, Message, Replies, Speaks, System, Transcribes

Item = TypeVar("Item")
END = object()


class Engine:
    """The system that is served.

    A single worker thread is the lock on the model: whatever uses the model runs there, one request after another. At most
    ``limits.waiting`` requests are in line; the next is refused with 429, so that a crowd cannot fill the memory.
    """

    def __init__(self, system: System | Any, name: str, limits: Limits | None = None) -> None:
        self.system, self.name, self.limits = system, name, limits or Limits()
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="lalia-model")
        self.count, self.guard = 0, threading.Lock()

    @property
    def capabilities(self) -> list[str]:
        """What the system can do: ``reply``, ``transcribe``, ``speak``."""
        kinds = (("reply", Replies), ("transcribe", Transcribes), ("speak", Speaks))
        return [name for name, kind in kinds if isinstance(self.system, kind)]

    def require(self, capability: str) -> Any:
        """The system, or RequestError when it has no such capability."""
        if capability not in self.capabilities:
            able = ", ".join(self.capabilities) or "do nothing that is served"
            raise RequestError(f"the model {self.name!r} cannot {capability}; it can: {able}", 400, "model", "unsupported")
        return self.system

    def close(self) -> None:
        self.worker.shutdown(wait=False, cancel_futures=True)

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place in the line. RequestError (429) when it is full."""
        with self.guard:
            if self.count >= self.limits.waiting:
                raise RequestError(f"{self.count} requests are waiting for the model; try again soon", 429, None, "busy")
            self.count += 1
        try:
            yield
        finally:
            with self.guard:
                self.count -= 1

    async def run(self, function: Callable[..., Item], *arguments: Any) -> Item:
        """``function(*arguments)`` in the model's thread."""
        with self.place():
            return await asyncio.get_running_loop().run_in_executor(self.worker, lambda: function(*arguments))

    async def stream(self, start: Callable[[], Iterator[str]]) -> AsyncGenerator[str, None]:
        """Items of ``start()``, which runs in the model's thread. Closing this iterator ends that one before its next item."""
        with self.place():
            loop, items, gone = asyncio.get_running_loop(), asyncio.Queue[Any](), threading.Event()

            def put(item: Any) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                    loop.call_soon_threadsafe(items.put_nowait, item)

            def work() -> None:
                if gone.is_set():
                    return
                source = start()
                try:
                    for item in source:
                        if gone.is_set():
                            return
                        put(item)
                finally:
                    if isinstance(source, Generator):
                        source.close()

            done = self.worker.submit(work)
            done.add_done_callback(lambda _: put(END))
            try:
                while (item := await items.get()) is not END:
                    yield item
                done.result()  # raises what the model raised
            finally:
                gone.set()
                done.cancel()

    def usage(self, messages: list[Message], reply: str) -> dict[str, int] | None:
        """Tokens of the prompt and of the reply, or None when the system cannot count them."""
        if not isinstance(self.system, CountsTokens):
            return None
        prompt, completion = self.system.count_tokens(messages, reply)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
