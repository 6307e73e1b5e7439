"""Our GPT: shape, initial loss, prefixes of audio and caches (O-04, O-05, O-06, O-22; traps 1–9, 15, 17 of the specification)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lalia.nn.gpt import Gpt, GptConfig, shift_right
from lalia.nn.kv_cache import visible
from lalia.nn.rope import Rotary, rotate

#: four layers, two heads; its short window of 256 is made 5 by the fixture ``short``
SMALL = GptConfig(depth=4, vocab=67, context=600, aspect=8, head_width=16)


def small(seed: int = 0, config: GptConfig = SMALL) -> Gpt:
    """Every parameter drawn, those that start at zero too, so that every path counts."""
    torch.manual_seed(seed)
    model = Gpt(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.2 if p.ndim > 1 else 0.5))
    return model.eval()


def some(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, SMALL.vocab, shape, generator=torch.Generator().manual_seed(seed))


def sound(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> int:
    """A short window of 5 positions."""
    monkeypatch.setattr(GptConfig, "short_window", property(lambda self: 5))
    return 5


# --- an obvious reference -------------------------------------------------------------------------------------------
def plain_norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def reference(model: Gpt, tokens: Tensor, prefix: Tensor) -> Tensor:
    """One row, tokens [L] after audio [P, W] → logits [L, V]; head by head, position by position, without torch's attention."""
    c, p, total = model.config, len(prefix), len(prefix) + len(tokens)
    x = plain_norm(torch.cat([prefix, model.tokens.weight[tokens]]))
    gate = model.smear_scale * torch.sigmoid(x[:, : model.smear_channels] @ model.smear_gate.weight.T)
    x = torch.cat([x[:1], x[1:] + gate[1:] * x[:-1]])
    first, half, states = x, c.head_width // 2, []
    angle = torch.arange(total)[:, None] / c.base ** (torch.arange(half) / half)
    turn = torch.polar(torch.ones_like(angle), -angle)
    for i, block in enumerate(model.blocks):
        x = model.residual_scale[i] * x + model.input_scale[i] * first
        a, n = block.attention, plain_norm(x)
        heads = []
        for h in range(c.heads):
            rows = slice(h * c.head_width, (h + 1) * c.head_width)
            q, k, v = (n @ m.weight[rows].T for m in (a.query, a.key, a.value))
            if a.value_gate is not None:
                table = torch.cat([torch.zeros(p, c.head_width), model.value_tables[str(i)].weight[tokens][:, rows]])
                v = v + 3 * torch.sigmoid(n[:, :12] @ a.value_gate.weight[h])[:, None] * table
            turned = (torch.view_as_real(torch.complex(y[:, :half], y[:, half:]) * turn).mT.flatten(1) for y in (q, k))
            q, k = (1.2 * plain_norm(y) for y in turned)
            scores = torch.full((total, total), -math.inf)
            for t in range(total):
                for s in range(t + 1):
                    if s < p or t - s <= (c.windows()[i] or total):
                        scores[t, s] = q[t] @ k[s] / math.sqrt(c.head_width)
            heads.append(scores.softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ a.out.weight.T
        x = x + (plain_norm(x) @ block.mlp.up.weight.T).clamp_min(0).square() @ block.mlp.down.weight.T
        states.append(x)
    out = plain_norm(x - model.backout_scale * states[c.depth // 2])[p:] @ model.head.weight.T
    return c.softcap * torch.tanh(out[:, : c.vocab] / c.softcap)


@pytest.mark.parametrize("audio", [0, 9])
def test_gpt_is_what_its_description_says(short: int, audio: int) -> None:
    model, tokens, prefix = small(), some(14), sound(audio, SMALL.width)
    with torch.no_grad():
        found = model(tokens[None], prefix=prefix[None])[0]
        assert torch.allclose(found, reference(model, tokens, prefix), atol=2e-4, rtol=1e-4)


# --- shape and start ------------------------------------------------------------------------------------------------
def test_depth_six_has_nanochats_size_and_windows() -> None:
    model = Gpt(GptConfig(depth=6, vocab=257))
    assert sum(p.numel() for p in model.parameters()) == 11_231_378  # the spec's 11.23 M
    assert (model.width, model.config.heads, model.config.padded_vocab, model.config.short_window) == (384, 3, 320, 512)
    assert model.config.windows() == [512, 512, 512, 0, 512, 0] and list(model.value_tables) == ["1", "3", "5"]
    tokens = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(0))
    logits = model(tokens, prefix=sound(2, 7, 384))
    assert logits.shape == (2, 40, 257) and logits.dtype == torch.float32  # the 63 padded tokens are cut
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert float(loss.detach()) == pytest.approx(math.log(257), abs=0.01)


def test_a_fresh_model_hears_nothing_and_a_trained_one_does() -> None:
    """Trap 1: the output matrices are zero, so no gradient whatever reaches the audio."""
    for model, hears in ((Gpt(SMALL), False), (small(), True)):
        prefix = sound(1, 4, SMALL.width).requires_grad_()
        F.cross_entropy(model(some(1, 6), prefix=prefix)[0, 1:-1], some(1, 6)[0, 2:]).backward()
        assert prefix.grad is not None and bool(prefix.grad.abs().sum(-1).gt(0).all()) == hears
        assert hears or not prefix.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"depth": 0}, "depth"), ({"window": "SXL"}, "window"), ({"kv_heads": 3}, "kv_heads"), ({"head_width": 15}, "even head")],
)
def test_impossible_shapes_are_named(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gpt(replace(SMALL, **change))


def test_matrices_and_others_split_the_parameters_and_carry_nanochats_rates() -> None:
    model = Gpt(SMALL)
    matrices, others = model.matrices(), model.others()
    assert {id(p) for p in matrices} | {id(p) for p in others} == {id(p) for p in model.parameters()}
    assert len(matrices) + len(others) == len(list(model.parameters())) and all(p.ndim == 2 for p in matrices)
    assert all(p._learning == {"muon": True} for p in matrices)
    rates = {n: 0.02 * p._learning["rate"] for n, p in model.named_parameters() if "rate" in p._learning}
    wide = (SMALL.width / 768) ** -0.5
    assert rates["tokens.weight"] == pytest.approx(0.2 * wide) and rates["head.weight"] == pytest.approx(0.004 * wide)
    assert rates["value_tables.1.weight"] == pytest.approx(0.1 * wide) and rates["input_scale"] == pytest.approx(0.5)
    assert len(rates) == len(others)


# --- text alone -----------------------------------------------------------------------------------------------------
def test_without_audio_the_model_is_bit_for_bit_the_text_model() -> None:
    model, tokens = small(), some(3, 20)
    with torch.no_grad():
        text = model(tokens)
        nothing = torch.zeros(3, 0, SMALL.width)
        assert torch.equal(text, model(tokens, prefix=nothing))
        assert torch.equal(text, model(tokens, prefix=nothing, prefix_lengths=torch.zeros(3, dtype=torch.long)))
        assert torch.equal(text, model(tokens, lengths=torch.full((3,), 20)))
        assert torch.equal(model.prefill(tokens)[0], model.prefill(tokens, prefix=nothing)[0])


def test_later_tokens_change_nothing_before_them() -> None:
    model, tokens = small(), some(1, 12)
    other = tokens.clone()
    other[0, 8:] = (other[0, 8:] + 1) % SMALL.vocab
    with torch.no_grad():
        a, b = model(tokens, prefix=sound(1, 3, SMALL.width)), model(other, prefix=sound(1, 3, SMALL.width))
    assert torch.equal(a[:, :8], b[:, :8]) and not torch.allclose(a[:, 8], b[:, 8])


# --- audio before the text ------------------------------------------------------------------------------------------
TEXT, AUDIO = [11, 4, 7, 1], [6, 0, 9, 3]


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens, lengths, prefix, prefix lengths of four unlike rows; what is beyond a row is noise."""
    return some(4, 11), torch.tensor(TEXT), 7 * sound(4, 9, SMALL.width), torch.tensor(AUDIO)


def test_rows_of_unlike_lengths_equal_the_same_rows_alone(short: int) -> None:
    model, (tokens, lengths, prefix, audio) = small(), batch()
    with torch.no_grad():
        together = model(tokens, lengths, prefix, audio)
        for row, (text, heard) in enumerate(zip(TEXT, AUDIO, strict=True)):
            alone = model(tokens[row : row + 1, :text], prefix=prefix[row : row + 1, :heard] if heard else None)
            assert (together[row, :text] - alone[0]).abs().max() <= 1e-5


def test_padding_carries_no_gradient() -> None:
    model, (tokens, lengths, prefix, audio) = small(), batch()
    prefix.requires_grad_()
    logits = model(tokens, lengths, prefix, audio)
    sum(logits[row, :text].square().sum() for row, text in enumerate(TEXT)).backward()
    assert prefix.grad is not None and torch.isfinite(prefix.grad).all()
    for row, heard in enumerate(AUDIO):
        assert not prefix.grad[row, heard:].any() and prefix.grad[row, :heard].abs().sum(-1).gt(0).all()


def test_loss_over_the_text_alone_by_hand(short: int) -> None:
    """O-04 and trap 8: BOS stands after the audio, predicts the first token, and is itself never a target."""
    model, tokens, prefix = small(), some(1, 5), sound(1, 4, SMALL.width)
    with torch.no_grad():
        loss = F.cross_entropy(model(tokens, prefix=prefix)[0, :-1], tokens[0, 1:])
        shares = reference(model, tokens[0], prefix[0]).softmax(-1)
        by_hand = -sum(float(shares[i, tokens[0, i + 1]].log()) for i in range(4)) / 4
    assert float(loss) == pytest.approx(by_hand, abs=1e-4)


def test_the_scale_of_the_audio_does_not_matter() -> None:
    """Traps 4 and 15: the projector's output passes the norm that token embeddings pass."""
    model, tokens, prefix = small(), some(1, 5), sound(1, 4, SMALL.width)
    with torch.no_grad():
        loud, soft = (model(tokens, prefix=scale * prefix) for scale in (1.0, 0.05))
        assert torch.allclose(loud, soft, atol=2e-3)
        assert torch.allclose(model.embed(tokens).square().mean(-1), torch.ones(1, 5), atol=1e-3)
        twin = model(tokens, prefix=model.tokens.weight[some(1, 4)])
        assert not torch.allclose(twin, loud, atol=0.1)


def test_every_layer_sees_all_audio_but_only_near_text(short: int) -> None:
    """Trap 5. One short-window layer before the last, which is made blind: what is left shows what the window lets through."""
    config = replace(SMALL, depth=2, aspect=16, window="S", smear=False, value_embeddings=False)
    model = small(config=config)
    torch.nn.init.zeros_(model.blocks[1].attention.out.weight)
    base, audio = some(1, 20), sound(1, 30, config.width)
    with torch.no_grad():
        first = model(base, prefix=audio)[0]
        for place, seen in ((0, True), (29, True)):
            changed = audio.clone()
            changed[0, place] *= -1
            assert bool((model(base, prefix=changed)[0, 19] - first[19]).abs().max() > 1e-5) == seen
        for place, seen in ((2, False), (13, False), (14, True)):
            other = base.clone()
            other[0, place] = (other[0, place] + 1) % config.vocab
            assert bool((model(other, prefix=audio)[0, 19] - first[19]).abs().max() > 1e-5) == seen


def test_smear_brings_the_last_audio_frame_into_the_first_token() -> None:
    """Trap 3: with attention blind, the first token's logits know the last frame through smear and nothing else does."""
    model, tokens, audio = small(), some(1, 4), sound(1, 3, SMALL.width)
    for block in model.blocks:
        torch.nn.init.zeros_(block.attention.out.weight)
    with torch.no_grad():
        plain = model(tokens, prefix=audio)[0]
        last, earlier = audio.clone(), audio.clone()
        last[0, 2], earlier[0, 1] = sound(SMALL.width, seed=5), sound(SMALL.width, seed=5)
        assert not torch.allclose(model(tokens, prefix=last)[0, 0], plain[0], atol=1e-3)
        assert torch.equal(model(tokens, prefix=last)[0, 1:], plain[1:])
        assert torch.equal(model(tokens, prefix=earlier)[0], plain)


# --- cache ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("heard", [0, 9])
def test_cached_equals_uncached(short: int, heard: int) -> None:
    model, tokens, prefix = small(), some(1, 160), sound(1, heard, SMALL.width) if heard else None
    with torch.no_grad():
        whole = model(tokens, prefix=prefix)
    logits, cache = model.prefill(tokens[:, :6], prefix=prefix)
    for place in range(6, 160):
        assert (logits - whole[:, place - 1]).abs().max() < 1e-4
        logits, cache = model.step(tokens[:, place], cache)
    assert (logits - whole[:, -1]).abs().max() < 1e-4
    assert cache.longest == cache.used == 160 + heard and cache.keys[0].shape[2] >= 160 + heard


@pytest.mark.parametrize("audio", [True, False])
def test_cached_rows_of_unlike_lengths_equal_uncached_ones_alone(short: int, audio: bool) -> None:
    model, (tokens, lengths, prefix, heard) = small(), batch()
    more = some(4, 9, seed=8)
    logits, cache = model.prefill(tokens, lengths, *((prefix, heard) if audio else ()))
    found = [logits]
    for place in range(9):
        logits, cache = model.step(more[:, place], cache)
        found.append(logits)
    for row, text in enumerate(TEXT):
        line = torch.cat([tokens[row, :text], more[row]])[None]
        own = prefix[row : row + 1, : AUDIO[row]] if audio else None
        with torch.no_grad():
            alone = model(line, prefix=own)[0, text - 1 :]
        assert (torch.stack([step[row] for step in found]) - alone).abs().max() < 1e-4
    assert cache.used == (max(t + a for t, a in zip(TEXT, AUDIO, strict=True)) if audio else 11) + 9


def test_grouped_heads_and_bare_models_agree_with_their_cache() -> None:
    config = replace(SMALL, kv_heads=1, smear=False, value_embeddings=False, softcap=0.0, flash=True)
    model, tokens = small(config=config), some(2, 8)
    assert model.blocks[0].attention.key.weight.shape == (16, 32) and model.smear_gate is None and not model.value_tables
    with torch.no_grad():
        whole = model(tokens)
    logits, cache = model.prefill(tokens[:, :5])
    for place in range(5, 8):
        logits, cache = model.step(tokens[:, place], cache)
    assert torch.allclose(logits, whole[:, -1], atol=1e-4)


def test_bfloat16_and_autocast_run_with_audio_and_cache() -> None:
    model, (tokens, lengths, prefix, heard) = small(), batch()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(tokens, lengths, prefix, heard).dtype == torch.float32
        assert torch.isfinite(model.step(tokens[:, 0], model.prefill(tokens, lengths, prefix, heard)[1])[0]).all()
    half = small().bfloat16()
    assert torch.isfinite(half.step(tokens[:, 0], half.prefill(tokens, lengths, prefix, heard)[1])[0]).all()


# --- limits ---------------------------------------------------------------------------------------------------------
def test_rows_beyond_the_context_are_an_error_that_says_what_to_do() -> None:
    model = small(config=replace(SMALL, context=20))
    with pytest.raises(ValueError, match="21 positions .* context of 20: shorten"):
        model(some(1, 11), prefix=sound(1, 10, SMALL.width))
    lengths, heard = torch.tensor([11, 2]), torch.tensor([2, 18])  # 11 + 18 positions of padding, but no row is too long
    assert torch.isfinite(model(some(2, 11), lengths, sound(2, 18, SMALL.width), heard)[1, :2]).all()
    _, cache = model.prefill(some(2, 11), lengths, sound(2, 18, SMALL.width), heard)
    with pytest.raises(ValueError, match="21 positions"):
        model.step(some(2), cache)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefix": sound(1, 3, 31)}, "31 wide, the language model 32"),
        ({"prefix_lengths": torch.tensor([3])}, "without a prefix"),
        ({"tokens": some(1, 0)}, "at least one token"),
    ],
)
def test_prompts_that_cannot_be(arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small()(**{"tokens": some(1, 3), **arguments})


# --- parts ----------------------------------------------------------------------------------------------------------
def test_rotary_grows_and_depends_on_differences_alone() -> None:
    rotary = Rotary(16)
    query, key = sound(1, 1, 1, 16), sound(1, 1, 1, 16, seed=3)
    table = rotary.upto(30_000)
    assert table.shape[1] >= 30_000 and rotary.upto(5) is table and not rotary.state_dict()
    near, far = ((rotate(query, table[:, p + 7 : p + 8]) * rotate(key, table[:, p : p + 1])).sum() for p in (0, 29_000))
    assert torch.allclose(near, far, atol=1e-5)
    assert torch.allclose(rotate(query, table[:, 9:10]).norm(), query.norm(), rtol=1e-6)


def test_shift_right_and_visible_by_hand() -> None:
    moved, start = shift_right(torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [9.0], [9.0]]]), torch.tensor([3, 1]))
    assert moved.squeeze(-1).tolist() == [[1, 2, 3], [0, 0, 4]] and start.tolist() == [0, 2]
    seen = visible(torch.arange(5)[None], 5, 1, 2, torch.tensor([0, 1]))[:, 0].int().tolist()
    assert seen[0] == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 1, 1]]
    assert seen[1] == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 1, 1]]
