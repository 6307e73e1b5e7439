"""Relative attention against the formula written out position by position, and the encoder under padding."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lalia.nn.attention import RelativeAttention, RelativeEncoder
from lalia.nn.masks import channel_mask


def slow_attention(module: RelativeAttention, hidden: Tensor, length: int) -> Tensor:
    """Shaw et al. 2018, equations 3 and 4, with loops; hidden [D, T] → [D, length]."""
    query, key, value = module.query_key_value(hidden[None, :, :length])[0].chunk(3)
    heads = []
    for head in range(module.heads):
        part = slice(head * module.head_width, (head + 1) * module.head_width)
        outputs = []
        for i in range(length):
            scores, values = [], []
            for j in range(length):
                near = abs(j - i) <= module.window
                relative_key = module.relative_keys[j - i + module.window] if near else torch.zeros(())
                relative_value = module.relative_values[j - i + module.window] if near else torch.zeros(())
                scores.append((query[part, i] * (key[part, j] + relative_key)).sum() / math.sqrt(module.head_width))
                values.append(value[part, j] + relative_value)
            outputs.append((torch.stack(scores).softmax(0)[:, None] * torch.stack(values)).sum(0))
        heads.append(torch.stack(outputs, dim=1))
    return module.output(torch.cat(heads)[None])[0]


@pytest.mark.parametrize("length", [1, 3, 9])
def test_attention_equals_the_formula(length: int) -> None:
    torch.manual_seed(0)
    module = RelativeAttention(8, heads=2, window=2)
    hidden = torch.randn(1, 8, 9)
    found = module(hidden, channel_mask(torch.tensor([length]), 9))
    torch.testing.assert_close(found[0, :, :length], slow_attention(module, hidden[0], length), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("speaker_width", [0, 6])
def test_encoder_ignores_padding(speaker_width: int) -> None:
    torch.manual_seed(0)
    encoder = RelativeEncoder(8, 16, heads=2, layers=3, speaker_width=speaker_width).eval()
    speaker = torch.randn(2, 6, 1) if speaker_width else None
    hidden = torch.randn(2, 8, 7)
    padded = torch.full((2, 8, 15), 3.0)
    padded[..., :7] = hidden
    short = encoder(hidden, channel_mask(torch.tensor([7, 4]), 7), speaker)
    long = encoder(padded, channel_mask(torch.tensor([7, 4]), 15), speaker)
    torch.testing.assert_close(long[..., :7], short, rtol=1e-5, atol=1e-5)
    assert not long[0, :, 7:].any() and not long[1, :, 4:].any()
    single = encoder(hidden[1:, :, :4], torch.ones(1, 1, 4), None if speaker is None else speaker[1:])
    torch.testing.assert_close(short[1:, :, :4], single, rtol=1e-5, atol=1e-5)


def test_encoder_normalises_after_the_residual() -> None:
    encoder = RelativeEncoder(16, 16, heads=2, layers=2).eval()
    output = encoder(5 * torch.randn(1, 16, 6) + 3, torch.ones(1, 1, 6))
    torch.testing.assert_close(output.mean(1), torch.zeros(1, 6), atol=1e-5, rtol=0)


def test_speaker_enters_at_its_layer_only() -> None:
    torch.manual_seed(0)
    encoder = RelativeEncoder(8, 16, heads=2, layers=4, speaker_width=6, speaker_layer=2).eval()
    seen: list[Tensor] = []
    for attention in encoder.attentions:
        attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    hidden, mask = torch.randn(1, 8, 5), torch.ones(1, 1, 5)
    encoder(hidden, mask, torch.randn(1, 6, 1))
    encoder(hidden, mask, torch.randn(1, 6, 1))
    same = [torch.equal(seen[layer], seen[layer + 4]) for layer in range(4)]
    assert same == [True, True, False, False]


@pytest.mark.parametrize("layers", [1, 2])
def test_few_layers(layers: int) -> None:
    with pytest.raises(ValueError, match=f"speaker_layer 2 is not one of the {layers} layers"):
        RelativeEncoder(8, 16, 2, layers, speaker_width=6)
    RelativeEncoder(8, 16, 2, layers, speaker_width=6, speaker_layer=layers - 1)
    encoder = RelativeEncoder(8, 16, 2, layers)
    assert encoder(torch.randn(1, 8, 3), torch.ones(1, 1, 3)).shape == (1, 8, 3)


def test_an_item_without_valid_positions_gives_zeros() -> None:
    encoder = RelativeEncoder(8, 16, 2, 2)
    output = encoder(torch.randn(2, 8, 3), channel_mask(torch.tensor([3, 0]), 3))
    assert torch.isfinite(output).all() and not output[1].any()


def test_gradients_reach_every_parameter_in_float32_and_bfloat16() -> None:
    torch.manual_seed(0)
    encoder = RelativeEncoder(8, 16, 2, 3, dropout=0.1, speaker_width=6)
    hidden, mask, speaker = torch.randn(2, 8, 9), channel_mask(torch.tensor([9, 5]), 9), torch.randn(2, 6, 1)
    for enabled in (False, True):
        encoder.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            output = encoder(hidden, mask, speaker)
        output.float().square().mul(torch.randn(output.shape)).sum().backward()
        for name, parameter in encoder.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="3 heads"):
        RelativeAttention(8, 3)
