"""Text pretraining: windows, bits per byte, sampling, and the floor around them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lalia import checkpoint
from lalia.config import load_run_config
from lalia.data import Row, write_manifest
from lalia.loader import Loader
from lalia.logs import read_metrics
from lalia.system import Clock
from lalia.systems.omni.base import IGNORED, BitsPerByte, OmniBase, Piece, windows
from lalia.systems.omni.sampling import choose, generate
from lalia.train import train

TINY = [
    "system=omni-base", "model.depth=2", "model.aspect=16", "model.head_width=16", "model.context=32", "data.workers=0",
    "data.batch_size=3", "sample.tokens=8", "train.device=cpu", "train.threads=1", "train.log_every=1", "train.save_every=0",
    "train.precision=fp32",
]  # fmt: skip
WORDS = ["one two three ", "seven eight nine ", "red green blue ", "north south east west "]


def config(folder: Path, *overrides: str) -> Any:
    manifest = folder / "text.jsonl"
    if not manifest.is_file():
        rows = [Row(f"r{i}", text=WORDS[i % 4] * (2 + i), extra={"more": True} if i == 3 else {}) for i in range(6)]
        write_manifest(manifest, rows)
    return load_run_config(None, [*TINY, f"data.train=[{manifest}]", f"data.valid=[{manifest}]", *overrides])


def build(folder: Path, *overrides: str) -> tuple[OmniBase, Any]:
    from lalia.data import Corpus

    settings = config(folder, *overrides)
    rows = Corpus.read(settings.data.train)
    torch.manual_seed(0)
    return OmniBase(settings, OmniBase.make_tables(settings, rows)), rows


def piece(name: str, tokens: list[int], more: bool = False, together: bool = True) -> Piece:
    return Piece(name, np.asarray(tokens, dtype=np.int32), len(tokens), more, together)


# --- windows ----------------------------------------------------------------------------------------------------------
def test_windows_by_hand() -> None:
    tokens, targets = windows([piece("a", [1, 2, 3]), piece("b", [4, 5], more=True), piece("c", [6])], 9, 4)
    assert tokens.tolist() == [[9, 1, 2, 3], [9, 4, 5, 9], [6, 9, 9, 9]]
    assert targets.tolist() == [[1, 2, 3, 9], [4, 5, IGNORED, 6], [9, IGNORED, IGNORED, IGNORED]]


def test_rows_that_stand_alone_begin_a_window_each() -> None:
    tokens, targets = windows([piece("a", [1, 2, 3, 4, 5], together=False), piece("b", [6], together=False)], 9, 4)
    assert tokens.tolist() == [[9, 1, 2, 3], [4, 5, 9, 9], [9, 6, 9, 9]]
    assert targets.tolist() == [[1, 2, 3, 4], [5, 9, IGNORED, IGNORED], [6, 9, IGNORED, IGNORED]]


@pytest.mark.parametrize("together", [True, False])
def test_every_token_is_a_target_once(together: bool) -> None:
    random = np.random.default_rng(0)
    pieces = [piece(str(i), random.integers(0, 9, random.integers(1, 40)).tolist(), together=together) for i in range(20)]
    _, targets = windows(pieces, 9, 16)
    said = targets[(targets != IGNORED) & (targets != 9)]
    assert said.tolist() == np.concatenate([p.tokens for p in pieces]).tolist()


# --- bits per byte ----------------------------------------------------------------------------------------------------
def figures(system: OmniBase, rows: Any, size: int) -> dict[str, float]:
    system.eval()
    system.config.data.batch_size = size
    system.meter = meter = system.new_meter()
    with torch.no_grad():
        for batch in Loader(system, rows, system.config.data, 0, training=False).batches(0):
            system.losses(batch, Clock(training=False))
    system.meter = None
    return meter.figures()


def test_bits_per_byte_are_of_all_the_text_and_not_of_batches(tmp_path: Path) -> None:
    """The figure by hand, row by row and token by token, and the same for any size of batch."""
    system, rows = build(tmp_path)
    with torch.no_grad():
        system.model.head.weight.normal_(std=0.5)
        bits, size = 0.0, 0
        for row in rows:
            ids = [256, *row.text.encode("utf-8")]
            size += len(ids) - 1
            for start in range(0, len(ids) - 1, 32):
                window = ids[start : start + 32]
                logits = system.model(torch.tensor([window]))[0].double().log_softmax(-1)
                bits -= sum(float(logits[i, t]) for i, t in enumerate(ids[start + 1 : start + 33])) / math.log(2)
    expected = bits / size
    assert expected > 8.05  # far enough from a uniform guess to mean something
    for batch_size in (1, 4, 6):
        found = figures(system, rows, batch_size)
        assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-5) and found["megabytes"] == size / 1e6


def test_a_new_model_guesses_uniformly(tmp_path: Path) -> None:
    system, rows = build(tmp_path)
    assert figures(system, rows, 3)["bits_per_byte"] == pytest.approx(math.log2(257), abs=0.02)
    assert BitsPerByte().figures() == {}


def test_bits_per_byte_of_a_bpe_count_bytes(tmp_path: Path) -> None:
    system, rows = build(tmp_path, "tokenizer.kind=bpe", "tokenizer.size=262")
    found = figures(system, rows, 3)
    tokens = sum(len(system.tokenizer.encode(row.text)) for row in rows)
    size = sum(len(row.text) for row in rows)
    assert tokens < size and found["bits_per_byte"] == pytest.approx(math.log2(262) * tokens / size, rel=0.01)


# --- the floor --------------------------------------------------------------------------------------------------------
def test_learns_rows_by_heart_and_goes_on_from_them(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(config(tmp_path, "train.steps=60", "train.eval_every=30"), run)
    values = [float(r["bits_per_byte"]) for r in read_metrics(run / "metrics.csv") if r["split"] == "eval"]
    assert len(values) == 2 and values[-1] < values[0] and values[-1] < 1.5
    system = checkpoint.load(run)
    assert isinstance(system, OmniBase)
    assert system.generate("north south ", max_tokens=4) == "east"
    assert "greedy/The" in (run / "train.rank0.log").read_text(encoding="utf-8")


def test_resuming_is_going_on(tmp_path: Path) -> None:
    settings = ["train.eval_every=0", "optimizers.main.schedule=constant", "data.valid=[]"]
    for name, steps in (("whole", [6]), ("parts", [2, 6])):
        for count in steps:
            train(config(tmp_path, f"train.steps={count}", *settings), tmp_path / name)
    one, two = (checkpoint.latest_set(checkpoint.RunFolder(tmp_path / name)) for name in ("whole", "parts"))
    assert one is not None and two is not None
    first, second = one.model(), two.model()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_rows_without_text_are_rejected(tmp_path: Path) -> None:
    system, _ = build(tmp_path)
    assert system.reject(Row("a")) == "no text" and system.reject(Row("a", text="b")) == ""


# --- sampling ---------------------------------------------------------------------------------------------------------
def test_greedy_equals_the_model_without_a_cache(tmp_path: Path) -> None:
    system, _ = build(tmp_path)
    with torch.no_grad():
        for parameter in system.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    system.eval()
    ids = [256, 1, 2, 3]
    prefix = torch.randn(5, system.model.width)
    for audio in (None, prefix):
        said = list(generate(system.model, ids, max_tokens=10, prefix=audio))
        slow = list(ids)
        for _ in range(10):
            with torch.no_grad():
                logits = system.model(torch.tensor([slow]), None, None if audio is None else audio[None])
            slow.append(int(logits[0, -1].argmax()))
        assert said == slow[4:]


def test_sampling_depends_on_the_seed_alone(tmp_path: Path) -> None:
    system, _ = build(tmp_path)
    state = torch.get_rng_state()
    one, again, other = (list(generate(system.model, [256], max_tokens=12, temperature=1.0, seed=s)) for s in (1, 1, 2))
    assert one == again != other and torch.equal(state, torch.get_rng_state())


def test_choice_follows_the_probabilities_and_top_k() -> None:
    logits, generator = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.Generator().manual_seed(0)
    drawn = np.bincount([choose(logits, 0.5, 0, generator) for _ in range(4000)], minlength=4) / 4000
    assert drawn == pytest.approx((logits / 0.5).softmax(0).numpy(), abs=0.03)
    assert {choose(logits, 5.0, 2, generator) for _ in range(200)} == {0, 1}
    assert choose(logits, 0.0, 0, generator) == 0


def test_generation_ends_at_a_stop_or_with_the_context(tmp_path: Path) -> None:
    system, _ = build(tmp_path)
    assert len(list(generate(system.model, [256] * 30, max_tokens=99))) == 2
    first = next(iter(generate(system.model, [256], max_tokens=1)))
    assert list(generate(system.model, [256], stop={first})) == []
    with pytest.raises(ValueError, match="1 … 31 tokens"):
        list(generate(system.model, [256] * 32))
    with pytest.raises(ValueError, match="0 or more"):
        list(generate(system.model, [256], temperature=-1))
