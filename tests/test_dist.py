"""Ranks, averages and waiting, on two gloo processes (V-01, V-02, X-06). This file is also the program of each rank."""

from __future__ import annotations

import copy
import json
import logging
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lalia import dist
from lalia.sections import DistConfig

VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK")


# --- the program of one rank ----------------------------------------------------------------------------------------
class Branches(nn.Module):
    """``both`` is used on each rank, ``first`` on rank 0 alone, ``second`` on rank 1 alone, ``never`` on none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.both, self.first, self.second, self.never = (nn.Linear(4, 4) for _ in range(4))

    def loss(self, rows: torch.Tensor, ranks: list[int]) -> torch.Tensor:
        """Mean over the rows, each through the branch of its rank."""
        hidden = self.both(rows)
        parts = [(self.first if rank == 0 else self.second)(row) for row, rank in zip(hidden, ranks, strict=True)]
        return torch.stack(parts).square().mean()


def check_gradients(rank: int) -> float:
    """Two ranks step as one process does with the concatenated batch; returns the largest gradient difference."""
    module = Branches()
    alone = copy.deepcopy(module)
    rows = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    alone.loss(rows, [0, 1]).backward()
    module.loss(rows[rank : rank + 1], [rank]).backward()
    dist.average_gradients(module.parameters(), bucket_mb=1)
    worst = 0.0
    for mine, theirs in zip(module.parameters(), alone.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None and theirs.grad is not None:
            worst = max(worst, float((mine.grad - theirs.grad).abs().max()))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:
                parameter.mul_(0.99).sub_(parameter.grad, alpha=0.1)
    dist.assert_same_weights(module)
    assert set(dist.gather_objects(dist.checksum_parameters(module))) == {dist.checksum_parameters(module)}
    return worst


def check_difference(rank: int) -> str:
    module = Branches()
    with torch.no_grad():
        module.second.bias[1] += rank * 1e-7
    with pytest.raises(RuntimeError) as caught:
        dist.assert_same_weights(module)
    return str(caught.value)


def check_waiting(rank: int, folder: Path) -> float:
    """Rank 0 is busy for longer than the collective timeout; the others wait for it and collectives work afterwards."""
    begin = time.monotonic()
    if rank == 0:
        time.sleep(4.5)
    dist.wait_for_main("evaluate")
    waited = time.monotonic() - begin
    assert float(dist.average(rank)) == 0.5
    with dist.rank_zero_first():
        if rank == 0:
            time.sleep(0.2)
            (folder / "made").touch()
        assert (folder / "made").exists()
    if rank == 1:
        with pytest.raises(TimeoutError, match="rank 0 at 'nobody'"):
            dist.wait_for_main("nobody", timeout=0.2)
    dist.barrier_wait("together")
    return waited


def rank_program(mode: str, folder: Path) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO)
    config = DistConfig(timeout_seconds=2.5 if mode == "full" else 60, eval_timeout_seconds=60)
    if "TEST_PORT" in os.environ:  # this rank has no torchrun variables
        config.world_size, config.rank, config.master_port = 2, 1, int(os.environ["TEST_PORT"])
    world = dist.start(config, "cpu")
    result: dict[str, Any] = {"rank": world.rank, "size": world.size, "backend": world.backend}
    result["mean"] = float(dist.average(world.rank + 1))
    if mode == "full":
        result["mean_half"] = dist.average(torch.full((2,), world.rank, dtype=torch.bfloat16)).tolist()
        result["told"] = dist.broadcast_object({"from": world.rank})
        dist.barrier_wait("checks")
        result["gradient_difference"] = check_gradients(world.rank)
        result["difference"] = check_difference(world.rank)
        dist.barrier_wait("waiting")
        result["waited"] = check_waiting(world.rank, folder)
    (folder / f"{world.rank}.json").write_text(json.dumps(result))
    dist.barrier_wait("end")
    dist.stop()


# --- tests ----------------------------------------------------------------------------------------------------------
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    paths = [str(Path(dist.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in paths if p), **more}


def run_pair(mode: str, folder: Path, environments: list[dict[str, str]]) -> tuple[list[dict[str, Any]], list[str]]:
    command = [sys.executable, __file__, mode, str(folder)]
    ranks = [subprocess.Popen(command, env=e, stderr=subprocess.PIPE, text=True) for e in environments]
    errors = [process.communicate(timeout=90)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)], errors


def test_two_ranks_one_placed_by_the_environment_one_by_its_config(tmp_path: Path) -> None:
    port = str(free_port())
    told = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    results, errors = run_pair("full", tmp_path, [told, environment(TEST_PORT=port)])
    for rank, result in enumerate(results):
        assert (result["rank"], result["size"], result["backend"]) == (rank, 2, "gloo")
        assert result["mean"] == 1.5 and result["mean_half"] == [0.5, 0.5] and result["told"] == {"from": 0}
        assert result["gradient_difference"] < 1e-6
        assert result["difference"] == "parameter second.bias differs between rank 0 and rank 1"
        assert result["waited"] > 3
        source = "environment" if rank == 0 else "config"
        assert errors[rank].count("distributed:") == 1 and f"WORLD_SIZE=2 ({source})" in errors[rank]


def test_torchrun(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command += [__file__, "torchrun", str(tmp_path)]
    subprocess.run(command, env=environment(), check=True, timeout=120, capture_output=True)
    assert [json.loads((tmp_path / f"{r}.json").read_text())["mean"] for r in range(2)] == [1.5, 1.5]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    yield monkeypatch
    dist.stop()


def test_one_process_makes_no_group(bare: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    bare.setenv("WORLD_SIZE", "1")
    world = dist.start(DistConfig(world_size=4), "cpu")
    assert not torch.distributed.is_initialized()
    assert (world.size, world.backend, world.is_main) == (1, "none", True) and dist.world() is world
    assert "WORLD_SIZE=1 (environment)" in caplog.text and "RANK=0 (config)" in caplog.text
    parameter = nn.Parameter(torch.ones(2))
    dist.average_gradients([parameter])
    assert parameter.grad is None
    value = torch.ones(2, requires_grad=True)
    assert torch.equal(dist.average(value), torch.ones(2)) and not dist.average(value).requires_grad
    dist.wait_for_main("x", timeout=0.01)
    dist.barrier_wait("x", timeout=0.01)
    assert dist.gather_objects(3) == [3] and dist.broadcast_object("a") == "a"


def test_bad_placement_and_devices_are_named(bare: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="rank 2 is not in a world of 2"):
        dist.start(DistConfig(world_size=2, rank=2), "cpu")
    with pytest.raises(ValueError, match="'gpu' is not a device"):
        dist.start(DistConfig(), "gpu")
    bare.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="asks for cuda:0.*sees 0 CUDA"):
        dist.start(DistConfig(), "cuda")
    with pytest.raises(ValueError, match="nccl needs CUDA"):
        dist.start(DistConfig(world_size=2, backend="nccl"), "cpu")
    bare.setenv("RANK", "first")
    with pytest.raises(ValueError, match="RANK must be a whole number, got 'first'"):
        dist.start(DistConfig(), "cpu")


def test_backend_and_libuv_by_platform(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(torch.distributed, "is_nccl_available", lambda: True)
    bare.setattr(platform, "system", lambda: "Linux")
    assert dist._backend("auto", torch.device("cuda", 0)) == "nccl"
    assert dist._backend("auto", torch.device("cpu")) == "gloo"
    bare.setattr(platform, "system", lambda: "Windows")
    assert dist._backend("auto", torch.device("cuda", 0)) == "gloo"
    bare.delenv("USE_LIBUV", raising=False)
    seen: list[str | None] = []

    def rendezvous(*_: Any, **__: Any) -> Any:
        seen.append(os.environ.get("USE_LIBUV"))
        raise ConnectionError

    bare.setattr(torch.distributed, "rendezvous", rendezvous)
    with pytest.raises(ConnectionError):
        dist.start(DistConfig(world_size=2), "cpu")
    assert seen == ["0"]
    os.environ.pop("USE_LIBUV")


def test_buckets_hold_one_kind_and_respect_the_limit() -> None:
    sizes = [100, 300, 50, 900, 10]
    parameters = [nn.Parameter(torch.zeros(n)) for n in sizes] + [nn.Parameter(torch.zeros(5, dtype=torch.float64))]
    buckets = list(dist._buckets(parameters, 4 * 400))
    assert sorted(id(p) for b in buckets for p in b) == sorted(id(p) for p in parameters)
    assert [[p.numel() for p in b] for b in buckets] == [[100, 300], [50], [900], [10], [5]]


def test_checksum_sees_one_bit_names_and_shapes() -> None:
    module = Branches()
    before = dist.checksum_parameters(module)
    assert before == dist.checksum_parameters(Branches())
    module.both.weight.data.view(torch.int32)[0, 0] ^= 1
    assert before != dist.checksum_parameters(module)
    scalar = nn.Module()
    scalar.gain = nn.Parameter(torch.tensor(1.0))
    assert len(dist.checksum_parameters(scalar)) == 64


if __name__ == "__main__":
    rank_program(sys.argv[1], Path(sys.argv[2]))
