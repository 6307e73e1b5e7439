"""A system that replies, transcribes and counts by known arithmetic, and a server of it on a free port of this machine."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from factories import tiny_vits2_config

from lalia import checkpoint
from lalia import config as configuration
from lalia.data import BadRow, Corpus
from lalia.runfolder import RunFolder
from lalia.sections import RunConfig
from lalia.serve.app import build
from lalia.serve.engine import Engine
from lalia.serve.limits import Limits
from lalia.system import Message, System, system_class

CONTEXT, RECORDINGS = 400, 2


class Fake(System):
    """Says how long each recording of the last message is and repeats its words, a word a piece, ``wait`` seconds apart."""

    Config = RunConfig

    def __init__(self, config: Any = None, tables: Any = None, wait: float = 0.0) -> None:
        super().__init__(config or RunConfig(system="fake"), tables or {})
        self.layer = torch.nn.Linear(1, 1)
        self.wait, self.pieces, self.closed, self.running, self.most = wait, 0, 0, 0, 0
        self.asked: list[list[Message]] = []
        self.broken = ""

    def reply(
        self, messages: Sequence[Message], *, max_tokens: int = 256, temperature: float = 0.0, top_k: int = 0, seed: int = 0
    ) -> Iterator[str]:
        self.asked.append(list(messages))
        length = self.count_tokens(messages)[0]
        if length > CONTEXT:
            raise BadRow(f"the conversation takes {length} positions, the context of the model has {CONTEXT}: shorten it")
        if len(messages[-1].audio) > RECORDINGS:
            raise BadRow(f"{len(messages[-1].audio)} recordings in one message, the model takes {RECORDINGS}")
        self.running += 1
        self.most = max(self.most, self.running)
        words = [f"{len(wave) / 16000:.1f}s" for wave in messages[-1].audio] + messages[-1].text.split()
        if temperature > 0:
            np.random.default_rng(seed).shuffle(words)
        try:
            for place, word in enumerate(words[:max_tokens]):
                time.sleep(self.wait)
                if self.broken and place:
                    raise RuntimeError(self.broken)
                self.pieces += 1
                yield word if place == 0 else f" {word}"
        finally:
            self.running -= 1
            self.closed += 1

    def count_tokens(self, messages: Sequence[Message], reply: str = "") -> tuple[int, int]:
        prompt = sum(len(m.text.split()) + sum(len(wave) // 1600 for wave in m.audio) for m in messages)
        return prompt, len(reply.split())

    def transcribe(self, waves: Sequence[np.ndarray], language: str = "") -> list[str]:
        if language not in ("", "en"):
            raise BadRow(f"unknown language {language!r}; the model knows en")
        return [f"{len(wave) / 16000:.2f} seconds, peak {np.abs(wave).max():.1f}" for wave in waves]


def write_voice(folder: Path) -> Path:
    """A run folder of a tiny ``vits2`` with random weights: its voice is noise, and it is there in a second."""
    config = tiny_vits2_config(folder)
    system = system_class("vits2")
    tables = system.make_tables(config, Corpus.read(config["data"].train))
    run = folder / "voice"
    run.mkdir()
    configuration.save(config, run / "config.yaml")
    RunFolder(run).write_tables(tables)
    torch.manual_seed(0)
    checkpoint.save_set(run, 1, system(config, tables).state_dict(), {})
    return run


@contextlib.contextmanager
def served(system: Any, limits: Limits | None = None, page: bool = False) -> Iterator[str]:
    """The address of a real server of ``system``, in a thread."""
    import uvicorn

    engine = Engine(system, "fake", limits)
    app = build(engine, page=page, hosts=("127.0.0.1", "localhost"))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive() and time.monotonic() < end, "the server did not start"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
