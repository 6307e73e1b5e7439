"""omni-align: only the projector learns, the loss by hand, a random base refused, measures, decoding."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from factories import make_corpus

from lalia import checkpoint
from lalia.cache import ShardStore, fill, whisper_store
from lalia.config import load_run_config
from lalia.data import BadRow, Corpus, Row
from lalia.logs import read_metrics
from lalia.nn.gpt import Gpt
from lalia.runfolder import RunFolder
from lalia.system import Clock
from lalia.systems.omni import measures
from lalia.systems.omni.align import OmniAlign
from lalia.systems.omni.certificate import Case, GradientPathError, certify
from lalia.systems.omni.foundation import BaseError, describe_base
from lalia.systems.omni.sampling import greedy
from lalia.train import train

TRAIN = ["train.device=cpu", "train.threads=1", "train.log_every=1", "data.workers=0"]
GPT = ["model.depth=2", "model.aspect=16", "model.head_width=16", "model.context=128"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """``corpus`` of eight clips, and ``base``: a GPT of two layers that has learnt their texts for a few steps."""
    root = tmp_path_factory.mktemp("align")
    manifest = make_corpus(root / "corpus", 8)
    items = ["system=omni-base", f"data.train=[{manifest}]", "data.batch_size=8", "tokenizer.kind=byte", *GPT, *TRAIN]
    items += [
        "train.steps=60",
        "train.eval_every=0",
        "sample.tokens=0",
        "optimizers.main.lr=0.01",
        "optimizers.main.warmup_steps=0",
    ]
    train(load_run_config(None, items), root / "base")
    return root


def config(folder: Path, **overrides):
    manifest = folder / "corpus" / "all.jsonl"
    items = ["system=omni-align", f"base={folder / 'base'}", f"data.train=[{manifest}]", f"data.valid=[{manifest}]"]
    items += ["listen.whisper.source=tiny", "listen.trim=true", "projector.hidden=32", "data.batch_size=4", *TRAIN]
    items += ["train.steps=3", "train.epochs=0", "train.eval_every=3", "data.features=none", "optimizers.main.warmup_steps=0"]
    given = {key.replace("__", "."): value for key, value in overrides.items()}
    return load_run_config(None, [*items, *(f"{key}={value}" for key, value in given.items())])


def rows_of(folder: Path) -> list[Row]:
    return list(Corpus.read([folder / "corpus" / "all.jsonl"]))


@pytest.fixture
def system(folder) -> OmniAlign:
    made = OmniAlign(config(folder), OmniAlign.make_tables(config(folder), None))
    made.load_external()
    return made


def batch_of(system: OmniAlign, rows):
    return system.collate([system.prepare(row, Clock()) for row in rows])


# --- learning -------------------------------------------------------------------------------------------------------
def test_the_loss_is_that_of_the_text_positions_by_hand(folder, system) -> None:
    rows = rows_of(folder)[:3]
    found = float(system.losses(batch_of(system, rows), Clock())["loss_text"].detach())
    total, count, bos = 0.0, 0, system.tokenizer.bos
    for row in rows:
        wave = torch.from_numpy(soundfile.read(row.audio, dtype="float32")[0])
        soft, length = system.project(system.listener.hear(wave[None], torch.tensor([len(wave)])))
        spoken = system.tokenizer.encode(row.text)
        logits = system.language(torch.tensor([[bos, *spoken]]), None, soft[:, : length[0]], None)[0].double()
        for position, wanted in enumerate(
            [*spoken, system.tokenizer.eos]
        ):  # BOS predicts the first token and is itself not predicted
            total += float((torch.logsumexp(logits[position], 0) - logits[position, wanted]).detach())
            count += 1
    assert count == sum(len(row.text) + 1 for row in rows)
    assert found == pytest.approx(total / count, rel=1e-5)


def test_bos_stands_before_the_text_and_is_no_target(folder, system) -> None:
    batch = batch_of(system, rows_of(folder)[:2])
    bos, text = system.tokenizer.bos, rows_of(folder)[0].text
    assert batch.tokens[:, 0].tolist() == [bos, bos]
    own = batch.targets[0][: len(text) + 1].tolist()
    assert own == [*text.encode(), system.tokenizer.eos]
    assert all(t == -1 for t in batch.targets[0][len(text) + 1 :].tolist())


def test_only_the_projector_learns(folder) -> None:
    run = folder / "learns"
    train(config(folder, listen__layers="weighted", train__keep=5, train__save_every=1), run)
    one, three = (checkpoint.open_set(run / f"step-0000000{n}").model() for n in (1, 3))
    changed = {name for name in one if not torch.equal(one[name], three[name])}
    assert {name.split(".")[0] for name in changed} == {"projector", "listener"}
    assert {name for name in changed if name.startswith("listener")} == {"listener.layer_weights"}
    assert (run / "metrics.csv").read_text().count("align/retrieval@1,") == 1
    log = (run / "train.rank0.log").read_text(encoding="utf-8")
    assert "gradient path: |∂loss/∂audio| = " in log and "tiny (random)" in log
    loaded = checkpoint.load(run, which="latest")
    assert isinstance(loaded, OmniAlign)
    wave = soundfile.read(rows_of(folder)[0].audio, dtype="float32")[0]
    assert loaded.transcribe([wave]) == checkpoint.load(run, which="latest").transcribe([wave])


def test_it_learns_which_clip_says_what(folder) -> None:
    """Two rows whose texts begin alike for a text model: only listening tells them apart."""
    torch.manual_seed(0)
    system = OmniAlign(config(folder), OmniAlign.make_tables(config(folder), None))
    system.load_external()
    rows = rows_of(folder)[:2]
    batch = batch_of(system, rows)
    optimizer = torch.optim.Adam(system.optimizers()["main"], 0.01)
    for _ in range(400):
        loss = system.losses(batch, Clock())["loss_text"]
        if loss.item() < 0.05:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    waves = [soundfile.read(row.audio, dtype="float32")[0] for row in rows]
    assert [text[:4] for text in system.transcribe(waves)] == [row.text[:4] for row in rows]
    assert system.transcribe(waves[::-1]) == system.transcribe(waves)[::-1]


def test_first_steps_by_spelling_alone_spare_the_language_model(folder, monkeypatch) -> None:
    passes = []
    read = Gpt.forward
    monkeypatch.setattr(Gpt, "forward", lambda self, *given: passes.append(torch.is_grad_enabled()) or read(self, *given))
    monkeypatch.setattr("lalia.systems.omni.align.OmniAlign._certify", lambda *_: None)
    given = {"weights__loss_spelling": 1, "projector__stack": 1, "optimizers__main__lr": 0.01, "spelling_steps": 8}
    run = folder / "spells"
    train(config(folder, **given, train__steps=12, train__eval_every=4), run)
    assert sum(passes) == 4 and len(passes) == 4 + 2 * 3, "four steps of training, and three validations of two batches"
    rows = read_metrics(run / "metrics.csv")
    spelled = [float(row["loss/main/spelling"]) for row in rows if row["split"] == "eval"]
    assert spelled[-1] < spelled[0] and all(row["loss/main/text"] for row in rows if row["split"] == "eval")
    assert [bool(row["loss/main/text"]) for row in rows if row["split"] == "train"] == [False] * 8 + [True] * 4
    assert {row["spelling/left_out"] for row in rows if row["split"] == "train"} == {"0"}


def test_texts_too_long_to_be_spelled_are_counted(folder) -> None:
    made = config(folder, weights__loss_spelling=1, projector__stack=8)
    system = OmniAlign(made, OmniAlign.make_tables(made, None))
    system.load_external()
    rows = rows_of(folder)[:2]
    rows[1].text = "a"
    system.losses(batch_of(system, rows), Clock())
    assert float(system.scalars()["spelling/left_out"]) == pytest.approx(1 - 1 / (1 + len(rows[0].text)))


def test_cached_features_give_the_same_loss(folder, system) -> None:
    rows = rows_of(folder)
    store = whisper_store(folder / "features", system.tables["listener"])
    fill(rows, store, system.listener.hear, progress=False)
    fresh = batch_of(system, rows)
    system.store = store
    stored = batch_of(system, rows)
    assert stored.known.all() and not fresh.known.any() and stored.audio_seconds == pytest.approx(fresh.audio_seconds)
    examples = [system.prepare(row, Clock()) for row in rows[::2]]
    system.store = None
    mixed = system.collate([*examples, *(system.prepare(row, Clock()) for row in rows[1::2])])
    assert mixed.known.tolist() == [True] * 4 + [False] * 4
    losses = [float(system.losses(batch, Clock())["loss_text"].detach()) for batch in (fresh, stored, mixed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[2] == pytest.approx(losses[0], rel=1e-3)


def test_the_run_finds_its_features(folder) -> None:
    made = config(folder, data__features=folder / "found")
    tables = OmniAlign.make_tables(made, None)
    assert OmniAlign(made, tables).store is None
    fill(
        rows_of(folder)[:1],
        whisper_store(folder / "found", tables["listener"]),
        lambda w, n: [torch.zeros(5, 1, 32)],
        progress=False,
    )
    found = OmniAlign(made, tables)
    assert isinstance(found.store, ShardStore)
    heard = found.prepare(rows_of(folder)[0], Clock())
    assert heard.wave is None and heard.heard.shape == (5, 1, 32)
    assert found.prepare(rows_of(folder)[1], Clock()).heard is None


def test_bad_rows_are_named(folder, system) -> None:
    assert system.reject(Row("a", "a.wav", text=" ")) == "no text" and system.reject(Row("a", text="a")) == "no audio"
    row = rows_of(folder)[0]
    with pytest.raises(BadRow, match="too long: .* soft tokens and 201 of text.*context is 128"):
        system.prepare(Row("a", row.audio, text="x" * 200), Clock())


# --- the base -------------------------------------------------------------------------------------------------------
def test_a_random_base_is_refused(folder, tmp_path) -> None:
    for base, message in [
        ("", "base is empty"),
        ("tiny", "random"),
        (str(tmp_path / "none"), "no folder"),
        (str(tmp_path), "lacks"),
    ]:
        with pytest.raises(BaseError, match=message):
            describe_base(base)
    fresh = tmp_path / "fresh"
    source = folder / "base"
    fresh.mkdir()
    for name in ("config.yaml", "tables.json"):
        (fresh / name).write_bytes((source / name).read_bytes())
    with pytest.raises(BaseError, match="no checkpoint.*random"):
        describe_base(str(fresh))
    weights = checkpoint.load_weights(source)
    checkpoint.save_set(fresh, 0, weights, {}, {})
    with pytest.raises(BaseError, match="step 0.*random"):
        describe_base(str(fresh))
    (fresh / "config.yaml").write_text("system: omni-smoke\n", encoding="utf-8")
    with pytest.raises(BaseError, match="omni-smoke.*captions by heart"):
        describe_base(str(fresh))


@pytest.mark.parametrize("first", [{}, {"weights__loss_spelling": 1, "spelling_steps": 3}], ids=["text", "spelling"])
def test_a_base_that_was_never_trained_fails_the_certificate_in_training(folder, tmp_path, first) -> None:
    random = tmp_path / "random"
    RunFolder(random).create()
    for name in ("config.yaml", "tables.json"):
        (random / name).write_bytes((folder / "base" / name).read_bytes())
    made = load_run_config(random / "config.yaml", [])
    network = Gpt(made["model"].gpt(257))
    checkpoint.save_set(random, 5, {f"model.{name}": value for name, value in network.state_dict().items()}, {}, {})
    with pytest.raises(GradientPathError, match=r"∂loss/∂audio\| = 0 (?s:.*)zero-init(?s:.*)chance is 5.55"):
        train(config(folder, base=random, **first), tmp_path / "run")


def test_our_gpt_at_random_has_no_gradient_and_after_training_has(folder, system) -> None:
    batch = batch_of(system, rows_of(folder)[:3])
    prefix, counts = system.soft_tokens(batch)
    given = Case(batch.tokens, batch.targets, batch.lengths, prefix.detach(), counts)
    assert certify(system.language, given).ok
    fresh = certify(Gpt(system.language.config), given)
    assert (
        fresh.gradient == 0.0
        and fresh.reasons[0].startswith("zero-init")
        and fresh.text_loss == pytest.approx(math.log(257), abs=0.01)
    )


# --- measures -------------------------------------------------------------------------------------------------------
def test_retrieval_counts_ranks() -> None:
    text = torch.eye(4)
    audio = torch.stack([text[0], text[1], text[3], text[2]])
    found = measures.retrieval(audio, text, ks=(1, 3))
    assert found["retrieval@1"] == 0.5 and found["retrieval@1_chance"] == pytest.approx(0.25)
    same = measures.retrieval(audio, text, ["a", "b", "c", "c"], ks=(1,))
    assert same["retrieval@1"] == 1.0 and same["retrieval@1_chance"] == pytest.approx((0.25 + 0.25 + 0.5 + 0.5) / 4)
    assert measures.retrieval(torch.zeros(4, 4), text, ks=(1,))["retrieval@1"] == 0, "all alike is no match"


def test_cka_is_one_for_a_rotation_and_little_by_chance() -> None:
    torch.manual_seed(0)
    values = torch.randn(200, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    assert measures.linear_cka(values, 3 * values @ rotation + 1) == pytest.approx(1)
    assert measures.linear_cka(values, torch.randn(200, 6)) < 0.1
    centred, other = values - values.mean(0), torch.randn(200, 4)
    other = other - other.mean(0)
    by_hand = (centred.T @ other).norm() ** 2 / ((centred.T @ centred).norm() * (other.T @ other).norm())
    assert measures.linear_cka(values, other) == pytest.approx(float(by_hand), rel=1e-4)


def test_picture_and_numbers_are_written(folder, system, tmp_path) -> None:
    figures = system.measure(rows_of(folder), tmp_path / "report")
    assert figures == json.loads((tmp_path / "report" / "alignment.json").read_text())
    assert {"retrieval@1", "retrieval@1_chance", "cka", "cka_shuffled", "pairs"} <= set(figures) and figures["pairs"] == 8
    assert (tmp_path / "report" / "alignment.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="2 recordings are too few"):
        system.measure(rows_of(folder)[:2], tmp_path / "few")


# --- transcribing ---------------------------------------------------------------------------------------------------
def test_transcribing_several_is_transcribing_each(folder, system) -> None:
    waves = [soundfile.read(row.audio, dtype="float32")[0] for row in rows_of(folder)[:3]]
    together = system.transcribe(waves)
    assert together == [system.transcribe([wave])[0] for wave in waves]


def test_greedy_through_the_cache_is_greedy_without(folder, system) -> None:
    wave = torch.from_numpy(soundfile.read(rows_of(folder)[1].audio, dtype="float32")[0])
    soft, counts = system.project(system.listener.hear(wave[None], torch.tensor([len(wave)])))
    tokens = [system.tokenizer.bos]
    with torch.no_grad():
        for _ in range(12):
            tokens.append(int(system.language(torch.tensor([tokens]), None, soft, counts)[0, -1, :257].argmax()))
    bos = torch.tensor([[system.tokenizer.bos]])
    found = greedy(system.language, (bos, None, soft.detach(), counts), {256}, 12, 257)[0]
    ended = tokens[1:].index(256) if 256 in tokens[1:] else 12
    assert found == tokens[1 : ended + 1]


def test_recordings_that_cannot_be_heard_are_numbered(system) -> None:
    with pytest.raises(ValueError, match="recording 2 has 0 s"):
        system.transcribe([np.ones(400, np.float32), np.ones(0, np.float32)])
    with pytest.raises(ValueError, match="recording 1 has 60 s, 750 soft tokens.*context is 128"):
        system.transcribe([np.zeros(960_000, np.float32)])


def test_configuration_is_checked(folder) -> None:
    for key, value, message in [
        ("projector__stack", 9, "1 … 8"),
        ("listen__layers", "all", "all"),
        ("listen__numbers", "[7]", "0 … 2"),
        ("spelling_steps", 5, "needs weights.loss_spelling above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            made = config(folder, **{key: value, **({"listen__layers": "index"} if "numbers" in key else {})})
            OmniAlign.make_tables(made, None)
