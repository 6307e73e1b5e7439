"""Two gloo ranks train ``vits2``: gradients of the concatenated batch, identical weights, patience during evaluation.

This file is also the program of each rank: ``python test_distributed.py MODE FOLDER`` under torchrun, which takes some
seconds to start, else a child that is forked with torchrun's variables in its environment.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trainer_children import FORK, FOUR, fingerprint, mini_config, no_pictures, server_path, sets

import lalia
from lalia import checkpoint, dist, run_setup
from lalia import train as trainer
from lalia.data import Corpus
from lalia.sections import DistConfig, RunConfig
from lalia.system import Clock, loss_weights
from lalia.systems.vits2.system import Vits2

ROWS = {0: [0, 3, 5], 1: [6]}  # ranks of unequal batches and lengths


# --- programs of one rank -------------------------------------------------------------------------------------------
def gradients(config: RunConfig, rows: list[int]) -> dict[str, Tensor]:
    """Gradient of every parameter after its own turn, averaged over the ranks; no network steps."""
    corpus = Corpus.read(config["data"].train)
    torch.manual_seed(1)
    system = Vits2(config, Vits2.make_tables(config, corpus))  # type: ignore[arg-type]
    with torch.no_grad():  # zero projections at the start of flow and splines would hide what stands before them
        for parameter in system.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    for module in system.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    clock = Clock(3, 0)
    batch = system.collate([system.prepare(corpus[row], clock) for row in rows])
    found: dict[str, Tensor] = {}
    for turn, losses in system.turns(batch, clock):
        system.zero_grad()
        run_setup.turn_figures(turn, losses, loss_weights(config))[f"loss/{turn}/total"].backward()
        parameters = dict(zip(turn_names(system, turn), system.optimizers()[turn], strict=True))
        dist.average_gradients(parameters.values())
        found |= {f"{turn}/{name}": p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    return found


def turn_names(system: Vits2, turn: str) -> list[str]:
    names = {id(p): name for name, p in system.named_parameters()}
    return [names[id(p)] for p in system.optimizers()[turn]]


def compare(folder: Path) -> None:
    world = dist.start(DistConfig(timeout_seconds=60), "cpu")
    config = mini_config(folder, **FOUR, **{"model.dropout": 0, "model.duration_dropout": 0, "model.mel_prior": True})
    shared = gradients(config, ROWS[world.rank])
    with dist.alone():
        whole = gradients(config, [row for rows in ROWS.values() for row in rows])
    worst = max((float((shared[k] - whole[k]).abs().max()), k) for k in whole)
    largest = {k: float(v.abs().max()) for k, v in whole.items()}
    scale = {turn: max(v for k, v in largest.items() if k.startswith(turn + "/")) for turn in ("d", "dur", "wd", "g")}
    result = {"same": shared.keys() == whole.keys(), "worst": worst, "scale": scale, "count": len(whole)}
    (folder / f"{world.rank}.json").write_text(json.dumps(result))
    dist.barrier_wait("end")
    dist.stop()


def train(folder: Path, mode: str) -> None:
    no_pictures()
    options: dict[str, Any] = {"train.steps": 5, "train.save_every": 2, "data.batch_size": 1, **FOUR}
    if mode == "slow":
        options |= {"train.steps": 2, "train.eval_every": 1, "dist.timeout_seconds": 2.5, "dist.eval_timeout_seconds": 60}
        real = run_setup.validate
        run_setup.validate = lambda *arguments: (time.sleep(4), real(*arguments))[1]
    if mode == "stopped":
        options["train.steps"] = 10**6
        real_step = trainer.Trainer._step

        def step(self: trainer.Trainer, *arguments: Any) -> None:
            real_step(self, *arguments)
            if self.world.rank == 1 and self.counters.step == 3:
                os.kill(os.getpid(), signal.SIGINT)  # only this rank hears of it

        trainer.Trainer._step = step  # type: ignore[method-assign]
    trainer.train(mini_config(folder, **options), folder / "run")


def program(mode: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if mode == "compare":
        compare(folder)
    else:
        train(folder, mode)


def forked_rank(mode: str, folder: Path, rank: int, port: int) -> None:
    """The program with torchrun's variables; what it says goes to ``said.<rank>``."""
    said = os.open(folder / f"said.{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    placed = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({name: str(value) for name, value in placed.items()})
    program(mode, folder)


# --- tests ----------------------------------------------------------------------------------------------------------
def two_ranks(mode: str, folder: Path) -> str:
    """Like :func:`torchrun`, without its start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    ranks = [FORK.Process(target=forked_rank, args=(mode, folder, rank, port)) for rank in range(2)]
    with server_path():
        for rank in ranks:
            rank.start()
    for rank in ranks:
        rank.join(240)
        rank.kill()
        rank.join()
    said = "".join((folder / f"said.{rank}").read_text() for rank in range(2))
    assert [rank.exitcode for rank in ranks] == [0, 0], said[-6000:]
    return said


def torchrun(mode: str, folder: Path) -> str:
    """Two ranks of this file; returns what they said."""
    paths = [str(Path(lalia.__file__).parents[1]), str(Path(__file__).parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, __file__, mode, str(folder)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


def test_gradients_equal_those_of_the_concatenated_batch(tmp_path: Path) -> None:
    mini_config(tmp_path)
    two_ranks("compare", tmp_path)
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert result["same"] and result["count"] > 200
        assert result["worst"][0] < 1e-5 * max(1.0, *result["scale"].values()), result
        assert all(value > 1e-4 for value in result["scale"].values())  # every turn had something to compare


def test_torchrun_trains_and_goes_on(tmp_path: Path) -> None:
    """Both ranks end with identical weights (train() itself compares them); a second start goes on; ranks log apart."""
    mini_config(tmp_path)
    torchrun("train", tmp_path)
    run = tmp_path / "run"
    assert sets(run) == [0, 2, 4, 5]
    for rank in range(2):
        assert "epoch 0 · step 4" in (run / f"train.rank{rank}.log").read_text()
    whole = fingerprint(run)
    for step in (4, 5):  # as if killed after step 2
        path = run / f"step-{step:08d}" / "train.pt"
        path.write_bytes(path.read_bytes()[:-1])
    two_ranks("train", tmp_path)
    assert "using the checkpoint of step 2 instead" in (run / "train.rank0.log").read_text()
    assert fingerprint(run) == whole


def test_slow_evaluation_does_not_trip_the_collective_timeout(tmp_path: Path) -> None:
    mini_config(tmp_path)
    two_ranks("slow", tmp_path)
    assert checkpoint.latest_set(tmp_path / "run").step == 2  # type: ignore[union-attr]


def test_a_signal_to_one_rank_ends_all_together(tmp_path: Path) -> None:
    mini_config(tmp_path)
    said = two_ranks("stopped", tmp_path)
    assert sets(tmp_path / "run")[-1] in (3, 4) and "the same command goes on from there" in said


if __name__ == "__main__":
    program(sys.argv[1], Path(sys.argv[2]))
