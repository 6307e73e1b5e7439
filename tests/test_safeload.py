"""Weights that others made: fitted with a report, refused when they are programs, named when they are damaged."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lalia import checkpoint, safeload
from lalia.safeload import DamagedCheckpoint, UnsafePickle, WeightsMismatch, partial_load


def test_partial_load_reports_and_copies_nothing_beyond_the_allow_list() -> None:
    net = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 3)})
    before = {k: v.clone() for k, v in net.state_dict().items()}
    tensors = {"body.weight": torch.ones(2, 2), "body.bias": torch.ones(2), "head.weight": torch.ones(5, 2)}
    tensors["old"] = torch.ones(1)
    with pytest.raises(WeightsMismatch, match="old"):
        partial_load(net, tensors, allow=["head.*"])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    report = partial_load(net, tensors, allow=["head.*", "old"])
    assert (report.matched, report.missing, report.unexpected) == (["body.weight", "body.bias"], ["head.bias"], ["old"])
    assert report.mismatched == ["head.weight: [5, 2] → [3, 2]"]
    assert "2 matched, 1 missing, 1 unexpected, 1 of another shape" in report.text()
    assert torch.equal(net["body"].weight, torch.ones(2, 2)) and torch.equal(net["head"].weight, before["head.weight"])


# --- foreign files --------------------------------------------------------------------------------------------------
class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("form", ["zip", "legacy", "raw pickle", "protocol 4"])
def test_a_pickle_with_code_is_refused_by_name_and_never_run(form: str, tmp_path: Path) -> None:
    trap, path = tmp_path / "pwned", tmp_path / "G_100.pth"
    content = {"model": {"weight": torch.ones(2)}, "extra": Touch(trap)}
    if form == "raw pickle":
        path.write_bytes(pickle.dumps(Touch(trap)))
    elif form == "protocol 4":
        torch.save(content, path, pickle_protocol=4)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UnsafePickle, match=r"(posix|nt)\.mkdir.*safetensors") as caught:
        checkpoint.load_weights(path)
    assert not trap.exists()
    assert caught.value.names == [f"{os.mkdir.__module__}.mkdir"]


def test_weights_of_other_programs_are_unwrapped(tmp_path: Path) -> None:
    model = {"enc.weight": torch.randn(2, 2)}
    for name, content in {
        "G_1.pth": {"model": model, "iteration": 3, "optimizer": {"state": {}}, "learning_rate": 1e-4},
        "bare.bin": model,
        "lightning.ckpt": {"state_dict": model, "epoch": 1},
    }.items():
        torch.save(content, tmp_path / name)
        assert torch.equal(checkpoint.load_weights(tmp_path / name)["enc.weight"], model["enc.weight"])
    torch.save({"epoch": 1}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match="no named tensors; found: epoch"):
        checkpoint.load_weights(tmp_path / "none.pt")


def test_torchscript_is_code(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("script/constants.pkl", b"")
    with pytest.raises(UnsafePickle, match="TorchScript"):
        checkpoint.load_weights(path)


def test_damaged_foreign_files_are_damaged_whatever_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "D_100.pth"
    torch.save({"model": {"weight": torch.ones(64)}}, path)
    data = path.read_bytes()
    junk = random.Random(0).randbytes(300)
    cut = [b"", data[:10], data[: len(data) // 2], data[:-30]]
    for broken in (*cut, junk, b"PK\x03\x04" + junk, b"\x80\x02" + junk, b"hello"):
        path.write_bytes(broken)
        with pytest.raises(DamagedCheckpoint, match="D_100.pth"):
            checkpoint.load_weights(path)
    (tmp_path / "x.safetensors").write_bytes(junk)
    with pytest.raises(DamagedCheckpoint, match="x.safetensors"):
        checkpoint.load_weights(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError):
        checkpoint.load_weights(tmp_path / "absent.pth")


def test_the_opcode_reader_survives_any_bytes() -> None:
    draw = random.Random(1)
    good = pickle.dumps({"a": [1, 2.0, "x", Path("y")]}, protocol=4)
    assert "posixpath" not in list(safeload._globals_in(good))
    for _ in range(300):
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] = draw.randrange(256)
        list(safeload._globals_in(bytes(bad)))


def test_the_shape_of_optimizer_states_survives(tmp_path: Path) -> None:
    group = {"lr": 2e-4, "betas": (0.8, 0.99), "foreach": None, "amsgrad": False, "params": [0, 1]}
    saved = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 2)}}, "param_groups": [group]}
    checkpoint.save_set(tmp_path, 1, {}, {"optimizers": {"main": saved}})
    found = checkpoint.latest_set(tmp_path)
    assert found is not None
    loaded = found.state()["optimizers"]["main"]
    assert loaded["param_groups"] == [group]
    assert torch.equal(loaded["state"][0]["exp_avg"], saved["state"][0]["exp_avg"])  # type: ignore[index]


def test_load_of_no_run_is_clear(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        checkpoint.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        checkpoint.load(tmp_path)
