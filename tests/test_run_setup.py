"""Switches of torch (V-08), batches on their way to the device (V-20), secrets that stay out (V-09), and two traps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import tiny_vits2_config, train_tiny_run
from torch import Tensor

from lalia.config import ConfigError
from lalia.data import BadRow
from lalia.loader import Loader
from lalia.run_setup import autocast_dtype, read_rows, torch_settings
from lalia.sections import Precision, TrainConfig
from lalia.system import Clock, SpeakRequest, Speaks, TensorBatch, system_class
from lalia.text import SymbolTable, analyse

BACKENDS = {"flash": "flash", "efficient": "mem_efficient", "math": "math", "cudnn": "cudnn"}


def switches() -> dict[str, bool]:
    """Attention backends of torch that are on."""
    return {name: getattr(torch.backends.cuda, f"{key}_sdp_enabled")() for name, key in BACKENDS.items()}


@pytest.fixture
def as_before() -> Iterator[None]:
    """Put torch's global switches back."""
    found, threads, precision = switches(), torch.get_num_threads(), torch.get_float32_matmul_precision()
    tf32, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32, cudnn
    for name, key in BACKENDS.items():
        getattr(torch.backends.cuda, f"enable_{key}_sdp")(found[name])
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("as_before")
def test_switches_of_torch_take_effect() -> None:
    torch_settings(TrainConfig(tf32=False, matmul_precision="highest", sdp_backends=["math", "flash"], threads=1))
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32 and torch.get_num_threads() == 1
    assert switches() == {"flash": True, "efficient": False, "math": True, "cudnn": False}
    torch_settings(TrainConfig(tf32=True, matmul_precision="high", sdp_backends=["efficient"]))
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    assert switches() == {"flash": False, "efficient": True, "math": False, "cudnn": False}
    with pytest.raises(ConfigError, match="unknown flush; known: flash"):
        torch_settings(TrainConfig(sdp_backends=["flush"]))


def test_precision_of_the_forward_pass() -> None:
    cpu = torch.device("cpu")
    assert autocast_dtype(Precision.auto, cpu) is None and autocast_dtype(Precision.fp32, cpu) is None
    assert autocast_dtype(Precision.bf16, cpu) is torch.bfloat16


def test_memory_is_pinned_only_where_there_is_cuda(tmp_path: Path) -> None:
    config = tiny_vits2_config(tmp_path)
    rows = read_rows(config["data"].train, "data.train", 0.1)
    cls = system_class(config.system)
    loader = Loader(cls(config, cls.make_tables(config, rows)), rows, config["data"], seed=1, pin=True)
    batch = next(iter(loader.batches(0)))
    loader.close()
    assert batch.wave.is_pinned() is torch.cuda.is_available()


@dataclass
class Small(TensorBatch):
    """One of each kind of field."""

    ids: list[str]
    frames: Tensor
    bert: dict[str, Tensor]
    note: str = "kept"


def test_a_batch_moves_every_tensor_and_keeps_the_rest() -> None:
    batch = Small(["a"], torch.ones(2), {"en": torch.ones(3)})
    moved = batch.to("meta")
    assert isinstance(moved, Small) and moved.frames.is_meta and moved.bert["en"].is_meta
    assert moved.ids == ["a"] and moved.note == "kept" and not batch.frames.is_meta


def test_secrets_of_the_environment_are_in_no_file_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_thisisatokenofnobody"
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN", "OPENI_TOKEN"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setattr("lalia.logs.Logs.curves", lambda self: [])
    run = train_tiny_run(tmp_path, **{"train.steps": 1, "train.eval_every": 0, "data.valid": "[]"})
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 6
    assert not [path.name for path in files if secret.encode() in path.read_bytes()]


def test_the_limit_of_phones_counts_phones_not_characters(tmp_path: Path) -> None:
    """Trap R18: ``Alpha charlie.`` has 14 characters and 12 phones, the stop included."""
    config = tiny_vits2_config(tmp_path)
    row = read_rows(config["data"].train, "data.train", 0.1)[0]
    row.text = "Alpha charlie."
    count = len(analyse(row.text, "en").phones)
    assert count < len(row.text)
    tables = {"symbols": SymbolTable.from_languages(["en"]).to_dict(), "speakers": {"s0": 0}}
    config["data"].max_phones = count
    system = system_class(config.system)(config, tables)
    assert len(system.prepare(row, Clock()).text) == 2 * count + 1
    config["data"].max_phones = count - 1
    with pytest.raises(BadRow, match=f"text too long: {count} phones, data.max_phones is {count - 1}"):
        system.prepare(row, Clock())


def test_languages_without_features_are_zeros_in_training_and_speech(tmp_path: Path) -> None:
    """Trap R21: they were random, and so was the speech."""
    config = tiny_vits2_config(tmp_path, **{"model.bert_languages": "[en, zh]", "model.bert_width": 4})
    rows = read_rows(config["data"].train, "data.train", 0.1)
    cls = system_class(config.system)
    system = cls(config, cls.make_tables(config, rows)).eval()
    batch = system.collate([system.prepare(rows[0], Clock())])
    assert set(batch.bert) == {"en", "zh"} and not any(bool(value.any()) for value in batch.bert.values())
    assert isinstance(system, Speaks)
    first, second = (system.speak([SpeakRequest("Alpha.", max_seconds=1)])[0].wave for _ in range(2))
    assert np.array_equal(first, second)


def test_a_clip_shorter_than_a_segment_is_rejected_with_its_reason(tmp_path: Path) -> None:
    """Trap R15: by its stated length before training, by its samples when the two disagree."""
    config = tiny_vits2_config(tmp_path)
    rows = read_rows(config["data"].train, "data.train", 0.1)
    cls = system_class(config.system)
    system, row = cls(config, cls.make_tables(config, rows)), rows[0]
    assert system.reject(row) == ""
    row.duration = 0.2
    assert system.reject(row) == "too short: 12 frames, one segment has 16"
    with pytest.raises(BadRow, match="too short: 12 frames, one segment has 16"):
        system.prepare(row, Clock())


def test_a_forward_pass_that_overflows_reaches_the_guard_as_losses(tmp_path: Path) -> None:
    """The alignment search refuses NaN, but an error there would be one rank's alone, without a dump and without a skip."""
    config = tiny_vits2_config(tmp_path)
    rows = read_rows(config["data"].train, "data.train", 0.1)
    cls = system_class(config.system)
    system = cls(config, cls.make_tables(config, rows))
    batch = system.collate([system.prepare(rows[i], Clock()) for i in range(2)])
    batch.spectrogram[1, 0, 3] = torch.inf
    turns = {name: losses for name, losses in system.turns(batch, Clock())}
    assert not torch.isfinite(turns["g"]["loss_kl"])
