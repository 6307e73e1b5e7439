from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from factories import tiny_emotion_config
from rich.console import Console
from torch import Tensor, nn

from lalia import audio, system
from lalia.config import load
from lalia.data import BadRow, ManifestError, Row, pad_stack, write_manifest
from lalia.doctor import doctor_config, doctor_data, doctor_env, show
from lalia.doctor.configuration import activation_bytes
from lalia.doctor.dataset import sound_notices
from lalia.doctor.environment import missing_extras
from lalia.sections import DataConfig, ExternalModel, RunConfig
from lalia.system import Clock, System, TensorBatch

RATE = 8000


@dataclass
class FakeConfig(RunConfig):
    system: str = "fake"
    data: DataConfig = field(default_factory=DataConfig)
    encoder: ExternalModel = field(default_factory=ExternalModel)


@dataclass
class Batch(TensorBatch):
    """``wave`` float32 [B, S]."""

    ids: list[str]
    wave: Tensor


class Fake(System):
    Config = FakeConfig

    def __init__(self, config: RunConfig, tables: Any) -> None:
        super().__init__(config, tables)
        self.first = nn.Linear(1, 10)
        self.second = nn.Linear(10, 1, bias=False)

    def prepare(self, row: Row, clock: Clock) -> tuple[str, Tensor]:
        if "#" in row.text:
            raise BadRow("unknown characters: '#'")
        return row.id, torch.from_numpy(audio.read(row.audio, None, row.start, row.duration)[0])

    def collate(self, examples: Sequence[Any]) -> Batch:
        return Batch([e[0] for e in examples], pad_stack([e[1] for e in examples])[0])

    def turns(self, batch: Batch, clock: Clock) -> Iterator[tuple[str, dict[str, Tensor]]]:
        yield "main", {"loss": self.second(torch.tanh(self.first(batch.wave[..., None]))).sum()}


@pytest.fixture(autouse=True)
def fake_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(system.SYSTEMS, "fake", f"{__name__}:Fake")


def tone(seconds: float, amplitude: float = 0.3) -> np.ndarray:
    return (amplitude * np.sin(np.arange(int(seconds * RATE)) * 0.3)).astype(np.float32)


def corpus(folder: Path, count: int = 30) -> list[Row]:
    rows = []
    for i in range(count):
        path = folder / f"{i}.wav"
        soundfile.write(path, tone(1 + i / 50), RATE)
        rows.append(Row(f"r{i}", str(path), text="a cat sat here now", speaker="ab"[i % 2], language="en"))
    return rows


def wrong_rows(folder: Path) -> list[Row]:
    (folder / "noise.wav").write_bytes(b"RIFFnonsense")
    whole = (folder / "0.wav").read_bytes()
    (folder / "cut.wav").write_bytes(whole[: len(whole) // 2])
    return [
        Row("gone", str(folder / "gone.wav"), text="x"),
        Row("noise", str(folder / "noise.wav"), text="x"),
        Row("cut", str(folder / "cut.wav"), text="x"),
        Row("mark", str(folder / "1.wav"), text="a # b"),
    ]


def test_every_fate_has_a_reason_and_the_exit_status_follows_the_limit(tmp_path: Path) -> None:
    rows = [*corpus(tmp_path), *wrong_rows(tmp_path)]
    path = tmp_path / "train.jsonl"
    write_manifest(path, rows)
    with open(path, "a") as file:
        file.write("{broken\n")
    config = load(FakeConfig, None, ["data.batch_size=4", "data.max_bad_fraction=0.2"])
    report = doctor_data([path], config, output=tmp_path / "report.json")
    assert (report.rows, report.usable) == (35, 30)
    reasons = {item["row"]: item["reason"] for item in report.rejected}
    assert set(reasons) == {f"{path}:35", "gone", "noise", "cut", "mark"}
    assert reasons["gone"].startswith("missing audio")
    assert reasons["cut"].startswith("unreadable audio") and "truncated" in reasons["cut"]
    assert reasons["mark"] == "unknown characters: '#'"
    assert report.exit_status == 0
    assert sum(b.clips for b in report.buckets) == 30
    assert report.batches == 8
    assert 0 < report.padding_waste < 0.1
    assert report.hours_by_speaker == pytest.approx({"a": 0.0053, "b": 0.0054}, abs=2e-4)
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["rejected"] == report.rejected
    assert stored["exit_status"] == 0
    config.data.max_bad_fraction = 0.1
    strict = doctor_data([path], config)
    assert strict.exit_status == 1
    assert "5 of 35 rows cannot be used" in strict.problems[0]


def test_what_stands_out_is_noticed_but_used(tmp_path: Path) -> None:
    rows = corpus(tmp_path)
    soundfile.write(tmp_path / "loud.wav", np.clip(tone(1, 3.0), -1, 1), RATE)
    soundfile.write(tmp_path / "still.wav", np.concatenate([tone(0.4), np.zeros(RATE)]), RATE)
    rows.append(Row("loud", str(tmp_path / "loud.wav"), text="a cat sat here now"))
    rows.append(Row("still", str(tmp_path / "still.wav"), text="a cat sat here now"))
    rows.append(Row("fast", str(tmp_path / "0.wav"), text="a cat sat here now " * 20))
    write_manifest(tmp_path / "m.jsonl", rows)
    report = doctor_data([tmp_path / "m.jsonl"])
    assert report.usable == 33
    noticed = {item["row"]: item["notice"].split(":")[0] for item in report.noticed}
    assert noticed == {"loud": "clipped", "still": "silent", "fast": "odd pace"}
    assert report.characters_per_second["most"] > 200
    quick = doctor_data([tmp_path / "m.jsonl"], decode=False)
    assert {item["row"] for item in quick.noticed} == {"fast"}


def test_sound_notices_name_a_length_that_differs() -> None:
    assert sound_notices(tone(1), RATE, 1.0) == []
    assert sound_notices(tone(1), RATE, 1.2) == ["other length: 1.00 s decoded, 1.20 s expected"]


def test_phones_unseen_in_training(tmp_path: Path) -> None:
    rows = corpus(tmp_path, 4)
    write_manifest(tmp_path / "train.jsonl", rows)
    write_manifest(tmp_path / "valid.jsonl", [Row("v", text="a measure of joy"), Row("w", text="x", language="xx")])
    report = doctor_data([tmp_path / "train.jsonl"], valid=[tmp_path / "valid.jsonl"], decode=False)
    assert any("zh" in phone.lower() for phone in report.unseen_phones), report.unseen_phones
    assert not any(phone.lower().startswith("k") for phone in report.unseen_phones)
    assert "1 texts in 'xx' were not examined: no front end for it" in report.warnings


def test_nothing_usable(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.jsonl", [Row("gone", str(tmp_path / "gone.wav"))])
    report = doctor_data([tmp_path / "m.jsonl"])
    assert report.exit_status == 1
    assert report.problems == ["no usable row of 1"]
    (tmp_path / "e.jsonl").touch()
    with pytest.raises(ManifestError, match="the file is empty"):
        doctor_data([tmp_path / "e.jsonl"])


def test_configuration_counts_parameters_and_memory(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.jsonl", corpus(tmp_path, 6))
    config = load(
        FakeConfig, None, [f"data.train=[{tmp_path / 'm.jsonl'}]", "data.batch_size=3", "encoder.source=tiny"]
    )
    report = doctor_config(config)
    assert report.exit_status == 0, report.problems
    assert report.parameters == {"first": 20, "second": 10}
    assert report.trainable == 30
    assert [(n.key, n.source) for n in report.named][1:] == [("encoder", "tiny (random)")]
    # of the last three clips (about 1.1 s) autograd keeps input and tanh: 1 + 10 floats a sample
    assert report.memory_mb["activations"] == pytest.approx(3 * 1.1 * RATE * 11 * 4 / 1e6, rel=0.05)
    assert report.activations_from == "2 clips, scaled to the largest batch of 3"


def test_activations_are_counted_once_and_without_parameters() -> None:
    model = Fake(FakeConfig(), {})
    assert activation_bytes(model, Batch(["a"], torch.rand(1, 100))) == 100 * 11 * 4


def test_configuration_names_every_missing_file_and_model(tmp_path: Path) -> None:
    lines = [f"data.train=[{tmp_path}/no.jsonl]", f"train.init_from={tmp_path}/run", f"encoder.source={tmp_path}/none"]
    report = doctor_config(load(FakeConfig, None, lines))
    assert report.exit_status == 1
    assert [p.split(":")[0] for p in report.problems] == ["data.train", "train.init_from", "encoder"]
    assert doctor_config(FakeConfig()).problems == ["data.train is empty: name at least one manifest"]


def test_models_of_kinds_that_were_not_chosen_are_not_asked_for(tmp_path: Path) -> None:
    plain = doctor_config(tiny_emotion_config(tmp_path))
    assert plain.exit_status == 0 and [n.key for n in plain.named] == ["data.train", "data.valid"]
    whisper = {"model.speech.kind": "whisper", "model.speech.whisper.source": "tiny", "model.state.kind": "none"}
    report = doctor_config(tiny_emotion_config(tmp_path, **whisper))
    assert report.exit_status == 0 and [n.key for n in report.named][2:] == ["model.speech.whisper"]
    assert report.trainable and report.activations_from.startswith("2 clips, scaled")


def test_environment_reports_devices_and_pip_lines() -> None:
    report = doctor_env()
    used = {c.name: c for c in report.components}
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert used["torch"].uses.startswith(expected)
    assert "flac" in used["soundfile"].uses
    assert "g722" in used["av"].uses
    assert report.memory_gb > 0
    assert report.disk_free_gb > 0
    assert missing_extras(lambda module: module != "pocketsphinx") == {"asr": "pip install 'lalia[asr]'"}
    assert missing_extras(lambda module: True) == {}


def test_environment_tells_the_mirrors_in_force_and_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("PIP_", "HF_", "LALIA_")) or name.endswith("_MS_ID")]:
        monkeypatch.delenv(name)
    plain = doctor_env().mirrors
    assert (plain["Hugging Face"], plain["network"]) == ("https://huggingface.co", "allowed")
    assert (plain["ModelScope first"], plain["packages"]) == ("no (WHISPER_MS_ID and its like)", "as pip is configured")
    given = {
        "HF_ENDPOINT": "https://me:secret1@mirror.example/hf/?token=secret2", "WHISPER_MS_ID": "mirror/whisper-base",
        "WAVLM_MS_ID": "mirror/wavlm", "PIP_INDEX_URL": "https://user:secret3@pip.example/simple", "HF_TOKEN": "secret4",
        "PIP_ARGS": "--extra-index-url https://cpu.example/simple?key=secret5 -q", "LALIA_CACHE": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    report = doctor_env()
    assert report.mirrors == {
        "Hugging Face": "https://***@mirror.example/hf/ (HF_ENDPOINT)",
        "ModelScope first": "WAVLM_MS_ID=mirror/wavlm, WHISPER_MS_ID=mirror/whisper-base",
        "packages": "PIP_INDEX_URL=https://***@pip.example/simple, PIP_ARGS=--extra-index-url https://cpu.example/simple -q",
        "model cache": f"{tmp_path} (LALIA_CACHE)",
        "network": "models from folders and caches alone (HF_HUB_OFFLINE)",
    }
    written = io.StringIO()
    show(report, Console(file=written, width=200))
    text = written.getvalue()
    assert "mirrors" in text and "https://***@mirror.example/hf/ (HF_ENDPOINT)" in text and "WHISPER_MS_ID=mirror/whisper" in text
    assert "secret" not in text + json.dumps(report.to_dict())
    monkeypatch.setenv("LALIA_OFFLINE", "true")
    assert doctor_env().mirrors["network"] == "forbidden (LALIA_OFFLINE)"


def test_mirrors_are_read_in_one_module() -> None:
    root = Path(doctor_env.__code__.co_filename).parents[1]
    readers = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if re.search(r"environ[^\n]*(HF_|_MS_ID|PIP_)", path.read_text(encoding="utf-8"))
    }
    assert readers <= {"pretrained/sources.py", "cli.py"}, readers  # cli.py only sets HF_HUB_OFFLINE


def test_reports_print(tmp_path: Path) -> None:
    write_manifest(tmp_path / "m.jsonl", [*corpus(tmp_path, 3), *wrong_rows(tmp_path)[:2]])
    written = io.StringIO()
    console = Console(file=written, width=150)
    for report in (doctor_data([tmp_path / "m.jsonl"]), doctor_env(), doctor_config(FakeConfig())):
        json.dumps(report.to_dict())
        show(report, console)
    text = written.getvalue()
    assert "missing audio" in text
    assert "problem: 2 of 5 rows cannot be used, above data.max_bad_fraction 0.1" in text
    assert "not ready" in text
    assert "soundfile" in text
