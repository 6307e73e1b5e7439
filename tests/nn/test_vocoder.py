from __future__ import annotations

import pytest
import torch
from torch.nn.utils import parametrize

from lalia.nn.vocoder import HifiGanDecoder, IstftDecoder, decode_stream, inverse_stft


def tiny_hifigan(**changes) -> HifiGanDecoder:
    return HifiGanDecoder(
        **{"width": 6, "channels": 16, "rates": [4, 2], "kernels": [8, 4], "speaker_width": 5} | changes
    )


def tiny_istft(**changes) -> IstftDecoder:
    return IstftDecoder(**{"width": 6, "hop": 16, "channels": 24, "layers": 3, "speaker_width": 5} | changes)


DECODERS = [
    tiny_hifigan,
    lambda: tiny_hifigan(rates=[8, 2], kernels=[16, 2]),
    lambda: tiny_hifigan(rates=[3, 4], kernels=[9, 4]),
    tiny_istft,
    lambda: tiny_istft(n_fft=32),
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("build", DECODERS)
@pytest.mark.parametrize("frames", [1, 7])
def test_shape_contract(build, frames):
    decoder = build()
    wave = decoder(torch.randn(2, 6, frames), torch.randn(2, 5, 1))
    assert wave.shape == (2, 1, frames * decoder.hop)
    with pytest.raises(ValueError, match="speaker"):
        decoder(torch.randn(2, 6, frames))


@pytest.mark.parametrize("build", DECODERS)
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_stream_equals_offline(build, chunk):
    decoder = build().eval()
    latent, speaker = 3 * torch.randn(2, 6, 71), torch.randn(2, 5, 1)
    with torch.no_grad():
        pieces = list(decode_stream(decoder, latent, speaker, chunk))
        offline = decoder(latent, speaker)
    assert len(pieces) == -(-71 // chunk)
    assert offline.std() > 1e-3
    torch.testing.assert_close(torch.cat(pieces, -1), offline, atol=1e-5, rtol=0)


@pytest.mark.parametrize("build", DECODERS)
def test_context_frames_is_the_whole_receptive_field(build):
    decoder = build()
    latent = torch.randn(1, 6, 2 * decoder.context_frames + 9, requires_grad=True)
    middle = latent.shape[-1] // 2
    wave = decoder(latent, torch.randn(1, 5, 1))[..., middle * decoder.hop : (middle + 1) * decoder.hop]
    wave.square().sum().backward()
    reached = latent.grad.abs().sum((0, 1)).nonzero().flatten()
    needed = max(middle - int(reached[0]), int(reached[-1]) - middle)
    assert decoder.context_frames - 1 <= needed <= decoder.context_frames


def test_full_size_hifigan_has_the_published_number_of_parameters():
    decoder = HifiGanDecoder(192, speaker_width=512)
    assert sum(p.numel() for p in decoder.parameters()) == 14_662_144
    assert decoder.hop == 512


def test_removing_weight_norm_keeps_the_output():
    decoder = tiny_hifigan().eval()
    latent, speaker = torch.randn(1, 6, 9), torch.randn(1, 5, 1)
    before = decoder(latent, speaker)
    decoder.remove_weight_norm()
    decoder.remove_weight_norm()
    assert not any(parametrize.is_parametrized(m) for m in decoder.modules())
    torch.testing.assert_close(decoder(latent, speaker), before)


@pytest.mark.parametrize("overlap", [2, 4, 8])
def test_inverse_stft_equals_torch(overlap):
    hop = 20
    n_fft = overlap * hop
    spectrum = torch.randn(2, 13, n_fft // 2 + 1, dtype=torch.complex64)
    window = torch.hann_window(n_fft)
    ours = inverse_stft(spectrum, window, hop)
    theirs = torch.istft(spectrum.transpose(1, 2), n_fft, hop, window=window)
    assert ours.shape == (2, 13 * hop)
    # torch trims n_fft / 2 from each end, we trim (n_fft - hop) / 2
    torch.testing.assert_close(ours[:, hop // 2 : hop // 2 + theirs.shape[1]], theirs, atol=1e-5, rtol=1e-4)


def test_inverse_stft_undoes_a_stft():
    hop, n_fft = 32, 128
    wave, window = torch.randn(2, 20 * hop), torch.hann_window(n_fft)
    padded = torch.nn.functional.pad(wave, ((n_fft - hop) // 2,) * 2)
    spectrum = torch.stft(padded, n_fft, hop, window=window, center=False, return_complex=True).transpose(1, 2)
    torch.testing.assert_close(inverse_stft(spectrum, window, hop), wave, atol=1e-4, rtol=1e-4)


def test_istft_gradients_are_right():
    window = torch.hann_window(8, dtype=torch.float64)
    spectrum = torch.randn(1, 3, 5, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: inverse_stft(s, window, 4), (spectrum,))


def test_istft_magnitudes_are_capped_and_gradients_finite():
    decoder = tiny_istft()
    with torch.no_grad():
        decoder.head.bias[: decoder.head.out_features // 2] = 1e4
    wave = decoder(torch.randn(1, 6, 5), torch.randn(1, 5, 1))
    wave.sum().backward()
    assert wave.isfinite().all() and wave.abs().max() < 1e4
    assert all(p.grad.isfinite().all() for p in decoder.parameters() if p.grad is not None)


def test_istft_stays_in_float32_under_autocast():
    decoder = tiny_istft().eval()
    latent, speaker = torch.randn(1, 6, 30), torch.randn(1, 5, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wave = decoder(latent, speaker)
    assert wave.dtype == torch.float32


@pytest.mark.parametrize(
    "build",
    [
        lambda: tiny_hifigan(kernels=[7, 4]),
        lambda: tiny_hifigan(kernels=[8]),
        lambda: tiny_hifigan(channels=6),
        lambda: tiny_hifigan(residual_kernels=[4]),
        lambda: tiny_istft(n_fft=40),
        lambda: tiny_istft(n_fft=16),
        lambda: list(decode_stream(tiny_istft(), torch.zeros(1, 6, 4), None, 0)),
    ],
)
def test_impossible_shapes_are_refused(build):
    with pytest.raises(ValueError):
        build()
