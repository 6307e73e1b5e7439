"""Is a resumed training the training that was never interrupted? SIGKILL at random moments, then a comparison to the bit.

``python benchmarks/kill9.py --kills 20`` trains a small ``vits2`` (all four optimizers, a loader process, a moving average,
evaluation) once without a break and once under fire: each start is killed after a random time, with no warning, and the same
command is started again until the run is whole. The verdict compares the sha256 of every tensor of ``model.safetensors`` and of
the optimizers' state, and the counters.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lalia
from lalia import checkpoint, config
from lalia.audio import write as write_wave
from lalia.data import Row, write_manifest
from lalia.train import Trainer, train

RATE = 8000
BEGUN = "the loop begins"  # said by each start when all that comes before the first step is done
TEXTS = ["Alpha bravo.", "Charlie delta echo.", "Foxtrot.", "Golf hotel.", "India juliet.", "Kilo lima.", "Mike.", "Oscar papa."]
SETTINGS = """system=vits2
audio.sample_rate=8000 audio.n_fft=256 audio.hop=128 audio.win=256 audio.mels=20
data.batch_size=2 data.segment_frames=8 data.workers=1
model.width=16 model.filter=32 model.layers=2 model.speaker_layer=1 model.posterior_layers=2 model.flows=2 model.flow_layers=1
model.speaker_width=8 model.duration_width=16 model.istft.channels=16 model.istft.layers=1
discriminator.scales=0 discriminator.periods=[2] discriminator.channels=0.03125 discriminator.wavlm=true
discriminator.wavlm_channels=4 train.log_every=5 train.eval_every=10 train.valid_batches=1 train.device=cpu train.threads=1
train.ema=0.99"""


def make_corpus(folder: Path) -> Path:
    """Eight clips of noise under an envelope; what they sound like does not matter here."""
    noise = np.random.default_rng(0)
    rows = []
    for index, text in enumerate(TEXTS):
        samples = RATE * (9 + index % 4) // 10
        wave = (0.1 * noise.standard_normal(samples) * np.hanning(samples)).astype(np.float32)
        path = folder / f"clip{index}.wav"
        write_wave(path, wave, RATE)
        rows.append(Row(path.stem, str(path), duration=samples / RATE, text=text, speaker=f"s{index % 2}", language="en"))
    write_manifest(folder / "all.jsonl", rows)
    return folder / "all.jsonl"


def start(run: Path, manifest: Path, steps: int, save_every: int) -> subprocess.Popen[bytes]:
    """One start of the one command."""
    command = [sys.executable, __file__, "--train", str(run), "--manifest", str(manifest)]
    command += ["--steps", str(steps), "--save-every", str(save_every)]
    paths = os.pathsep.join([str(Path(lalia.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with open(f"{run}.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})


def wait_for_loop(run: Path, process: subprocess.Popen[bytes], before: int) -> None:
    while process.poll() is None and begun(run) == before:
        time.sleep(0.01)


def begun(run: Path) -> int:
    """How many starts have come to their first step."""
    log = Path(f"{run}.log")
    return log.read_text(errors="replace").count(BEGUN) if log.is_file() else 0


def finish(run: Path, *arguments: Any) -> float:
    """Run to the end without a break; seconds from the first step."""
    before = begun(run)
    process = start(run, *arguments)
    wait_for_loop(run, process, before)
    begin = time.monotonic()
    if process.wait() != 0:
        raise RuntimeError(f"the training in {run} failed; its last words: {Path(f'{run}.log').read_text()[-2000:]}")
    return time.monotonic() - begin


def newest(run: Path) -> int:
    return max((int(path.name[5:]) for path in run.glob("step-*")), default=-1)


def under_fire(run: Path, kills: int, span: float, draw: random.Random, *arguments: Any) -> list[tuple[float, int]]:
    """Kill ``kills`` starts, each up to ``span`` seconds after it began its first step; (seconds, newest set) of each."""
    history = []
    for _ in range(kills):
        before = begun(run)
        process = start(run, *arguments)
        wait_for_loop(run, process, before)
        delay = draw.uniform(0, span)
        time.sleep(delay)
        process.kill()
        process.wait()
        history.append((round(delay, 3), newest(run)))
        print(f"killed after {delay:.2f} s, newest checkpoint: step {newest(run)}", flush=True)
    return history


def fingerprint(run: Path) -> dict[str, str]:
    """sha256 of every tensor of the newest set, and its counters but for the times."""
    found = checkpoint.latest_set(run)
    if found is None:
        raise RuntimeError(f"{run} holds no checkpoint")
    hashes: dict[str, str] = {}
    _hash_tensors("", {"model": found.model(), **found.state()}, hashes)
    return {name: value for name, value in hashes.items() if not name.endswith("counters/seconds")}


def _hash_tensors(prefix: str, value: Any, into: dict[str, str]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _hash_tensors(f"{prefix}/{key}", item, into)
    elif isinstance(value, torch.Tensor):
        into[prefix] = hashlib.sha256(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    else:
        into[prefix] = repr(value)


def run(kills: int = 3, steps: int = 60, save_every: int = 4, seed: int = 0) -> dict[str, dict[str, Any]]:
    """``kill9``: ``ratio`` is 1.0 when the two runs are the same to the bit, else 0.0."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="kill9-") as folder:
        plan = (make_corpus(Path(folder)), steps, save_every)
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        seconds = finish(whole, *plan)
        print(f"without a break: {steps} steps in {seconds:.1f} s", flush=True)
        history = under_fire(broken, kills, 2 * seconds / max(2, kills), draw, *plan)
        finish(broken, *plan)
        a, b = fingerprint(whole), fingerprint(broken)
    different = sorted(name for name in {**a, **b} if a.get(name) != b.get(name))
    verdict = f"identical: {len(a)} tensors and counters" if not different else f"{len(different)} differ, e.g. {different[:3]}"
    note = f"{kills} kills of a run of {steps} steps, seed {seed}; (delay, newest set): {history}; {verdict}"
    print(note)
    same = float(not different)
    return {
        "kill9": {
            "ratio": same, "p10": same, "p90": same, "ours": len(different), "theirs": 0,
            "against": "the same training without interruption", "note": note,
        }
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--save-every", type=int, default=4)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--manifest", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train is None:
        result = run(given.kills, given.steps, given.save_every, given.seed)
        print(json.dumps(result, indent=2))
        return 0 if result["kill9"]["ratio"] == 1.0 else 1
    items = [*SETTINGS.split(), f"data.train=[{given.manifest}]", f"data.valid=[{given.manifest}]"]
    items += [f"train.steps={given.steps}", f"train.save_every={given.save_every}"]
    fit = Trainer.fit
    Trainer.fit = lambda self: (print(BEGUN, flush=True), fit(self))[1]  # type: ignore[method-assign]
    train(config.load_run_config(None, items), given.train)
    return 0


if __name__ == "__main__":
    sys.exit(main())
