"""ECAPA-TDNN against frozen facts of SpeechBrain's layout, a plain oracle of its front end, and pad invariance.

SpeechBrain 1.1.2 itself, with the same random weights, gave the same log-mel to the bit and embeddings within 6e-7.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lalia.nn import ecapa
from lalia.nn.ecapa import Ecapa, Frames
from lalia.nn.pieces import cut, pack, padded_size, rejoin, take

# of embedding_model.ckpt as SpeechBrain's ECAPA_TDNN(80, channels=[1024] * 4 + [3072]) has them
PUBLISHED = {
    "blocks.0.conv.conv.weight": (1024, 80, 5),
    "blocks.0.conv.conv.bias": (1024,),
    "blocks.0.norm.norm.running_var": (1024,),
    "blocks.0.norm.norm.num_batches_tracked": (),
    "blocks.1.tdnn1.conv.conv.weight": (1024, 1024, 1),
    "blocks.1.tdnn1.norm.norm.weight": (1024,),
    "blocks.1.res2net_block.blocks.0.conv.conv.weight": (128, 128, 3),
    "blocks.2.res2net_block.blocks.6.norm.norm.bias": (128,),
    "blocks.3.tdnn2.conv.conv.bias": (1024,),
    "blocks.3.se_block.conv1.conv.weight": (128, 1024, 1),
    "blocks.3.se_block.conv2.conv.weight": (1024, 128, 1),
    "mfa.conv.conv.weight": (3072, 3072, 1),
    "mfa.norm.norm.running_mean": (3072,),
    "asp.tdnn.conv.conv.weight": (128, 9216, 1),
    "asp.tdnn.norm.norm.weight": (128,),
    "asp.conv.conv.weight": (3072, 128, 1),
    "asp_bn.norm.weight": (6144,),
    "fc.conv.weight": (192, 6144, 1),
    "fc.conv.bias": (192,),
}
PUBLISHED_TENSORS, PUBLISHED_PARAMETERS = 231, 20_767_552


def small(seed: int = 0) -> Ecapa:
    torch.manual_seed(seed)
    network = Ecapa([16, 16, 24, 16, 40], mels=80, attention=8, squeezed=8, scale=4, width=12)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return network


def recordings() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [0.1 * torch.randn(n) * torch.linspace(0.01, 1, n) for n in (16_000, 9_999, 5_003, 401, 37, 1)]


def test_names_and_shapes_are_those_published():
    with torch.device("meta"):
        state = Ecapa().state_dict()
    assert {name: tuple(state[name].shape) for name in PUBLISHED} == PUBLISHED
    assert len(state) == PUBLISHED_TENSORS
    assert sum(math.prod(v.shape) for n, v in state.items() if n.endswith(("weight", "bias"))) == PUBLISHED_PARAMETERS


def test_the_front_end_is_speechbrains_by_a_plain_oracle():
    """Frame by frame in float64: zero padding at the ends, Hamming, power, symmetric triangles, dB, 80 dB range, mean."""
    wave = recordings()[2].double().numpy()
    padded = np.pad(wave, 200)
    window = 0.54 - 0.46 * np.cos(2 * np.pi * np.arange(400) / 400)
    frames = np.stack([padded[t * 160 : t * 160 + 400] * window for t in range(len(wave) // 160 + 1)])
    power = np.abs(np.fft.rfft(frames)) ** 2
    edges = 700 * (10 ** (np.linspace(0, 2595 * math.log10(1 + 8000 / 700), 82) / 2595) - 1)
    bins = np.linspace(0, 8000, 201)[:, None]
    slope = (bins - edges[None, 1:-1]) / np.diff(edges)[None, :-1]
    decibel = 10 * np.log10(np.maximum(power @ np.clip(1 - np.abs(slope), 0, None), 1e-10))
    decibel = np.maximum(decibel, decibel.max() - 80)
    got, count = small().features(torch.tensor(wave, dtype=torch.float32)[None], torch.tensor([len(wave)]))
    assert count.item() == len(decibel)
    np.testing.assert_allclose(got[0].numpy(), decibel - decibel.mean(0), atol=2e-3)


def test_a_row_of_a_padded_batch_gets_the_vector_it_gets_alone():
    network, waves = small(), recordings()
    alone = torch.cat([network.embed(wave[None], torch.tensor([len(wave)])) for wave in waves])
    batch = nn.utils.rnn.pad_sequence(waves, batch_first=True)
    batch[1, len(waves[1]) :] = 9.0  # what lies beyond a row's length is not heard
    together = network.embed(batch, torch.tensor([len(wave) for wave in waves]))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert alone.isfinite().all() and alone.shape == (6, 12) and (alone[0] - alone[1]).abs().max() > 1e-3


def test_rows_are_mirrored_at_their_own_ends():
    hidden = torch.randn(2, 3, 9)
    frames = Frames(torch.tensor([9, 6]), 9)
    mirrored = frames.mirror(hidden, 4)
    assert torch.equal(mirrored[:1], F.pad(hidden[:1], (4, 4), mode="reflect"))
    assert torch.equal(mirrored[1:, :, :14], F.pad(hidden[1:, :, :6], (4, 4), mode="reflect"))


def test_attentive_pooling_equals_the_concatenated_form():
    pooling = small().asp
    hidden, frames = torch.randn(2, 40, 7), Frames(torch.tensor([7, 7]), 7)
    mean, deviation = hidden.mean(2, keepdim=True), hidden.std(2, keepdim=True, correction=0)
    joined = torch.cat([hidden, mean.expand_as(hidden), deviation.expand_as(hidden)], dim=1)
    weights = pooling.conv(torch.tanh(pooling.tdnn(joined, frames))).softmax(2)
    mean = (weights * hidden).sum(2)
    deviation = (weights * (hidden - mean.unsqueeze(2)).square()).sum(2).sqrt()
    torch.testing.assert_close(pooling(hidden, frames).squeeze(2), torch.cat([mean, deviation], 1), atol=1e-5, rtol=1e-4)


def test_it_never_trains_and_never_needs_gradients():
    network = small().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    vector = network.embed(torch.randn(2, 3_000), torch.tensor([3_000, 2_000]))
    assert not vector.requires_grad and not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_silence_is_finite_and_nothing_is_an_error():
    network = small()
    assert network.embed(torch.zeros(1, 4_000), torch.tensor([4_000])).isfinite().all()
    with pytest.raises(ValueError, match="recording 1 of 2 has no samples"):
        network.embed(torch.zeros(2, 10), torch.tensor([10, 0]))


def test_a_long_recording_is_the_mean_of_its_pieces(monkeypatch):
    monkeypatch.setattr(ecapa, "LONGEST", 4_000)
    monkeypatch.setattr(ecapa, "BUDGET", 6_000)
    network, wave = small(), recordings()[1]
    pieces = [wave[:3333], wave[3333:6666], wave[6666:]]
    parts = torch.cat([network.embed(piece[None], torch.tensor([len(piece)])) for piece in pieces])
    weights = torch.tensor([len(piece) / len(wave) for piece in pieces])
    whole = network.embed(wave[None], torch.tensor([len(wave)]))
    torch.testing.assert_close(whole[0], weights @ parts, atol=1e-5, rtol=0)


# --- pieces -----------------------------------------------------------------------------------------------------------
def test_pieces_cover_every_row_in_equal_parts_and_groups_keep_the_budget():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 500, 40).tolist()
    pieces = cut(lengths, 120)
    for row, length in enumerate(lengths):
        own = [piece for piece in pieces if piece.row == row]
        assert [p.start for p in own] == list(np.cumsum([0, *[p.samples for p in own[:-1]]]))
        assert sum(p.samples for p in own) == length and math.isclose(sum(p.share for p in own), 1)
        sizes = [p.samples for p in own]
        assert max(sizes) <= 120 and max(sizes) - min(sizes) <= 1
    groups = pack(pieces, 300)
    assert sorted(index for group in groups for index in group) == list(range(len(pieces)))
    assert all(padded_size(pieces, group) <= 300 for group in groups)
    assert pack(pieces)[1:] == [] and [len(g) for g in pack(cut([50, 40], 99), 10)] == [1, 1]


def test_rejoining_restores_the_order_and_weighs_by_duration():
    wave = torch.arange(20.0).repeat(3, 1)
    lengths = [20, 3, 9]
    pieces = cut(lengths, 8)
    groups = pack(pieces, 16)
    values = []
    for group in groups:
        batch, sizes = take(wave, [pieces[index] for index in group])
        values.append(torch.stack([row[:size].mean() for row, size in zip(batch, sizes, strict=True)]))
    expected = torch.tensor([wave[0, :n].mean() for n in lengths])
    torch.testing.assert_close(rejoin(values, groups, pieces, 3), expected)
