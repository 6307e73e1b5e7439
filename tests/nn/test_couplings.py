"""The flow: invertible, volume-preserving, masked, with and without speaker and shared parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lalia.nn.couplings import Flip, Flow, TransformerCoupling, WaveNetCoupling
from lalia.nn.masks import channel_mask


def small_flow(kind: str = "wavenet", **options: object) -> Flow:
    torch.manual_seed(0)
    flow = Flow(6, 8, kernel=3, layers=2, kind=kind, filter_width=16, transformer_kernel=3, **options)
    return flow.eval()


def wake(flow: nn.Module) -> None:
    """Give the zero-initialised projections some weight, as training would."""
    for name, parameter in flow.named_parameters():
        if "leave" in name:
            nn.init.normal_(parameter, std=0.5)


@pytest.mark.parametrize("kind", ["wavenet", "transformer"])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("speaker_width", [0, 5])
def test_flow_is_invertible(kind: str, share: bool, speaker_width: int) -> None:
    flow = small_flow(kind, share_parameters=share, speaker_width=speaker_width)
    wake(flow)
    mask = channel_mask(torch.tensor([12, 7]), 12)
    latent = torch.randn(2, 6, 12) * mask
    speaker = torch.randn(2, 5, 1) if speaker_width else None
    moved = flow(latent, mask, speaker)
    assert (moved - latent).abs().max() > 0.1
    assert not moved[1, :, 7:].any()
    assert (flow(moved, mask, speaker, reverse=True) - latent).abs().max() < 1e-4
    assert (flow(flow(latent, mask, speaker, reverse=True), mask, speaker) - latent).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["wavenet", "transformer"])
def test_flow_ignores_padding_and_starts_as_flips(kind: str) -> None:
    flow = small_flow(kind, flows=3)
    latent = torch.randn(2, 6, 12)
    mask = channel_mask(torch.tensor([12, 7]), 12)
    assert torch.equal(flow(latent, mask), latent.flip(1) * mask)
    wake(flow)
    alone = flow(latent[1:, :, :7], mask[1:, :, :7])
    torch.testing.assert_close(flow(latent, mask)[1:, :, :7], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["wavenet", "transformer"])
def test_log_determinant_is_zero(kind: str) -> None:
    flow = small_flow(kind).double()
    wake(flow)
    mask = torch.ones(1, 1, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda z: flow(z, mask), torch.randn(1, 6, 4, dtype=torch.float64))
    assert torch.linalg.slogdet(jacobian.view(24, 24))[1].abs() < 1e-8


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_transformer_flow_of_few_layers_uses_the_speaker(layers: int) -> None:
    flow = small_flow("transformer", transformer_layers=layers, speaker_width=5)
    wake(flow)
    latent, mask, speaker = torch.randn(1, 6, 8), torch.ones(1, 1, 8), torch.randn(1, 5, 1)
    assert not torch.allclose(flow(latent, mask, speaker), flow(latent, mask, -speaker))


def test_shared_parameters_exist_once() -> None:
    own, shared = small_flow(), small_flow(share_parameters=True)
    assert sum(p.numel() for p in shared.parameters()) < sum(p.numel() for p in own.parameters()) / 2
    pointers = [tensor.data_ptr() for tensor in shared.state_dict().values()]
    assert len(pointers) == len(set(pointers))
    again = small_flow(share_parameters=True)
    wake(shared)
    again.load_state_dict(shared.state_dict())
    latent, mask = torch.randn(1, 6, 5), torch.ones(1, 1, 5)
    assert torch.equal(again(latent, mask), shared(latent, mask))


@pytest.mark.parametrize("kind", ["wavenet", "transformer"])
@pytest.mark.parametrize("share", [False, True])
def test_gradients_reach_every_parameter(kind: str, share: bool) -> None:
    flow = small_flow(kind, share_parameters=share, speaker_width=5)
    wake(flow)
    flow.train()
    flow(torch.randn(2, 6, 8), torch.ones(2, 1, 8), torch.randn(2, 5, 1)).square().sum().backward()
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_single_couplings_and_flip() -> None:
    latent, mask = torch.randn(1, 4, 6), torch.ones(1, 1, 6)
    assert torch.equal(Flip()(Flip()(latent)), latent)
    for coupling in (WaveNetCoupling(4, 8, 3, 2), TransformerCoupling(4, 8, 3, 2, filter_width=8)):
        wake(coupling)
        moved = coupling(latent, mask)
        assert torch.equal(moved[:, :2], latent[:, :2]) and not torch.equal(moved[:, 2:], latent[:, 2:])
        torch.testing.assert_close(coupling(moved, mask, reverse=True), latent, atol=1e-5, rtol=1e-5)


def test_wrong_shapes_are_errors() -> None:
    with pytest.raises(ValueError, match="unknown kind of flow 'wavnet'"):
        Flow(6, 8, kind="wavnet")
    with pytest.raises(ValueError, match="even, got 5"):
        Flow(5, 8)
