"""State as data: a loop of steps equals a scan, stretches equal the whole, streams do not mix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lalia.systems.emotion import state as states
from lalia.systems.emotion.config import ModelConfig, SpeechConfig, SpeechKind, StateConfig, StateKind, StateScope
from lalia.systems.emotion.model import DialogueState, EmotionModel
from lalia.systems.emotion.state import EmaUpdater, Streams, make_updater

KINDS = [StateKind.ema, StateKind.mamba]
SCOPES = list(StateScope)
WIDTH, B, T, P = 6, 3, 7, 2


def model_of(kind: StateKind, scope: StateScope = StateScope.both, autoregressive: bool = False) -> EmotionModel:
    torch.manual_seed(0)
    config = ModelConfig(
        width=WIDTH, dropout=0.0, speech=SpeechConfig(kind=SpeechKind.none), state=StateConfig(kind=kind, scope=scope),
        autoregressive=autoregressive,
    )  # fmt: skip
    model = EmotionModel(config, 2, {"prosody": {"mean": [0.0] * 88, "std": [1.0] * 88}})
    for parameter in model.parameters():  # fresh heads and starts are zero in places: nothing may hide behind that
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def dialogue_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [B, T, W], party [B, T], valid [B, T] with dialogues of 7, 4 and 1 turns."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, WIDTH, generator=random)
    party = torch.randint(0, P, (B, T), generator=random)
    valid = torch.arange(T)[None] < torch.tensor([7, 4, 1])[:, None]
    return hidden, party, valid


def by_steps(
    model: EmotionModel, state: DialogueState, hidden: Tensor, party: Tensor, valid: Tensor
) -> tuple[DialogueState, Tensor]:
    answers = []
    for turn in range(hidden.shape[1]):
        state, answer = model.step(state, hidden[:, turn], party[:, turn], valid[:, turn])
        answers.append(answer)
    return state, torch.stack(answers, 1)


def assert_same_state(first: DialogueState, second: DialogueState) -> None:
    assert torch.equal(first.heard, second.heard) and torch.allclose(first.answers, second.answers, atol=1e-6)
    for scope, memory in first.memory.items():
        for name, value in memory.items():
            assert torch.allclose(value, second.memory[scope][name], atol=1e-6), (scope, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_loop_of_steps_equals_the_scan(kind: StateKind, scope: StateScope) -> None:
    model = model_of(kind, scope)
    hidden, party, valid = dialogue_batch()
    with torch.no_grad():
        whole, answers = model.run(model.init(B, P), hidden, party, valid)
        stepped, one_by_one = by_steps(model, model.init(B, P), hidden, party, valid)
    assert torch.allclose(answers[valid], one_by_one[valid], atol=1e-5)
    assert_same_state(whole, stepped)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autoregressive", [False, True])
@pytest.mark.parametrize("stretch", [1, 2, 3, 7])
def test_stretches_with_the_state_carried_equal_the_whole(kind: StateKind, autoregressive: bool, stretch: int) -> None:
    model = model_of(kind, autoregressive=autoregressive)
    hidden, party, valid = dialogue_batch()
    with torch.no_grad():
        whole, expected = model.run(model.init(B, P), hidden, party, valid)
        state, parts = model.init(B, P), []
        for begin in range(0, T, stretch):
            cut = slice(begin, begin + stretch)
            state, answers = model.run(state.detach(), hidden[:, cut], party[:, cut], valid[:, cut])
            parts.append(answers)
    assert torch.allclose(torch.cat(parts, 1)[valid], expected[valid], atol=1e-5)
    assert_same_state(state, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_flow_through_the_state_unless_it_is_detached(kind: StateKind) -> None:
    model = model_of(kind)
    hidden, party, valid = dialogue_batch()
    hidden.requires_grad_(True)
    for cut, reaches in ((False, True), (True, False)):
        state, _ = model.run(model.init(B, P), hidden[:, :3], party[:, :3], valid[:, :3])
        _, later = model.run(state.detach() if cut else state, hidden[:, 3:], party[:, 3:], valid[:, 3:])
        (gradient,) = torch.autograd.grad(later[valid[:, 3:]].sum(), hidden)
        assert bool((gradient[0, :3] != 0).any()) is reaches


@pytest.mark.parametrize("kind", KINDS)
def test_a_dialogue_is_answered_alike_alone_and_in_any_batch(kind: StateKind) -> None:
    model = model_of(kind, autoregressive=True)
    hidden, party, valid = dialogue_batch()
    with torch.no_grad():
        _, together = model.run(model.init(B, P), hidden, party, valid)
        for number, turns in enumerate((7, 4, 1)):
            pick = (slice(number, number + 1), slice(0, turns))
            _, alone = model.run(model.init(1, P + 1), hidden[pick], party[pick], valid[pick])
            assert torch.allclose(alone, together[pick], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_past_matters_and_the_future_does_not(kind: StateKind) -> None:
    model = model_of(kind)
    hidden, party, valid = dialogue_batch()
    changed = hidden.clone()
    changed[:, 3, :3] += 1
    with torch.no_grad():
        before = model.run(model.init(B, P), hidden, party, valid)[1]
        after = model.run(model.init(B, P), changed, party, valid)[1]
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[0, 3:] - after[0, 3:]).abs().min(1).values.gt(0).all()


def test_a_speakers_state_does_not_hear_the_other_speaker() -> None:
    model = model_of(StateKind.ema, StateScope.speaker)
    hidden, _, _ = dialogue_batch()
    party, valid = torch.tensor([[0, 1, 0, 1, 0, 1, 0]] * B), torch.ones(B, T, dtype=torch.bool)
    changed = hidden.clone()
    changed[:, 1, :3] += 1
    with torch.no_grad():
        before, after = (model.run(model.init(B, 2), h, party, valid)[1] for h in (hidden, changed))
    assert torch.equal(before[:, ::2], after[:, ::2])
    assert not torch.equal(before[:, 3], after[:, 3])


def test_ema_is_its_formula() -> None:
    torch.manual_seed(1)
    updater = EmaUpdater(WIDTH, 0.3, 0.95)
    alpha = torch.sigmoid(updater.decay)
    assert alpha[0].item() == pytest.approx(0.3, abs=1e-5) and alpha[-1].item() == pytest.approx(0.95, abs=1e-5)
    assert torch.equal(alpha, alpha.sort().values)
    turn = torch.randn(4, WIDTH)
    before = {"ema": torch.randn(4, WIDTH)}
    after, context = updater.step(before, turn)
    assert torch.allclose(context, alpha * before["ema"] + (1 - alpha) * updater.update(turn))
    assert torch.equal(after["ema"], context)
    assert updater.decay._no_weight_decay  # type: ignore[attr-defined]


def test_stateless_model_answers_each_turn_for_itself() -> None:
    model = model_of(StateKind.none)
    hidden, party, valid = dialogue_batch()
    with torch.no_grad():
        answers = model.run(model.init(B, P), hidden, party, valid)[1]
        backwards = model.run(model.init(B, P), hidden.flip(1), party, valid)[1]
    assert torch.allclose(answers, backwards.flip(1))


def test_streams_go_out_and_come_back() -> None:
    hidden, party, valid = dialogue_batch()
    streams = Streams(torch.arange(B)[:, None] * P + party, valid, B * P)
    sequences = streams.gather(hidden)
    assert int(streams.lengths.sum()) == int(valid.sum())
    assert torch.equal(streams.scatter(sequences)[valid], hidden[valid])
    assert not streams.scatter(sequences)[~valid].any()
    own = hidden[0][party[0] == 1]
    assert torch.equal(sequences[1, : len(own)], own)


def test_teacher_labels_replace_the_answer_that_is_remembered() -> None:
    model = model_of(StateKind.ema, autoregressive=True)
    hidden, party, valid = dialogue_batch()
    labels = torch.rand(B, T, 2)
    with torch.no_grad():
        state, told = model.run(model.init(B, P), hidden, party, valid, labels)
        _, own = model.run(model.init(B, P), hidden, party, valid)
        _, unlabelled = model.run(model.init(B, P), hidden, party, valid, torch.full_like(labels, torch.nan))
    assert torch.equal(told[:, 0], own[:, 0]) and not torch.allclose(told[0, 1:], own[0, 1:])
    assert torch.equal(own, unlabelled)
    assert torch.equal(state.answers[0, -1], labels[0, 6]) and torch.equal(state.answers[1, -1], labels[1, 3])
    own_last = max(t for t in range(T) if party[0, t] == 0)
    assert torch.equal(state.answers[0, 0], labels[0, own_last])


def test_a_new_speaker_joins_a_live_dialogue_with_a_fresh_state() -> None:
    model = model_of(StateKind.mamba, autoregressive=True)
    hidden, _, _ = dialogue_batch()
    party = torch.tensor([[0, 0, 1, 2, 0, 1, 2]])
    with torch.no_grad():
        _, expected = model.run(model.init(1, 3), hidden[:1], party, torch.ones(1, T, dtype=torch.bool))
        state, known = model.init(1, 0), 0
        for turn in range(T):
            while known <= int(party[0, turn]):
                state, known = model.welcome(state), known + 1
            state, answer = model.step(state, hidden[:1, turn], party[:, turn])
            assert torch.allclose(answer, expected[:, turn], atol=1e-5)
    assert state.parties == 3


def test_rows_of_a_state_are_replaced_without_touching_the_old_one() -> None:
    updater = make_updater(WIDTH, StateConfig(kind=StateKind.mamba))
    state = updater.init(5)
    index = torch.tensor([3, 1])
    rows, _ = updater.step(states.rows_of(state, index), torch.randn(2, WIDTH))
    after = states.with_rows(state, index, rows)
    assert not state["ssm0"].any() and after["ssm0"][index].any() and not after["ssm0"][[0, 2, 4]].any()


def test_frozen_dataclass_state_is_not_changed_by_a_step() -> None:
    model = model_of(StateKind.ema, autoregressive=True)
    hidden, party, _ = dialogue_batch()
    state = model.init(B, P)
    copy = replace(state, answers=state.answers.clone(), heard=state.heard.clone())
    model.step(state, hidden[:, 0], party[:, 0])
    assert torch.equal(state.answers, copy.answers) and torch.equal(state.heard, copy.heard)
