"""Headless Chromium for tests, driven over its own debugging protocol: no driver program is needed.

The browser resolves no host but 127.0.0.1, and every address that the page asks for is kept in :attr:`Page.requests`.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

PROGRAM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-port=0",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio", "--window-size=1000,900",
    "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]  # fmt: skip


class Page:
    """One tab. ``requests``: number → address asked for so far; ``refused``: addresses that the page's own policy forbade;
    ``messages``: what the page wrote to its console, errors included."""

    def __init__(self, socket: Any) -> None:
        self.socket, self.number = socket, 0
        self.requests: dict[str, str] = {}
        self.refused: set[str] = set()
        self.messages: list[str] = []
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol → its result."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]
            self._event(message)

    def _event(self, message: dict[str, Any]) -> None:
        method, given = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests[given["requestId"]] = given["request"]["url"]
        elif method == "Network.loadingFailed" and given.get("blockedReason") == "csp":
            self.refused.add(self.requests.pop(given["requestId"], ""))
        elif method == "Runtime.exceptionThrown":
            self.messages.append(json.dumps(given["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.messages.append(given["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning"):
            self.messages.append(json.dumps(given["args"]))

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are awaited."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 90.0) -> None:
        """Until an expression is true for the page; an element is, once it is there."""
        end = time.monotonic() + seconds
        while not self.run(f"!!({script})"):
            assert time.monotonic() < end, f"{script} was not true within {seconds} s; console: {self.messages}"
            time.sleep(0.05)

    def choose_file(self, selector: str, path: Path) -> None:
        """Give ``path`` to an ``<input type=file>``, as a user does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def browser(folder: Path, address: str, microphone: Path | None = None, flags: tuple[str, ...] = ()) -> Iterator[Page]:
    """A tab at ``address``; ``microphone`` is a wav file that the fake microphone plays."""
    profile = folder / "profile"
    more = [*flags, *([f"--use-file-for-fake-audio-capture={microphone}"] if microphone else [])]
    command = [PROGRAM, *FLAGS, *more, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        with connect(_debugger(profile / "DevToolsActivePort", process), max_size=None) as socket:
            page = Page(socket)
            page.call("Page.navigate", url=address)
            page.wait(f"location.href.startsWith({address!r}) && document.readyState === 'complete'")
            yield page
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _debugger(port_file: Path, process: subprocess.Popen[bytes]) -> str:
    """The socket of the first tab, once the browser has written its port."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        assert process.poll() is None, f"{PROGRAM} ended with {process.returncode}"
        if port_file.is_file() and (lines := port_file.read_text().split()):
            with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json/list") as answer:
                tabs = [tab for tab in json.load(answer) if tab["type"] == "page"]
            if tabs:
                return tabs[0]["webSocketDebuggerUrl"]
        time.sleep(0.05)
    raise AssertionError(f"{PROGRAM} did not open its debugging port in 30 s")
