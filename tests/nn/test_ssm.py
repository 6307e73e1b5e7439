"""The selective scan: every way to compute it against the definition, values and gradients (E-22); chunks; missing back ends."""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lalia.nn import ssm
from lalia.nn.ssm import ScanBackend, selective_scan

FAST = [ScanBackend.torch, ScanBackend.numba]
NAMES = ["inputs", "delta", "a", "b", "c", "skip", "gate", "delta_bias", "state"]
OPTIONAL = ["skip", "gate", "delta_bias", "state"]


def problem(batch: int = 2, channels: int = 5, length: int = 37, states: int = 3, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    sequence, entry = (batch, channels, length), (batch, states, length)
    shapes = [sequence, sequence, (channels, states), entry, entry, (channels,), sequence, (channels,), (batch, channels, states)]
    values = {name: torch.randn(shape, generator=random) for name, shape in zip(NAMES, shapes, strict=True)}
    values["a"] = -values["a"].exp()
    values["delta"] = values["delta"] - 1
    return values


def by_hand(values: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Section 3.2 of the paper, one number at a time, in float64."""
    v = {name: value.double().numpy() for name, value in values.items()}
    outputs, last = np.zeros(v["inputs"].shape), v["state"].copy()
    for row, channel, time in np.ndindex(*outputs.shape):
        step = np.log1p(np.exp(v["delta"][row, channel, time] + v["delta_bias"][channel]))
        total = v["skip"][channel] * v["inputs"][row, channel, time]
        for n in range(last.shape[2]):
            entering = step * v["b"][row, n, time] * v["inputs"][row, channel, time]
            last[row, channel, n] = np.exp(step * v["a"][channel, n]) * last[row, channel, n] + entering
            total += v["c"][row, n, time] * last[row, channel, n]
        gate = v["gate"][row, channel, time]
        outputs[row, channel, time] = total * gate / (1 + np.exp(-gate))
    return outputs, last


def run(values: dict[str, Tensor], backend: ScanBackend, softplus: bool = True, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Outputs, last state, and the gradient of every argument for random slopes of both."""
    leaves = {name: value.to(dtype).requires_grad_() for name, value in values.items()}
    outputs, last = selective_scan(**leaves, softplus=softplus, backend=backend)  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(1)
    slopes = [torch.randn(value.shape, generator=random).to(value.dtype) for value in (outputs, last)]
    loss = (outputs * slopes[0]).sum() + (last * slopes[1]).sum()
    return [outputs.detach(), last.detach(), *torch.autograd.grad(loss, list(leaves.values()))]


def agree(found: list[Tensor], wanted: list[Tensor], names: list[str], tolerance: float = 1e-5) -> None:
    for name, ours, theirs in zip(["outputs", "last", *names], found, wanted, strict=True):
        error = float(((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-3)).detach())
        assert error <= tolerance, f"{name} is off by {error:.1e} of the largest value"


# --- values and gradients -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", list(ScanBackend)[:-1])
def test_every_backend_computes_the_formula(backend: ScanBackend) -> None:
    values = problem(length=11)
    outputs, last = selective_scan(**values, softplus=True, backend=backend)  # type: ignore[arg-type]
    wanted = by_hand(values)
    np.testing.assert_allclose(outputs.numpy(), wanted[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(last.numpy(), wanted[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", [(2, 5, 37, 3), (1, 70, 16, 16), (3, 257, 9, 2), (1, 1, 300, 1)])
def test_values_and_all_gradients_equal_the_reference(backend: ScanBackend, shape: tuple[int, int, int, int]) -> None:
    values = problem(*shape)
    wanted = run(values, ScanBackend.reference, dtype=torch.float64)
    agree(run(values, backend), [value.float() for value in wanted], NAMES)
    agree(run(values, ScanBackend.reference), [value.float() for value in wanted], NAMES)


@pytest.mark.parametrize("backend", [ScanBackend.reference, ScanBackend.torch])
def test_autograd_of_the_torch_paths_is_right(backend: ScanBackend) -> None:
    values = [value.double().requires_grad_() for value in problem(1, 2, 5, 2).values()]

    def scan(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**dict(zip(NAMES, arguments, strict=True)), softplus=True, backend=backend)  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(scan, values)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 40), st.integers(1, 5)),
    missing=st.sets(st.sampled_from(OPTIONAL)),
    softplus=st.booleans(),
    backend=st.sampled_from(FAST),
    innermost=st.booleans(),
)
def test_any_shape_any_layout_and_any_option(
    shape: tuple[int, int, int, int], missing: set[str], softplus: bool, backend: ScanBackend, innermost: bool
) -> None:
    values = {name: value for name, value in problem(*shape, seed=sum(shape)).items() if name not in missing}
    if not softplus:
        values["delta"] = values["delta"].exp().clamp_max(1)
        values.pop("delta_bias", None)
    names = list(values)
    wanted = run(values, ScanBackend.reference, softplus)
    if innermost:
        values = {n: v.transpose(1, 2).contiguous().transpose(1, 2) if v.dim() == 3 else v for n, v in values.items()}
    agree(run(values, backend, softplus), wanted, names)


@pytest.mark.parametrize("backend", list(ScanBackend)[:-1])
@pytest.mark.parametrize("cuts", [[1, 36], [8, 16, 13], [20, 17]])
def test_pieces_equal_the_whole_in_values_and_gradients(backend: ScanBackend, cuts: list[int]) -> None:
    values = problem()

    def pieces(**arguments: Any) -> tuple[Tensor, Tensor]:
        state, outputs = arguments["state"], []
        along = {name: arguments[name].split(cuts, -1) for name in ("inputs", "delta", "b", "c", "gate")}
        for index in range(len(cuts)):
            now = {name: parts[index] for name, parts in along.items()}
            piece, state = selective_scan(**{**arguments, **now, "state": state})
            outputs.append(piece)
        return torch.cat(outputs, -1), state

    results = []
    for scan in (selective_scan, pieces):
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        outputs, last = scan(**leaves, softplus=True, backend=backend)  # type: ignore[operator]
        loss = (outputs.square()).sum() + last.square().sum()
        results.append([outputs.detach(), last.detach(), *torch.autograd.grad(loss, list(leaves.values()))])
    agree(results[1], results[0], NAMES)


def test_threads_change_nothing() -> None:
    values = problem(2, 300, 20, 4)
    wanted = run(values, ScanBackend.numba)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        agree(run(values, ScanBackend.numba), wanted, NAMES)
        torch.set_num_threads(64)
        agree(run(values, ScanBackend.numba), wanted, NAMES)
    finally:
        torch.set_num_threads(threads)


def in_a_child(values: dict[str, Tensor], queue: Any) -> None:
    torch.set_num_threads(1)  # as in the worker of a loader
    queue.put([value.numpy() for value in run(values, ScanBackend.numba)])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_a_forked_process_can_scan() -> None:
    values = problem(2, 300, 20, 4)
    wanted = run(values, ScanBackend.numba)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_a_child, args=(values, queue), daemon=True)
    child.start()
    found = queue.get(timeout=60)
    child.join()
    agree([torch.from_numpy(value) for value in found], wanted, NAMES)


# --- numbers at the edges -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(backend: ScanBackend, dtype: torch.dtype) -> None:
    halves = {name: value.to(dtype) for name, value in problem().items()}
    outputs, last = selective_scan(**halves, softplus=True, backend=backend)  # type: ignore[arg-type]
    widened = {name: value.float() for name, value in halves.items()}
    wanted, state = selective_scan(**widened, softplus=True, backend=ScanBackend.reference)  # type: ignore[arg-type]
    assert outputs.dtype is dtype and last.dtype is torch.float32
    torch.testing.assert_close(last, state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs, wanted.to(dtype), rtol=2e-2, atol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        _, under_autocast = selective_scan(**widened, softplus=True, backend=backend)  # type: ignore[arg-type]
    torch.testing.assert_close(under_autocast, state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_large_arguments_neither_overflow_nor_hide_a_nan(backend: ScanBackend) -> None:
    values = problem(1, 3, 6, 2)
    values["delta"][0, 0] = torch.tensor([-200.0, -30.0, -5.0, 5.0, 30.0, 200.0])
    values["gate"][0, 1] = torch.tensor([-200.0, -30.0, -5.0, 5.0, 30.0, 200.0])
    agree(run(values, backend), run(values, ScanBackend.reference), NAMES)
    for name in ("inputs", "delta", "b", "c", "gate"):
        spoilt = {key: value.clone() for key, value in values.items()}
        spoilt[name][0, 1, 2] = float("nan")
        outputs, _ = selective_scan(**spoilt, softplus=True, backend=backend)  # type: ignore[arg-type]
        assert outputs[0, 1, 2].isnan() and not outputs[:, :, :2].isnan().any(), name


@pytest.mark.parametrize("backend", FAST)
def test_a_step_of_size_zero_leaves_the_state_as_it_is(backend: ScanBackend) -> None:
    values = problem()
    values["delta"][:, :, 20:] = -1e4
    _, last = selective_scan(**values, softplus=True, backend=backend)  # type: ignore[arg-type]
    shorter = {name: value[..., :20] if name in ("inputs", "delta", "b", "c", "gate") else value for name, value in values.items()}
    _, wanted = selective_scan(**shorter, softplus=True, backend=backend)  # type: ignore[arg-type]
    torch.testing.assert_close(last, wanted, rtol=1e-6, atol=1e-7)


# --- which backend ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "shape"), [("b", (2, 3, 36)), ("a", (4, 3)), ("state", (1, 5, 3)), ("skip", (3,))])
def test_a_shape_that_does_not_fit_is_named(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"^{'b' if name == 'a' and shape[1] != 3 else name} must be"):
        selective_scan(**{**problem(), name: torch.zeros(shape)})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="none of them 0"):
        selective_scan(**problem(length=0))  # type: ignore[arg-type]


def test_without_numba_auto_takes_torch_and_numba_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = selective_scan(**problem(), softplus=True)[0]  # type: ignore[arg-type]
    for module in ("lalia.nn.scan_autograd", "lalia.nn.scan_numba"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    found = selective_scan(**problem(), softplus=True)[0]  # type: ignore[arg-type]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ImportError, match="pip install numba"):
        selective_scan(**problem(), backend=ScanBackend.numba)  # type: ignore[arg-type]


def test_numba_in_float64_is_refused_and_auto_computes_it() -> None:
    values = {name: value.double() for name, value in problem().items()}
    with pytest.raises(ValueError, match="float32 on the CPU, not torch.float64"):
        selective_scan(**values, backend=ScanBackend.numba)  # type: ignore[arg-type]
    outputs, last = selective_scan(**values)  # type: ignore[arg-type]
    assert outputs.dtype is last.dtype is torch.float64


def test_mamba_ssm_that_is_not_there_is_an_error() -> None:
    if importlib.util.find_spec("mamba_ssm") is not None:
        pytest.skip("mamba-ssm is installed here")
    with pytest.raises(ImportError, match="pip install mamba-ssm .*or choose backend torch"):
        selective_scan(**problem(), backend=ScanBackend.mamba_ssm)  # type: ignore[arg-type]


def kernel(factor: float = 1.0) -> Callable[..., Any]:
    """Signature and abilities of ``selective_scan_fn``: no first state, a last state without gradient. Wrong if factor is not 1."""

    def selective_scan_fn(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
        delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert return_last_state
        arguments = (u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        outputs, last = selective_scan(*arguments, backend=ScanBackend.reference)
        return outputs * factor, last.detach()

    return selective_scan_fn


def test_mamba_ssm_gets_its_first_state_and_refuses_a_gradient_through_it() -> None:
    values = problem()
    for given_state in (values["state"], None):
        values["state"] = given_state  # type: ignore[assignment]
        leaves = {n: v.clone().requires_grad_() for n, v in values.items() if v is not None and n != "state"}
        now = ssm.Problem(**leaves, state=given_state, softplus=True)
        outputs, last = ssm._mamba_ssm(kernel(), now)
        wanted, state = ssm._reference(now)
        slopes = [torch.autograd.grad(value.square().sum(), list(leaves.values())) for value in (outputs, wanted)]
        agree([outputs, last, *slopes[0]], [wanted, state, *slopes[1]], list(leaves))
        with pytest.raises(RuntimeError, match="no gradient through the state: detach"):
            (outputs.sum() + last.sum()).backward()
        with pytest.raises(ValueError, match="no gradient through the state: detach"):
            ssm._mamba_ssm(kernel(), now._replace(state=last))
        ssm._mamba_ssm(kernel(), now._replace(state=last.detach()))


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_mamba_ssm_that_computes_wrongly_is_found_out(factor: float) -> None:
    with pytest.raises(RuntimeError, match="off by .* update mamba-ssm, or choose backend torch"):
        ssm._mamba_ssm(kernel(factor), ssm.Problem(**problem()))


def test_mamba_ssm_on_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    fake.selective_scan_fn = kernel()
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    with pytest.raises(ValueError, match="float32 on CUDA, not torch.float32 on cpu"):
        selective_scan(**problem(), backend=ScanBackend.mamba_ssm)  # type: ignore[arg-type]
