"""What the READMEs promise: their commands run, their options, paths, targets and messages exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lalia import audio, cli
from lalia.config import flatten, load_run_config
from lalia.system import SYSTEMS

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
DOCUMENTS = [*READMES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *ROOT.glob("src/lalia/systems/*/README.md")]
BLOCK = re.compile(r"(<!-- test -->\n)?```bash\n(.*?)```", re.S)
RUNNER = CliRunner()
FILES = (".py", ".pt", ".png", ".json", ".jsonl", ".csv", ".log", ".safetensors")
VOICE, EMOTION, OMNI = 0, 1, 2  # the marked blocks
#: beginning of a command → what is added to it so that it takes seconds; the later of two values counts
SMALL_VOICE = [
    "train.steps=2", "train.threads=1", "data.workers=0", "data.batch_size=2", "discriminator.start_step=1",
    "model.width=16", "model.filter=16", "model.layers=3", "model.posterior_layers=2", "model.flows=2",
    "model.istft={channels: 16, layers: 1}", "discriminator.channels=0.02", "train.valid_batches=1",
]  # fmt: skip
SMALL_EMOTION = ["train.epochs=2", "train.threads=1", "data.workers=0", "data.batch_size=2", "model.width=8"]
SMALL_OMNI = [
    "train.steps=12", "train.threads=1", "listen.hidden=32", "model.depth=2", "model.aspect=32", "model.head_width=32",
    "optimizers.main.adamw_lr=3e-4",
]  # fmt: skip
SMALLER = {
    "prepare synth": ["--sentences", "16", "--split", "0.5,0.25,0.25"],
    "prepare dialogues": ["--dialogues", "6", "--turns", "4"],
    "doctor config configs/vits2": SMALL_VOICE,
    "doctor config configs/emotion": SMALL_EMOTION,
    "train configs/vits2": SMALL_VOICE,
    "train configs/emotion": SMALL_EMOTION,
    "smoke": SMALL_OMNI,
    "evaluate runs/first": ["--limit", "1"],
}


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, tested: bool | None = None) -> list[list[list[str]]]:
    """Words of every ``lalia …`` command by bash block; ``tested``: only of the marked ones, or only of the others."""
    found = []
    for mark, block in BLOCK.findall(text_of(path)):
        if tested is None or bool(mark) == tested:
            lines = [shlex.split(part, comments=True) for line in block.splitlines() for part in line.split(" | ")]
            found.append([words[words.index("lalia") + 1 :] for words in lines if "lalia" in words and "pip" not in words])
    return found


def commands(path: Path, tested: bool | None = None) -> list[list[str]]:
    """The commands of all blocks."""
    return [words for block in blocks(path, tested) for words in block]


def check_words(words: list[str]) -> None:
    """Parse without running; click raises when a command, an option or an argument is not there."""
    command: Any = typer.main.get_command(cli.app)
    rest = list(words)
    while hasattr(command, "commands"):
        assert rest[0] in command.commands, f"lalia {shlex.join(words)}: no command {rest[0]!r}"
        command = command.commands[rest.pop(0)]
    command.make_context(command.name, rest, resilient_parsing=False)


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_every_command_of_the_readme_exists_with_its_options(path: Path) -> None:
    written = commands(path)
    assert len(written) > 12
    for words in written:
        check_words([word for word in words if word != ".venv/bin/lalia"])


def test_a_wrong_option_would_be_noticed() -> None:
    with pytest.raises(Exception, match="--volume"):
        check_words(["speak", "runs/first", "Hello.", "--volume", "3"])


def test_both_languages_give_the_same_commands() -> None:
    assert commands(READMES[0], tested=True) == commands(READMES[1], tested=True)
    assert commands(READMES[0]) == commands(READMES[1])


def walk(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One marked block, in an empty folder, with the models and corpora made tiny."""
    monkeypatch.chdir(folder)
    (folder / "configs").symlink_to(ROOT / "configs")
    for words in blocks(READMES[0], tested=True)[number]:
        smaller = next((more for start, more in SMALLER.items() if " ".join(words).startswith(start)), [])
        result = RUNNER.invoke(cli.app, [*words, *smaller])
        told = f"lalia {shlex.join(words)}\n{result.output[-1500:]}"
        assert result.exit_code == 0, f"{told}\n{result.exception!r}"


def python_example(number: int) -> types.ModuleType:
    """The README's Python lines, on the run that was just made."""
    codes = re.findall(r"```python\n(.*?)```", text_of(READMES[0]), re.S)
    assert codes == re.findall(r"```python\n(.*?)```", text_of(READMES[1]), re.S)
    module = types.ModuleType("readme")
    types.FunctionType(compile(codes[number], "README.md", "exec"), module.__dict__)()
    return module


def test_the_walk_through_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk(VOICE, tmp_path, monkeypatch)
    assert (tmp_path / "morning.wav").stat().st_size > 1000
    run = tmp_path / "runs" / "first"
    for name in ("config.yaml", "tables.json", "metrics.csv", "latest", "dataset_report.json", "eval.json", "report.html"):
        assert (run / name).exists(), name
    module = python_example(VOICE)
    assert module.speech.wave.size > 0 and module.speech.sample_rate == 16000


def test_the_walk_through_of_emotion_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk(EMOTION, tmp_path, monkeypatch)
    run = tmp_path / "runs" / "emotion"
    for name in ("config.yaml", "tables.json", "metrics.csv", "loss_curve.png", "best", "latest", "eval.json", "report.html"):
        assert (run / name).exists(), name
    assert len((tmp_path / "answers.csv").read_text(encoding="utf-8").splitlines()) == 1 + 2 * 4  # two dialogues of the test part
    wave, rate = audio.read(next((tmp_path / "data" / "dialogues" / "audio").rglob("*.flac")))
    audio.write(tmp_path / "a1.wav", wave, rate)
    assert set(python_example(EMOTION).answer.values) == {"valence", "arousal"}


def test_the_smoke_run_of_omni_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk(OMNI, tmp_path, monkeypatch)
    assert (tmp_path / "runs" / "sines" / "smoke.json").exists()


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src")}


def test_lalia_is_a_program_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lalia", "config", str(ROOT / "configs/vits2/tiny.yaml"), "train.minutes=30"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    assert "minutes: 30.0" in done.stdout


# --- what the documents name ----------------------------------------------------------------------------------------
def named_paths(row: str) -> list[str]:
    """Paths in backticks of the first cell; a bare name continues the folder of the one before it."""
    folder, found = "", []
    for name in re.findall(r"`([^`]+)`", row.split("|")[1]):
        if "/" in name.rstrip("/"):
            folder = name.rpartition("/")[0] if not name.endswith("/") else name.rstrip("/").rpartition("/")[0]
            found.append(name)
        else:
            found.append(f"{folder}/{name}" if folder and not (ROOT / name).exists() else name)
    return found


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_the_file_map_names_what_is_there_and_forgets_nothing(path: Path) -> None:
    table = re.split(r"^## (?:File map|文件地图)$", text_of(path), flags=re.M)[1].partition("\n## ")[0]
    named = {name.rstrip("/") for row in table.splitlines() if row.startswith("| `") for name in named_paths(row)}
    missing = [name for name in sorted(named) if not (ROOT / name).exists()]
    assert not missing
    package = ROOT / "src" / "lalia"
    there = {p for p in package.iterdir() if p.name not in ("__init__.py", "__main__.py", "__pycache__", "systems")}
    forgotten = [p.name for p in there if f"src/lalia/{p.name}" not in named]
    assert not forgotten


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_make_targets_exist(path: Path) -> None:
    text = text_of(path)
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
    targets = set(re.findall(r"^([a-z]+):", text_of(ROOT / "Makefile"), re.M))
    named = set(re.findall(r"(?:`|^)make ([a-z]+)", text, re.M))
    assert named <= targets, f"{path.name} names {sorted(named - targets)}"


def test_messages_of_the_troubleshooting_table_are_those_of_the_program() -> None:
    source = "\n".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "src").rglob("*.py")))
    tables = [re.split(r"^## (?:When something is wrong|出错了怎么办)$", text_of(path), flags=re.M)[1] for path in READMES]
    cells = [[row.split("|")[1] for row in table.split("\n## ")[0].splitlines() if row.startswith("| ")][1:] for table in tables]
    messages = [sorted(m for cell in column for m in re.findall(r"`([^`]+)`", cell)) for column in cells]
    assert messages[0] == messages[1] and len(messages[0]) > 15
    assert not [message for message in messages[0] if message not in source and message != "apt-get download"]


def test_settings_named_in_the_documents_exist() -> None:
    """Every ``section.key`` in the documents; of the tables of the seeds only what stands on Lalia's side."""
    configs = [load_run_config(None, [f"system={name}"]) for name in SYSTEMS]
    known = {part for config in configs for key in flatten(config) for part in prefixes(key)}
    sections = tuple({f"{key.partition('.')[0]}." for config in configs for key in flatten(config) if "." in key})
    wrong = []
    for path in DOCUMENTS:
        lines = text_of(path).splitlines()
        lines = [line.split(" | ", 1)[-1] for line in lines] if path.name == "from-the-seeds.md" else lines
        for key in re.findall(r"(?<![\w./-])((?:[a-z_]+\.)+[a-z_0-9]+)(?=[`=:,\s]|$)", "\n".join(lines)):
            if key.startswith(sections) and key not in known and not key.endswith(FILES):
                wrong.append(f"{path.name}: {key}")
    assert not wrong


def prefixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
