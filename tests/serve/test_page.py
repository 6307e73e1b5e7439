"""The page in headless Chromium, with a fake microphone and no network but this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import pytest
from factories import write_wav
from serve_fake import Fake, served

from lalia.serve.limits import Limits

chrome = pytest.importorskip("chrome", reason="the extra 'dev' installs websockets")
MISSING = [name for name in ("gradio", "fastapi") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"the extra 'serve' installs {', '.join(MISSING)}"),
    pytest.mark.slow,
    pytest.mark.skipif(not chrome.PROGRAM, reason="no chromium on this machine (Debian: apt-get install chromium)"),
]
LAST = "(document.querySelector('#history')?.innerText ?? '')"
READY = "document.querySelector('[placeholder^=Ask]') && document.querySelector('#send')"


@pytest.fixture(scope="module")
def system() -> Fake:
    return Fake(wait=0.05)


@pytest.fixture(scope="module")
def page(system: Fake, tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    folder = tmp_path_factory.mktemp("page")
    write_wav(folder / "microphone.wav", 2.0, 48000)
    with served(system, Limits(seconds=20), page=True) as at, chrome.browser(folder, f"{at}/", folder / "microphone.wav") as tab:
        tab.wait(READY, 60)
        yield tab


def write(page: chrome.Page, text: str) -> None:
    """Type into the question and send it."""
    page.run(
        "(() => { const box = document.querySelector('[placeholder^=Ask]');"
        f"box.value = {json.dumps(text)}; box.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"
    )
    page.run("new Promise(done => setTimeout(done, 200))")
    page.run("document.querySelector('#send').click()")


def test_a_question_is_answered_in_pieces(page: chrome.Page) -> None:
    page.run(
        "window.seen = new Set(); new MutationObserver(() => window.seen.add(document.querySelector('#history').innerText))"
        ".observe(document.querySelector('#history'), {subtree: true, childList: true, characterData: true}); 1"
    )
    words = [f"word{number}" for number in range(20)]
    write(page, " ".join(words))
    page.wait(f"{LAST}.split('word19').length === 3")
    assert page.run("window.seen.size") >= 4


def test_a_file_is_heard_and_the_history_goes_on(page: chrome.Page, system: Fake, tmp_path: Path) -> None:
    write_wav(tmp_path / "three.wav", 3.0)
    page.run("document.querySelector('#sound [aria-label=\"Upload file\"]').click()")
    page.wait("document.querySelector('#sound input[type=file]')")
    page.choose_file("#sound input[type=file]", tmp_path / "three.wav")
    page.wait("document.querySelector('#sound audio, #sound .waveform-container')")
    write(page, "heard")
    page.wait(f"{LAST}.includes('3.0s heard')")
    assert [message.role for message in system.asked[-1]] == ["user", "assistant", "user"]


def test_the_microphone_is_recorded(page: chrome.Page, system: Fake) -> None:
    page.wait("!document.querySelector('#sound audio')")
    page.run('document.querySelector(\'#sound [aria-label="Record audio"], #sound button[title="Record audio"]\')?.click()')
    page.wait("document.querySelector('#sound .record-button')")
    for _ in range(3):  # on a busy machine the recording may reach the server after the words that are to go with it
        page.run("document.querySelector('#sound .record-button')?.click()")
        page.run("new Promise(done => setTimeout(done, 2000))")
        page.run("document.querySelector('#sound .stop-button')?.click()")
        page.run("new Promise(done => setTimeout(done, 4000))")
        asked = len(system.asked)
        write(page, "recorded")
        end = time.monotonic() + 60
        while len(system.asked) == asked and time.monotonic() < end:
            time.sleep(0.1)
        if len(system.asked) > asked and system.asked[-1][-1].audio:
            break
    page.wait(f"/\\d+\\.\\ds recorded/.test({LAST})")
    wave = system.asked[-1][-1].audio[0]
    assert len(wave) > 8000 and abs(wave).max() > 0.05


def test_an_error_is_told_in_the_history(page: chrome.Page) -> None:
    write(page, "word " * 500)
    page.wait(f"{LAST}.includes('the context of the model has 400')")


def test_stop_ends_the_decoding_and_new_forgets(page: chrome.Page, system: Fake) -> None:
    write(page, " ".join(f"far{number}" for number in range(200)))  # ten seconds of answer
    page.wait(f"{LAST}.split(/far3\\b/).length > 2")
    ended = system.closed
    page.run("document.querySelector('#stop').click()")
    end = time.monotonic() + 60
    while system.closed == ended and time.monotonic() < end:
        time.sleep(0.05)
    assert system.closed == ended + 1
    assert page.run(f"{LAST}.split('far199').length") == 2  # in the question only
    page.run("new Promise(done => setTimeout(done, 500))")
    write(page, "afterwards")
    page.wait(f"{LAST}.split('afterwards').length === 3")
    question, partial, later = system.asked[-1][-3:]
    assert question.text.endswith("far199") and partial.role == "assistant" and partial.text.startswith("far0 far1 far2")
    assert question.text.startswith(partial.text) and later.text == "afterwards"
    assert partial.text in page.run(LAST).split("far199", 1)[1]  # what the model was told is what stands there
    page.run("document.querySelector('#new').click()")
    page.wait(f"!{LAST}.includes('far')")
    write(page, "fresh")
    page.wait(f"{LAST}.split('fresh').length === 3")
    assert [message.text for message in system.asked[-1]] == ["fresh"]
    if wanted := os.environ.get("LALIA_SCREENSHOT"):
        page.screenshot(Path(wanted))


def test_the_buttons_of_the_history(page: chrome.Page, system: Fake) -> None:
    names = page.run("[...document.querySelectorAll('#history button, #sound button')].map(b => b.ariaLabel ?? b.title).join('|')")
    assert "share" not in names.lower(), names
    page.run("document.querySelector('#history button[aria-label*=\"clear\" i]').click()")
    page.wait(f"!{LAST}.includes('fresh')")
    page.run("new Promise(done => setTimeout(done, 500))")
    write(page, "![cat](http://evil.example/cat.png) <img src='http://evil.example/dog.png'> tail")
    page.wait(f"{LAST}.split('tail').length === 3")
    assert len(system.asked[-1]) == 1  # what the button cleared, the model is not told either
    page.wait("document.querySelectorAll('#history img[src*=evil]').length >= 2")
    page.run("new Promise(done => setTimeout(done, 200))")
    assert page.refused >= {"http://evil.example/cat.png", "http://evil.example/dog.png"}


def test_nothing_was_asked_of_another_host(page: chrome.Page) -> None:
    page.run("1")
    hosts = {urlparse(address).hostname for address in page.requests.values() if address.startswith(("http", "ws"))}
    assert hosts == {"127.0.0.1"}
