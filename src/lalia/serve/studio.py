"""The page to talk to: record or upload, streamed text, history. Gradio, mounted in the application.

It works without a network: analytics are off, fonts are the system's own, and nothing is loaded from another host. Recordings that
Gradio holds lie in one temporary folder, are deleted within minutes, and only files in that folder are read.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lalia.serve.engine import Engine
from lalia.serve.limits import RequestError, refusal
from lalia.serve.openai_routes import to_16_bit
from lalia.serve.uploads import RATE, wave_of
from lalia.system import Message, SpeakRequest

if TYPE_CHECKING:
    from fastapi import FastAPI

KEPT_SECONDS = 600  # how long an uploaded recording and an idle conversation are held
WAITING, NOTHING, WARNING = "…", "∅", "⚠️"  # what stands for an answer that has not begun, has no words, or is an error
UNANSWERED = f"{WARNING} stopped before the answer began; the model does not remember the question"
OFFLINE = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_SSR_MODE": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
STYLE = "footer {display: none !important} .gradio-container {max-width: 60rem !important; width: 100% !important; margin: auto}"


class Studio:
    """What the buttons of the page do."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self.folder = engine, folder.resolve()

    def wave(self, path: str | None) -> np.ndarray | None:
        """The recording that Gradio holds at ``path``; RequestError for a path outside its folder."""
        if not path:
            return None
        held = Path(path).resolve()
        if not held.is_relative_to(self.folder) or not held.is_file():
            raise RequestError("the recording is gone from the server; record it again", 400, "audio")
        try:
            if held.stat().st_size > self.engine.limits.upload_bytes:
                raise RequestError(f"the recording is larger than {self.engine.limits.upload_mb:g} MB", 413, "audio")
            return wave_of(held.read_bytes(), self.engine.limits, held.name)
        finally:
            held.unlink(missing_ok=True)

    async def ask(
        self, text: str, path: str | None, shown: list[dict[str, Any]], told: list[Message]
    ) -> AsyncIterator[tuple[list[dict[str, Any]], list[Message], str, None]]:
        """One question → the history with the answer growing in it. Errors stand in the history as the answer."""
        import asyncio

        told = list(told) if shown else []  # an emptied page has nothing that the model should know
        shown = settled(shown, told)
        try:
            wave = await asyncio.to_thread(self.wave, path)
            if wave is None and not text.strip():
                raise RequestError("record or choose a sound, or write something")
            asked = Message("user", text.strip(), [] if wave is None else [wave])
            heard = [] if wave is None else [f"🎤 {len(wave) / RATE:.1f} s"]
            shown.append({"role": "user", "content": "\n\n".join([*heard, *([asked.text] if asked.text else [])])})
            shown.append({"role": "assistant", "content": WAITING})
            yield shown, told, "", None
            before, reply = told, ""
            async for piece in self.replies([*before, asked]):
                reply += piece
                shown[-1] = {"role": "assistant", "content": reply}
                told = [*before, asked, Message("assistant", reply)]  # now, since Stop may end this before the next piece
                yield shown, told, "", None
            shown[-1] = {"role": "assistant", "content": reply or NOTHING}
            yield shown, [*before, asked, Message("assistant", reply)], "", None
        except ValueError as error:
            known = refusal(error)
            if known is None:
                raise
            shown = [message for message in shown if message.get("content") != WAITING]
            yield [*shown, {"role": "assistant", "content": f"{WARNING} {known}"}], told, "", None

    def replies(self, messages: list[Message]) -> AsyncIterator[str]:
        """The answer in pieces; where the model only transcribes, what is said in the recording."""
        recordings = sum(len(message.audio) for message in messages)
        if recordings > self.engine.limits.recordings:
            raise RequestError(f"{recordings} recordings in this conversation; begin a new one")
        system: Any = self.engine.system
        if "reply" in self.engine.capabilities:
            return self.engine.stream(lambda: system.reply(messages, max_tokens=min(256, self.engine.limits.tokens)))
        if not messages[-1].audio:
            raise RequestError("this model only writes down what is said: record or choose a sound")
        return self.engine.stream(lambda: iter(system.transcribe(messages[-1].audio)))

    async def say(self, text: str, speaker: str) -> tuple[tuple[int, np.ndarray] | None, str]:
        """Text → sound for the player, and what the user should know."""
        try:
            if not text.strip() or len(text) > self.engine.limits.characters:
                raise RequestError(f"write 1 to {self.engine.limits.characters} characters")
            request = SpeakRequest(text, speaker.strip(), max_seconds=self.engine.limits.seconds)
            spoken = (await self.engine.run(self.engine.require("speak").speak, [request]))[0]
        except ValueError as error:
            known = refusal(error)
            if known is None:
                raise
            return None, f"⚠️ {known}"
        return (spoken.sample_rate, to_16_bit(spoken.wave)), "; ".join(spoken.notes)


def settled(shown: list[dict[str, Any]], told: list[Message]) -> list[dict[str, Any]]:
    """The history on the page after a stop, equal to what the model is told: the answer as far as it was said, and a question
    whose answer had not begun is marked as forgotten. Nothing changes where no answer was stopped."""
    shown = list(shown)
    last = _text_of(shown[-1]) if shown and shown[-1]["role"] == "assistant" else ""
    if last == WAITING:
        shown[-1] = {"role": "assistant", "content": UNANSWERED}
    elif last and told and not last.startswith(WARNING):
        shown[-1] = {"role": "assistant", "content": told[-1].text or NOTHING}  # a piece may have been told and not arrived
    return shown


def _text_of(message: dict[str, Any]) -> str:
    """Text of a message as we write it, or in the parts that Gradio makes of it."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content if isinstance(part, dict))


def mount(app: FastAPI, engine: Engine, folder: Path) -> FastAPI:
    """``app`` with the page at ``/``; uploads are held in ``folder``."""
    os.environ.update(OFFLINE, GRADIO_TEMP_DIR=str(folder))
    import gradio as gr

    studio = Studio(engine, folder)
    with gr.Blocks(title=f"Lalia · {engine.name}", analytics_enabled=False, delete_cache=(60, KEPT_SECONDS)) as page:
        gr.Markdown(f"# Lalia · {engine.name}")
        if {"reply", "transcribe"} & set(engine.capabilities):
            _talk(gr, studio)
        if "speak" in engine.capabilities:
            _speak(gr, studio)
    page.queue(max_size=engine.limits.waiting, default_concurrency_limit=engine.limits.waiting)
    fonts = ["system-ui", "sans-serif"]
    return gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=gr.themes.Base(font=fonts, font_mono=["ui-monospace", "monospace"]),
        css=STYLE,
        footer_links=[],
        max_file_size=engine.limits.upload_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        show_error=True,
    )


def _talk(gr: Any, studio: Studio) -> None:
    told = gr.State(list, time_to_live=KEPT_SECONDS)
    history = gr.Chatbot(
        label="Conversation",
        height=300,
        elem_id="history",
        group_consecutive_messages=False,
        buttons=["copy", "copy_all"],  # Gradio's own choice has a button that sends the conversation to another host
    )
    sound = gr.Audio(
        label="Record or choose a sound",
        sources=["microphone", "upload"],
        type="filepath",
        elem_id="sound",
        buttons=["download"],
    )
    text = gr.Textbox(label="Question", placeholder="Ask about the recording, or just send it", lines=1, elem_id="question")
    with gr.Row():
        send = gr.Button("Send", variant="primary", elem_id="send")
        stop = gr.Button("Stop", elem_id="stop")
        new = gr.Button("New conversation", elem_id="new")
    work = {
        "fn": studio.ask,
        "inputs": [text, sound, history, told],
        "outputs": [history, told, text, sound],
        "api_visibility": "private",
        "show_progress": "hidden",
    }
    asked = [send.click(**work), text.submit(**work)]
    stop.click(settled, [history, told], history, cancels=asked, api_visibility="private", show_progress="hidden", queue=False)
    new.click(fn=lambda: ([], [], "", None), outputs=work["outputs"], cancels=asked, api_visibility="private")
    history.clear(fn=list, outputs=told, cancels=asked, api_visibility="private")


def _speak(gr: Any, studio: Studio) -> None:
    text = gr.Textbox(label="Text to speak", lines=3, elem_id="words")
    speaker = gr.Textbox(label="Speaker", placeholder="the first of the run", elem_id="speaker")
    button = gr.Button("Speak", variant="primary", elem_id="speak")
    player = gr.Audio(label="Speech", interactive=False, format="wav", elem_id="spoken", buttons=["download"])
    note = gr.Markdown(elem_id="note")
    button.click(studio.say, [text, speaker], [player, note], api_visibility="private", show_progress="hidden")
