from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from lalia.nn.conv import WaveNet, fold_norms
from lalia.nn.packed import PackedConv, pack_layers

needs_onednn = pytest.mark.skipif(not pack_layers(nn.Sequential(nn.Conv1d(1, 1, 1))), reason="no oneDNN operators here")


@needs_onednn
@pytest.mark.parametrize("kernel, dilation, bias", [(1, 1, True), (3, 1, False), (5, 3, True)])
def test_values_are_those_of_the_convolution(kernel: int, dilation: int, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Conv1d(6, 20, kernel, dilation=dilation, padding=dilation * (kernel // 2), bias=bias)
    packed = PackedConv(plain)
    with torch.inference_mode():
        for batch, length in ((1, 1), (1, 300), (3, 17), (0, 20)):
            hidden = torch.randn(batch, 6, length)
            torch.testing.assert_close(packed(hidden), plain(hidden), atol=1e-5, rtol=1e-5)
            view = torch.randn(batch, length, 6).transpose(1, 2)
            torch.testing.assert_close(packed(view), plain(view), atol=1e-5, rtol=1e-5)


@needs_onednn
def test_the_packed_weights_are_what_computes() -> None:
    plain = nn.Conv1d(4, 4, 3, padding=1)
    packed, hidden = PackedConv(plain), torch.randn(1, 4, 20)
    with torch.no_grad():
        before = packed(hidden)
        plain.weight.zero_()
        torch.testing.assert_close(packed(hidden), before)
        assert not torch.equal(plain(hidden), before)


@needs_onednn
def test_other_calls_go_to_the_plain_layer() -> None:
    plain = nn.Conv1d(4, 4, 3, padding=1)
    packed, hidden = PackedConv(plain), torch.randn(1, 4, 9)
    assert packed(hidden).requires_grad
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert packed(hidden).dtype == torch.bfloat16


@needs_onednn
def test_only_plain_convolutions_are_packed() -> None:
    network = nn.ModuleDict(
        {
            "yes": nn.Conv1d(4, 4, 3),
            "strided": nn.Conv1d(4, 4, 3, stride=2),
            "depthwise": nn.Conv1d(4, 4, 3, groups=4),
            "normed": weight_norm(nn.Conv1d(4, 4, 3)),
            "other_precision": nn.Conv1d(4, 4, 3, dtype=torch.float64),
        }
    )
    assert pack_layers(network) == 1 and isinstance(network["yes"], PackedConv)
    assert pack_layers(network) == 0 and type(network["yes"].plain) is nn.Conv1d


@needs_onednn
def test_a_folded_wavenet_packs_whole() -> None:
    torch.manual_seed(0)
    net = WaveNet(8, 5, 1, 3, speaker_width=4).eval()
    hidden, mask, speaker = torch.randn(2, 8, 30), torch.ones(2, 1, 30), torch.randn(2, 4, 1)
    with torch.inference_mode():
        expected = net(hidden, mask, speaker)
    fold_norms(net)
    assert pack_layers(net) == 7
    with torch.inference_mode():
        torch.testing.assert_close(net(hidden, mask, speaker), expected, atol=1e-5, rtol=1e-4)
