"""Convolutional blocks: masks, speakers, receptive fields, parametrisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lalia.nn.conv import ConvNeXtBlock, DDSConv, LayerNorm, WaveNet, depthwise_conv, fold_norms, same_padding
from lalia.nn.masks import channel_mask


def test_layer_norm_is_torchs_over_channels() -> None:
    norm = LayerNorm(6)
    hidden = torch.randn(2, 6, 5)
    nn.init.normal_(norm.weight)
    expected = nn.functional.layer_norm(hidden.transpose(1, 2), (6,), norm.weight, norm.bias).transpose(1, 2)
    torch.testing.assert_close(norm(hidden), expected)


@pytest.mark.parametrize("weight_norm", [True, False])
def test_wavenet_ignores_padding(weight_norm: bool) -> None:
    torch.manual_seed(0)
    net = WaveNet(8, 5, 2, 3, speaker_width=4, weight_norm=weight_norm)
    speaker = torch.randn(2, 4, 1)
    hidden = torch.full((2, 8, 40), 7.0)
    hidden[..., :20] = torch.randn(2, 8, 20)
    lengths = torch.tensor([20, 13])
    short = net(hidden[..., :20], channel_mask(lengths, 20), speaker)
    long = net(hidden, channel_mask(lengths, 40), speaker)
    torch.testing.assert_close(long[..., :20], short)
    assert not long[1, :, 13:].any()
    alone = net(hidden[1:, :, :13], torch.ones(1, 1, 13), speaker[1:])
    torch.testing.assert_close(short[1:, :, :13], alone, rtol=1e-4, atol=1e-5)


def test_wavenet_receptive_field() -> None:
    net = WaveNet(4, 3, 2, 3)
    hidden = torch.randn(1, 4, 41, requires_grad=True)
    net(hidden, torch.ones(1, 1, 41))[..., 20].sum().backward()
    touched = hidden.grad.abs().sum((0, 1)).nonzero().flatten()
    assert touched.min() == 20 - 7 and touched.max() == 20 + 7  # 1 + 2 + 4 on each side


def test_wavenet_speaker_matters_and_is_optional() -> None:
    net = WaveNet(4, 3, 1, 2, speaker_width=3)
    hidden, mask = torch.randn(1, 4, 6), torch.ones(1, 1, 6)
    assert not torch.equal(net(hidden, mask, torch.ones(1, 3, 1)), net(hidden, mask, -torch.ones(1, 3, 1)))
    assert net(hidden, mask).shape == (1, 4, 6)
    assert WaveNet(4, 3, 1, 2)(hidden, mask, None).shape == (1, 4, 6)


def test_weight_norm_is_a_choice() -> None:
    names = {name for name, _ in WaveNet(4, 3, 1, 2, 3, weight_norm=True).named_parameters()}
    assert "gates.0.parametrizations.weight.original0" in names
    plain = {name for name, _ in WaveNet(4, 3, 1, 2, 3, weight_norm=False).named_parameters()}
    assert "gates.0.weight" in plain and not any("parametrizations" in name for name in plain)


def test_convnext_starts_without_the_speaker_and_sees_its_context_only() -> None:
    torch.manual_seed(0)
    block = ConvNeXtBlock(6, 12, kernel=7, speaker_width=3)
    hidden, speaker = torch.randn(1, 6, 21, requires_grad=True), torch.randn(1, 3, 1)
    assert torch.equal(block(hidden, speaker), block(hidden))
    block(hidden)[..., 10].sum().backward()
    touched = hidden.grad.abs().sum((0, 1)).nonzero().flatten()
    assert touched.min() == 7 and touched.max() == 13
    nn.init.normal_(block.speaker.weight)
    assert not torch.equal(block(hidden, speaker), block(hidden, -speaker))


def test_convnext_layer_scale_zero_is_the_identity_and_masks_hold() -> None:
    hidden = torch.randn(2, 6, 9)
    assert torch.equal(ConvNeXtBlock(6, 12, layer_scale=0.0)(hidden), hidden)
    block = ConvNeXtBlock(6, 12)
    masked = block(hidden, mask=channel_mask(torch.tensor([9, 4]), 9))
    torch.testing.assert_close(masked[1:, :, :4], block(hidden[1:, :, :4]), rtol=1e-4, atol=1e-5)
    assert not masked[1, :, 4:].any()


def test_dds_conv_ignores_padding_and_takes_a_condition() -> None:
    torch.manual_seed(0)
    net = DDSConv(6, 3, 3, dropout=0.5).eval()
    hidden, condition = torch.randn(2, 6, 30), torch.randn(2, 6, 30)
    mask = channel_mask(torch.tensor([30, 11]), 30)
    output = net(hidden, mask, condition)
    alone = net(hidden[1:, :, :11], mask[1:, :, :11], condition[1:, :, :11])
    torch.testing.assert_close(output[1:, :, :11], alone, rtol=1e-4, atol=1e-5)
    assert not output[1, :, 11:].any()
    assert not torch.allclose(output, net(hidden, mask))


def test_even_kernel_is_an_error() -> None:
    assert same_padding(5, 3) == 6
    with pytest.raises(ValueError, match="odd"):
        WaveNet(4, 4, 1, 1)


@pytest.mark.parametrize("kernel, dilation", [(3, 1), (3, 9), (5, 2)])
def test_depthwise_sum_is_the_convolution(kernel: int, dilation: int) -> None:
    torch.manual_seed(0)
    layer = nn.Conv1d(6, 6, kernel, groups=6, dilation=dilation, padding=same_padding(kernel, dilation))
    hidden = torch.randn(2, 6, 11, requires_grad=True)
    torch.testing.assert_close(depthwise_conv(layer, hidden), layer(hidden))
    inputs, direction = [hidden, *layer.parameters()], torch.randn(2, 6, 11)
    found = torch.autograd.grad(depthwise_conv(layer, hidden), inputs, direction)
    for ours, theirs in zip(found, torch.autograd.grad(layer(hidden), inputs, direction), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_folding_norms_keeps_the_output() -> None:
    torch.manual_seed(0)
    net, hidden, mask = WaveNet(8, 3, 1, 2).eval(), torch.randn(1, 8, 12), torch.ones(1, 1, 12)
    before, names = net(hidden, mask), set(net.state_dict())
    fold_norms(net)
    fold_norms(net)
    torch.testing.assert_close(net(hidden, mask), before)
    assert names != set(net.state_dict()) and "gates.0.weight" in net.state_dict()
