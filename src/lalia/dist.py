"""torch.distributed under torchrun: start, ranks, averages over ranks, waiting. One process makes no group.

Collectives (averages, gathers) share one short timeout, so that a dead rank is noticed. Waiting for rank 0 while it
evaluates or saves goes through the rendezvous store instead, with a timeout of its own, and can never trip the first.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from lalia.sections import DistConfig

log = logging.getLogger(__name__)
MEET_SECONDS = 60.0  # least patience at the rendezvous: processes start up at different speeds


@dataclass(frozen=True)
class World:
    """Where this process stands among the ranks. ``backend`` is ``"none"`` for a single process."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str = "none"

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass
class _State:
    """What :func:`start` leaves for the other functions; ``calls`` counts how often each key was waited for."""

    world: World = field(default_factory=World)
    store: torch_dist.Store | None = None
    patience: float = DistConfig.eval_timeout_seconds
    calls: dict[str, int] = field(default_factory=dict)


_state = _State()


# --- start and stop -------------------------------------------------------------------------------------------------
def start(config: DistConfig, device: str = "auto") -> World:
    """Read rank and size (environment first, then ``config``), choose the device, and join the group if there is one.

    ``device``: ``auto`` (cuda, then mps, then cpu), ``cpu``, ``mps``, ``cuda`` (this rank's card) or ``cuda:N``.
    Raises ValueError for an inconsistent rank, a device that is not there, or a backend that does not fit it.
    """
    global _state
    if torch_dist.is_available() and torch_dist.is_initialized():
        raise RuntimeError("the process group is already started; call lalia.dist.stop() first")
    address, port, size, rank, local_rank = _placement(config)
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} is not in a world of {size} (RANK, WORLD_SIZE; dist.rank, dist.world_size)")
    chosen = choose_device(device, local_rank)
    if size == 1:
        _state = _State(World(rank, local_rank, size, chosen), None, config.eval_timeout_seconds)
        return _state.world
    backend = _backend(config.backend, chosen)
    store = _join(f"tcp://{address}:{port}", rank, size, backend, timedelta(seconds=config.timeout_seconds))
    _state = _State(World(rank, local_rank, size, chosen, backend), store, config.eval_timeout_seconds)
    return _state.world


def stop() -> None:
    """Leave the group, if there is one, and forget the world. At a normal end, :func:`barrier_wait` before it."""
    global _state
    if torch_dist.is_available() and torch_dist.is_initialized():
        torch_dist.destroy_process_group()
    _state = _State()


def world() -> World:
    """The current world; a single process on the CPU before :func:`start`."""
    return _state.world


def _placement(config: DistConfig) -> tuple[str, int, int, int, int]:
    """Address, port, size, rank, local rank: each from its environment variable, else from the config. Logged once."""
    wanted: dict[str, str | int] = {
        "MASTER_ADDR": config.master_addr,
        "MASTER_PORT": config.master_port,
        "WORLD_SIZE": config.world_size,
        "RANK": config.rank,
        "LOCAL_RANK": config.local_rank,
    }
    given = {name: os.environ[name] for name in wanted if os.environ.get(name)}
    values = {**wanted, **given}
    told = ", ".join(f"{n}={v} ({'environment' if n in given else 'config'})" for n, v in values.items())
    numbers = []
    for name in ("MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        if not str(values[name]).isdecimal():
            raise ValueError(f"the environment variable {name} must be a whole number, got {values[name]!r}")
        numbers.append(int(values[name]))
    port, size, rank, local_rank = numbers
    log.info("distributed: %s%s", told, "; one process, no process group" if size == 1 else "")
    return str(values["MASTER_ADDR"]), port, size, rank, local_rank


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """``auto`` (cuda, then mps, then cpu), ``cpu``, ``mps``, ``cuda`` or ``cuda:N`` as a device that is there; ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"train.device: {name!r} is not a device; use auto, cpu, mps, cuda or cuda:N") from error
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("train.device is mps, but this machine or this build of torch has no MPS; use auto or cpu")
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = local_rank if device.index is None else device.index
    if index >= count:
        raise ValueError(f"train.device asks for cuda:{index}; torch {torch.__version__} sees {count} CUDA device(s)")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _backend(name: str, device: torch.device) -> str:
    if name == "auto":
        usable = platform.system() == "Linux" and device.type == "cuda" and torch_dist.is_nccl_available()
        return "nccl" if usable else "gloo"
    if name == "nccl" and device.type != "cuda":
        raise ValueError(f"dist.backend nccl needs CUDA, but the device is {device}; use gloo or auto")
    return name


def _join(url: str, rank: int, size: int, backend: str, timeout: timedelta) -> torch_dist.Store:
    """Rendezvous by hand, so that the store is ours to wait on, then the process group over the same store."""
    if not torch_dist.is_available():
        raise ValueError("this build of torch has no torch.distributed; run a single process (WORLD_SIZE=1)")
    if platform.system() == "Windows":
        os.environ["USE_LIBUV"] = "0"  # Windows wheels are built without libuv; the TCP store fails if it is asked for
    patience = max(timeout, timedelta(seconds=MEET_SECONDS))
    store, rank, size = next(torch_dist.rendezvous(url, rank, size, timeout=patience))
    group_store = torch_dist.PrefixStore("group", store)
    torch_dist.init_process_group(backend, store=group_store, rank=rank, world_size=size, timeout=timeout)
    return torch_dist.PrefixStore("lalia", store)


# --- waiting --------------------------------------------------------------------------------------------------------
def wait_for_main(key: str, timeout: float | None = None) -> None:
    """Rank 0 announces that it has reached this call; the others wait for that up to ``timeout`` seconds.

    Every rank calls it the same number of times. ``timeout`` is ``dist.eval_timeout_seconds`` unless given, and has
    nothing to do with the timeout of collectives. Raises TimeoutError.
    """
    if _state.store is None:
        return
    unique = _unique(f"main/{key}")
    if _state.world.is_main:
        _state.store.set(unique, "1")
    else:
        _wait([unique], key, timeout, "rank 0")


def barrier_wait(key: str, timeout: float | None = None) -> None:
    """Every rank waits for every other, on the store, with its own timeout (see :func:`wait_for_main`)."""
    if _state.store is None:
        return
    unique = _unique(f"all/{key}")
    _state.store.set(f"{unique}/{_state.world.rank}", "1")
    _wait([f"{unique}/{rank}" for rank in range(_state.world.size)], key, timeout, "all ranks")


@contextlib.contextmanager
def rank_zero_first(key: str = "first", timeout: float | None = None) -> Iterator[None]:
    """Run the block on rank 0, then on the others: for downloads and caches that one process should make."""
    if not _state.world.is_main:
        wait_for_main(key, timeout)
    try:
        yield
    finally:  # also after an error: the others then meet it themselves instead of waiting for hours
        if _state.world.is_main:
            wait_for_main(key, timeout)


def _unique(key: str) -> str:
    _state.calls[key] = _state.calls.get(key, 0) + 1
    return f"{key}/{_state.calls[key]}"


def _wait(keys: list[str], key: str, timeout: float | None, whom: str) -> None:
    assert _state.store is not None
    seconds = _state.patience if timeout is None else timeout
    try:
        _state.store.wait(keys, timedelta(seconds=seconds))
    except torch_dist.DistStoreError as error:
        limit = "dist.eval_timeout_seconds" if timeout is None else "the limit given"
        text = f"rank {_state.world.rank} waited {seconds:g} s ({limit}) for {whom} at {key!r} in vain"
        raise TimeoutError(text) from error


# --- collectives ----------------------------------------------------------------------------------------------------
def average(value: Tensor | float) -> Tensor:
    """Mean over the ranks, without gradient, in float32 at least; any shape, the same on every rank. Identity alone."""
    tensor = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value), device=_state.world.device)
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    if _state.world.size == 1:
        return tensor
    total = tensor.clone().contiguous()
    torch_dist.all_reduce(total)
    return total / _state.world.size


def most(value: int) -> int:
    """The largest of the ranks' values."""
    if _state.world.size == 1:
        return value
    tensor = torch.tensor(value, device=_state.world.device)
    torch_dist.all_reduce(tensor, torch_dist.ReduceOp.MAX)
    return int(tensor)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], bucket_mb: int = 512) -> None:
    """Replace every gradient by its mean over the ranks, in flat buckets of ``bucket_mb`` MiB, in the order given.

    A gradient that is absent on some ranks counts as zero there and is filled in; one that is absent on all ranks stays
    absent. So each rank steps exactly the parameters that one process would step with the concatenated batch. One flag
    per parameter travels with its bucket for this; only a rank that lacks a gradient has to read the flags.
    """
    if _state.world.size == 1:
        return
    for bucket in _buckets(parameters, max(1, bucket_mb) * 2**20):
        _reduce_bucket(bucket, _state.world.size)


def _buckets(parameters: Iterable[nn.Parameter], limit: int) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype and device, at most ``limit`` bytes together (or a single larger one)."""
    open_buckets: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    sizes: dict[tuple[torch.dtype, torch.device], int] = {}
    for parameter in parameters:
        kind = (parameter.dtype, parameter.device)
        size = parameter.numel() * parameter.element_size()
        if open_buckets.get(kind) and sizes[kind] + size > limit:
            yield open_buckets.pop(kind)
        if kind not in open_buckets:
            open_buckets[kind], sizes[kind] = [], 0
        open_buckets[kind].append(parameter)
        sizes[kind] += size
    yield from open_buckets.values()


def _reduce_bucket(bucket: list[nn.Parameter], size: int) -> None:
    absent = [i for i, p in enumerate(bucket) if p.grad is None]
    flags = torch.ones(len(bucket), dtype=bucket[0].dtype)
    flags[absent] = 0
    pieces = [torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1) for p in bucket]
    flat = torch.cat([*pieces, flags.to(bucket[0].device)])
    torch_dist.all_reduce(flat)
    present = flat[-len(bucket) :].tolist() if absent else []
    flat /= size
    means = flat[: -len(bucket)].split([p.numel() for p in bucket])
    for index, (parameter, mean) in enumerate(zip(bucket, means, strict=True)):
        if parameter.grad is not None:
            parameter.grad.copy_(mean.view_as(parameter))
        elif present[index] > 0:
            parameter.grad = mean.view_as(parameter).clone()


def gather_objects(value: Any) -> list[Any]:
    """The values of all ranks, in rank order, on every rank. Small picklable objects."""
    if _state.world.size == 1:
        return [value]
    gathered: list[Any] = [None] * _state.world.size
    torch_dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """Rank 0's value, on every rank. Small picklable objects."""
    if _state.world.size == 1:
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside the block this rank acts as if it were the only one: what rank 0 does while the others wait for it."""
    held = _state.world
    _state.world = World(held.rank, held.local_rank, 1, held.device, held.backend)
    try:
        yield
    finally:
        _state.world = held


# --- identical weights ----------------------------------------------------------------------------------------------
def checksum_parameters(module: nn.Module) -> str:
    """sha256 (hex) over name, dtype, shape and bytes of every parameter, in order."""
    total = hashlib.sha256()
    for name, digest in _digests(module).items():
        total.update(f"{name}:{digest};".encode())
    return total.hexdigest()


def assert_same_weights(module: nn.Module) -> None:
    """RuntimeError on every rank, naming the first parameter that is not bit-identical on all ranks."""
    digests = gather_objects(_digests(module))
    for rank, other in enumerate(digests):
        for name in {**digests[0], **other}:
            if digests[0].get(name) != other.get(name):
                raise RuntimeError(f"parameter {name} differs between rank 0 and rank {rank}")


def _digests(module: nn.Module) -> dict[str, str]:
    digests = {}
    for name, parameter in module.named_parameters():
        digest = hashlib.sha256(f"{parameter.dtype}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
        digests[name] = digest.hexdigest()
    return digests
