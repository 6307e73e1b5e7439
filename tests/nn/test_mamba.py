"""The Mamba block: parity with transformers, pieces and steps against the whole, padding, and how it starts (E-22)."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lalia.nn.mamba import MambaBlock, MambaState
from lalia.nn.ssm import ScanBackend

BACKENDS = [ScanBackend.reference, ScanBackend.torch, ScanBackend.numba]


def block(width: int = 10, backend: ScanBackend = ScanBackend.auto, **sizes: int) -> MambaBlock:
    torch.manual_seed(0)
    return MambaBlock(width, backend=backend, **sizes)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def same_state(found: MambaState, wanted: MambaState) -> None:
    close(found.conv, wanted.conv)
    close(found.ssm, wanted.ssm)


# --- against somebody else's ----------------------------------------------------------------------------------------------------
def test_block_equals_the_one_of_transformers_with_the_same_weights() -> None:
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(
        hidden_size=24, state_size=8, conv_kernel=4, expand=2, time_step_rank=2, num_hidden_layers=1, use_mambapy=False
    )
    torch.manual_seed(3)
    theirs = MambaMixer(config, layer_idx=0).train(False)
    ours = block(24, state=8)
    assert ours.load_state_dict(theirs.state_dict()).missing_keys == []
    hidden = torch.randn(2, 19, 24)
    leaves = [hidden.clone().requires_grad_() for _ in range(2)]
    found, wanted = ours(leaves[0])[0], theirs(leaves[1])
    close(found, wanted)
    close(*(torch.autograd.grad(out.square().sum(), leaf)[0] for out, leaf in zip((found, wanted), leaves, strict=True)))


def test_names_and_shapes_are_those_of_mamba_ssm() -> None:
    shapes = {name: list(value.shape) for name, value in block(32).state_dict().items()}
    assert shapes == {
        "A_log": [64, 16],
        "D": [64],
        "in_proj.weight": [128, 32],
        "conv1d.weight": [64, 1, 4],
        "conv1d.bias": [64],
        "x_proj.weight": [2 + 32, 64],
        "dt_proj.weight": [64, 2],
        "dt_proj.bias": [64],
        "out_proj.weight": [32, 64],
    }


# --- pieces, steps, padding -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", [[1, 2, 14], [9, 8]])
def test_pieces_equal_the_whole_in_values_and_gradients(backend: ScanBackend, cuts: list[int]) -> None:
    hidden = torch.randn(2, 17, 10)
    results = []
    for parts in ([17], cuts):
        module, state, outputs = block(backend=backend), None, []
        leaf = hidden.clone().requires_grad_()
        for piece in leaf.split(parts, 1):
            out, state = module(piece, state)
            outputs.append(out)
        assert state is not None
        (torch.cat(outputs, 1).square().sum() + state.ssm.square().sum() + state.conv.sum()).backward()
        slopes = {name: p.grad for name, p in module.named_parameters()}
        results.append((torch.cat(outputs, 1), state, leaf.grad, slopes))
    (whole, last, slope, slopes), (found, found_last, found_slope, found_slopes) = results
    close(found, whole)
    same_state(found_last, last)
    close(found_slope, slope)  # type: ignore[arg-type]
    assert all(p is not None for p in slopes.values())
    for name, wanted in slopes.items():
        torch.testing.assert_close(found_slopes[name], wanted, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_steps_equal_forward(backend: ScanBackend, kernel: int) -> None:
    module = block(backend=backend, kernel=kernel)
    hidden = torch.randn(3, 12, 10)
    whole, last = module(hidden)
    state, outputs = module.init(3), []
    for now in hidden.unbind(1):
        out, state = module.step(now, state)
        outputs.append(out)
    close(torch.stack(outputs, 1), whole)
    same_state(state, last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_changes_neither_outputs_nor_states_nor_gradients(backend: ScanBackend) -> None:
    module = block(backend=backend)
    lengths = torch.tensor([9, 4, 1, 0])
    before = MambaState(torch.randn(4, 20, 3), torch.randn(4, 20, 16))
    hidden = torch.randn(4, 9, 10)
    padded = torch.full((4, 14, 10), 7.0)
    for row, length in enumerate(lengths.tolist()):
        padded[row, :length] = hidden[row, :length]
    padded.requires_grad_()
    out, after = module(padded, before, lengths)
    for row, length in enumerate(lengths.tolist()):
        index = torch.tensor([row])
        if not length:
            same_state(after.select(index), before.select(index))
            continue
        alone, last = module(hidden[index, :length], before.select(index))
        close(out[index, :length], alone)
        same_state(after.select(index), last)
    valid = torch.arange(14) < lengths[:, None]
    (slope,) = torch.autograd.grad((out * valid[..., None]).square().sum() + after.ssm.sum() + after.conv.sum(), padded)
    assert slope[valid].any() and not slope[~valid].any()


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(1, 9),
    length=st.integers(1, 12),
    batch=st.integers(1, 3),
    states=st.integers(1, 4),
    kernel=st.integers(1, 4),
    backend=st.sampled_from(BACKENDS[1:]),
)
def test_any_size(width: int, length: int, batch: int, states: int, kernel: int, backend: ScanBackend) -> None:
    module = block(width, backend, state=states, kernel=kernel)
    reference = copy.deepcopy(module)
    reference.backend = ScanBackend.reference
    hidden = torch.randn(batch, length, width)
    (found, state), (wanted, last) = module(hidden), reference(hidden)
    assert found.shape == hidden.shape
    close(found, wanted)
    same_state(state, last)


# --- state as data ----------------------------------------------------------------------------------------------------------------
def test_state_is_detached_and_selected() -> None:
    module = block()
    _, state = module(torch.randn(3, 5, 10))
    assert state.ssm.requires_grad and state.conv.requires_grad
    cut = state.detach()
    assert not cut.ssm.requires_grad and not cut.conv.requires_grad and torch.equal(cut.ssm, state.ssm)
    rows = state.select(torch.tensor([2, 0]))
    assert torch.equal(rows.ssm, state.ssm[[2, 0]]) and torch.equal(rows.conv, state.conv[[2, 0]])
    assert state.select(torch.tensor([False, True, False])).ssm.shape == (1, 20, 16)
    start = module.init(2, "cpu", torch.bfloat16)
    assert start.conv.shape == (2, 20, 3) and start.conv.dtype is torch.bfloat16 and start.ssm.dtype is torch.float32


def test_what_does_not_fit_is_named() -> None:
    module = block()
    with pytest.raises(ValueError, match=r"hidden must be \[B, L, 10\], got \[2, 5, 9\]"):
        module(torch.zeros(2, 5, 9))
    with pytest.raises(ValueError, match="a state of 3 rows for a batch of 2"):
        module(torch.zeros(2, 5, 10), module.init(3))
    for lengths in ([6, 1], [-1, 1], [1]):
        with pytest.raises(ValueError, match=r"lengths must be 2 numbers in 0\.\.5"):
            module(torch.zeros(2, 5, 10), None, torch.tensor(lengths))
    with pytest.raises(ValueError, match="at least 1: width 10, state 0"):
        MambaBlock(10, state=0)


# --- how it starts, and in which precision --------------------------------------------------------------------------------------
def test_the_start_is_that_of_the_paper() -> None:
    module = block(512)
    steps = torch.nn.functional.softplus(module.dt_proj.bias.detach())
    assert 1e-3 <= float(steps.min()) < 1.1e-3 and 0.09 < float(steps.max()) <= 0.1001
    spread = (steps.log() - math.log(1e-3)) / math.log(100)
    assert float(spread.mean()) == pytest.approx(0.5, abs=0.05) and float(spread.std()) == pytest.approx(12**-0.5, abs=0.03)
    limit = module.rank**-0.5
    assert module.rank == 32 and 0.99 * limit < float(module.dt_proj.weight.abs().max()) <= limit
    close(torch.exp(module.A_log.detach()), torch.arange(1.0, 17.0).expand(1024, 16))
    assert bool((module.D == 1).all()) and block(17).rank == 2 and block(16, rank=5).rank == 5
    for made in (module, copy.deepcopy(module), block(4).double()):
        marked = {name for name, p in made.named_parameters() if getattr(p, "_no_weight_decay", False)}
        assert marked == {"A_log", "D"}


def test_half_precision_leaves_the_recurrence_in_float32() -> None:
    module = block()
    hidden = torch.randn(2, 6, 10)
    wanted, _ = module(hidden)
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert {n for n, p in half.named_parameters() if p.dtype is torch.float32} == {"A_log", "D"}
    out, state = half(hidden.bfloat16())
    stepped, _ = half.step(hidden[:, 0].bfloat16(), half.init(2))
    assert out.dtype is stepped.dtype is torch.bfloat16 and state.ssm.dtype is torch.float32
    torch.testing.assert_close(out.float(), wanted, rtol=0.1, atol=0.03)
    torch.testing.assert_close(stepped, out[:, 0], rtol=0.1, atol=0.03)
    assert copy.deepcopy(module).double().A_log.dtype is torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        mixed, state = module(hidden)
        module.step(hidden[:, 0], state)
    torch.testing.assert_close(mixed.float(), wanted, rtol=0.1, atol=0.03)
