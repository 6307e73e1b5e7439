"""Two gloo ranks train ``emotion``: the CCC and the gradients of the concatenated batch, dialogues of unequal length, same weights.

This file is also the program of each rank, started with torchrun's variables in its environment.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lalia
from lalia import dist, run_setup
from lalia.data import Corpus
from lalia.dialogues import dialogues
from lalia.sections import DistConfig
from lalia.system import Clock, loss_weights

TESTS = Path(__file__).resolve().parents[2]
WAIT = 120


def gradients(folder: Path, chosen: list[int]) -> list[dict[str, Tensor]]:
    """Gradients of every stretch of the chosen dialogues, averaged over the ranks; nothing steps."""
    from factories import tiny_emotion_config

    from lalia.systems.emotion.system import EmotionSystem

    config: Any = tiny_emotion_config(folder, **{"model.autoregressive": True, "sampling.start": 0, "sampling.end": 0})
    rows = Corpus.read(config.data.train)
    torch.manual_seed(1)
    system = EmotionSystem(config, EmotionSystem.make_tables(config, rows))
    for parameter in system.model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    order = [index for number in chosen for index in dialogues(rows)[number]]
    batch = system.collate([system.prepare(rows[index], Clock()) for index in order])
    found = []
    for turn, losses in system.turns(batch, Clock()):
        system.zero_grad()
        run_setup.turn_figures(turn, losses, loss_weights(config))["loss/main/total"].backward()
        dist.average_gradients(system.parameters())
        found.append({name: p.grad.clone() for name, p in system.named_parameters() if p.grad is not None})
    return found


def rank_program(mode: str, folder: Path) -> None:
    if mode == "gradients":
        world = dist.start(DistConfig(timeout_seconds=60), "cpu")
        # one rank's dialogue has five turns (three stretches), the other's four (two)
        shared = gradients(folder, [[0], [1]][world.rank])
        with dist.alone():
            whole = gradients(folder, [0, 1])
        worst = max(float((a[k] - b[k]).abs().max()) for a, b in zip(shared, whole, strict=True) for k in b)
        scale = max(float(b[k].abs().max()) for b in whole for k in b)
        stretches = [len(shared), len(whole)]
        (folder / f"{world.rank}.json").write_text(json.dumps({"worst": worst, "scale": scale, "stretches": stretches}))
        dist.barrier_wait("end")
        dist.stop()
        return
    from factories import train_tiny_emotion

    train_tiny_emotion(
        folder, "two", **{"data.batch_size": 1, "train.epochs": 2, "ccc_memory": 0.5}
    )  # ends by comparing the weights


def two_ranks(mode: str, folder: Path) -> None:
    from factories import tiny_emotion_config

    tiny_emotion_config(folder)  # the corpus, before both make it
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    source = str(Path(lalia.__file__).resolve().parents[1])
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    common["PYTHONPATH"] = os.pathsep.join([source, str(TESTS), common.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, mode, str(folder)]
    ranks = [
        subprocess.Popen(
            command, env={**common, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE, text=True, cwd=folder
        )
        for r in range(2)
    ]
    errors = [rank.communicate(timeout=WAIT)[1] for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(errors)[-3000:]


def test_gradients_are_those_of_the_concatenated_batch_though_dialogues_differ_in_length(tmp_path: Path) -> None:
    two_ranks("gradients", tmp_path)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["stretches"] == [3, 3]
        assert found["worst"] < 1e-5 * max(1.0, found["scale"])


def test_both_ranks_end_with_the_same_weights(tmp_path: Path) -> None:
    two_ranks("train", tmp_path)
    assert (tmp_path / "two" / "best").exists()


if __name__ == "__main__":
    rank_program(sys.argv[1], Path(sys.argv[2]))
