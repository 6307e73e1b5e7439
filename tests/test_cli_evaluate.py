"""``lalia evaluate`` of systems that answer with text: what the rows are decides what is measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli_runner import lalia, refused
from factories import make_corpus
from transcription_fake import Scribe, length, make_rows

from lalia import checkpoint
from lalia import config as configuration
from lalia.config import load_run_config
from lalia.data import Row, write_manifest
from lalia.runfolder import RunFolder
from lalia.system import Question, System
from lalia.systems.omni.align import OmniAlign
from lalia.train import train

TEXTS = ["Please hold the line.", "Press two now.", "Goodbye."]
QUESTION = {"question": "Which?", "options": ["a", "b", "c", "d"], "right": 0}


class Chooser(System):
    def score_answers(self, questions: Sequence[Question]) -> list[list[float]]:
        return [[1.0, *[0.0] * (len(question.answers) - 1)] for question in questions]


class Chat(Scribe, Chooser):
    pass


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes every run folder one system's; ``speech.jsonl``, ``questions.jsonl`` and ``mixed.jsonl`` are there."""
    rows = make_rows(tmp_path / "audio", TEXTS)
    asked = [Row(f"q{n}", row.audio, extra=QUESTION, task="t") for n, row in enumerate(rows)]
    for name, some in {"speech": rows, "questions": asked, "mixed": [*rows, *asked]}.items():
        write_manifest(tmp_path / f"{name}.jsonl", some)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    monkeypatch.setattr("lalia.commands.evaluate.step_label", lambda *_: "step 3")

    def choose(kind: type[System]) -> None:
        said = {length(n): text for n, text in enumerate(TEXTS)}
        system = kind(said, "thank you") if issubclass(kind, Scribe) else kind(Scribe({}).config, {})
        monkeypatch.setattr("lalia.commands.evaluate.load_system", lambda *_: system)

    return choose


@pytest.mark.parametrize("kind", [Scribe, Chat])
def test_recordings_with_text_are_transcribed(use, tmp_path: Path, kind: type[System]) -> None:
    use(kind)
    done = lalia("evaluate", tmp_path / "run", "--data", tmp_path / "speech.jsonl", "-o", tmp_path / "out", "--limit", 2)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert record["schema"] == "transcription-1" and record["label"] == "step 3" and len(record["clips"]) == 2
    assert {f["name"]: f["value"] for f in record["figures"]}["wer.real"] == 0
    assert "the model listens" in done.output or "not shown" in done.output or "does not" in done.output
    assert (tmp_path / "out" / "report.html").is_file() and "Word error rate · right recording" in done.output


def test_four_way_questions_are_asked(use, tmp_path: Path) -> None:
    use(Chat)
    done = lalia("evaluate", tmp_path / "run", "--data", tmp_path / "questions.jsonl", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["schema"] == "audiobench-1"


def test_what_does_not_fit_is_refused_with_the_way_out(use, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    speech, questions, mixed = (tmp_path / f"{name}.jsonl" for name in ("speech", "questions", "mixed"))
    use(Chat)
    said = refused("evaluate", run, "--data", mixed, "-o", out)
    assert "3 of 6 rows are four-way questions, 3 recordings with their text" in said and "audiobench-mini.jsonl" in said
    assert "--limit does not apply" in refused("evaluate", run, "--data", questions, "--limit", 2, "-o", out, code=2)
    assert "--asr, --train does not apply" in refused(
        "evaluate", run, "--data", speech, "--asr", "x", "--train", speech, "-o", out, code=2
    )
    use(Scribe)
    assert "needs recordings with their text" in refused("evaluate", run, "--data", questions, "-o", out, code=2)
    use(Chooser)
    assert "needs four-way ones" in refused("evaluate", run, "--data", speech, "-o", out, code=2)
    assert not out.exists()


def test_an_aligned_run_is_judged_from_its_folder(tmp_path: Path) -> None:
    """The real thing, as good as untrained: error rates, retrieval and the picture."""
    manifest = make_corpus(tmp_path / "corpus", 4)
    small = ["train.device=cpu", "train.threads=1", "data.workers=0", "train.log_every=1", "train.eval_every=0"]
    base = ["system=omni-base", f"data.train=[{manifest}]", "data.batch_size=4", "tokenizer.kind=byte", "model.depth=2"]
    base += ["model.aspect=16", "model.head_width=16", "model.context=128", "sample.tokens=0", "train.steps=1", *small]
    train(load_run_config(None, base), tmp_path / "base")
    align = ["system=omni-align", f"base={tmp_path / 'base'}", f"data.train=[{manifest}]", "listen.whisper.source=tiny", *small]
    config = load_run_config(None, [*align, "listen.trim=true", "projector.hidden=32", "data.features=none"])
    tables = OmniAlign.make_tables(config, None)
    system = OmniAlign(config, tables)
    system.load_external()
    run = tmp_path / "align"
    run.mkdir()
    configuration.save(config, run / "config.yaml")
    RunFolder(run).write_tables(tables)
    checkpoint.save_set(run, 1, system.state_dict(), {})
    done = lalia("evaluate", run, "--data", manifest, "--device", "cpu")
    assert done.exit_code == 0, done.output
    names = {figure["name"] for figure in json.loads((run / "eval.json").read_text())["figures"]}
    assert {"wer.real", "wer.other", "wer.silent", "cer.real", "length.real", "rtf.real", "align.cka", "align.retrieval@1"} <= names
    assert (run / "alignment.png").is_file() and "data:image/png" in (run / "report.html").read_text()
