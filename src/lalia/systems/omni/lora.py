"""Low-rank adapters (LoRA, Hu et al. 2021, 2106.09685) on the linear layers of a language model's blocks, by ``peft``.

``y = W x + (alpha / rank) · B A x`` with B = 0 at the start, so that nothing changes before the first step. ``peft`` wraps whole
modules and calls their own ``forward``, so that layers of a subclass of ``nn.Linear`` keep what they do besides.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor, nn

from lalia.systems.omni.config_chat import LoraConfig

log = logging.getLogger(__name__)

#: how ``peft`` names what it adds to a wrapped layer, and the layer itself
ADAPTER, BASE = "lora_", "base_layer."


class LoraUnavailable(ImportError):
    """``peft`` is not installed."""


def targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the linear layers that get an adapter: those inside a list of blocks, larger than the rank both ways.

    Embeddings and the output head are outside the blocks; gates of a few channels are smaller than the rank.
    ``config.targets`` narrows them to layers of these last names. ValueError when none is left.
    """
    lists = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(lists)} if lists else {}
    wide = [name for name, layer in linears.items() if min(layer.in_features, layer.out_features) >= config.rank]
    chosen = [name for name in wide if not config.targets or name.rsplit(".", 1)[-1] in config.targets]
    if not chosen:
        names = sorted({name.rsplit(".", 1)[-1] for name in wide})
        raise ValueError(
            f"no linear layer for LoRA: lora.targets={config.targets}, lora.rank={config.rank}; the model's blocks have "
            f"{', '.join(names) or 'none that wide'}"
        )
    return chosen


def add_lora(model: nn.Module, config: LoraConfig) -> list[str]:
    """Put adapters of ``config.rank`` on ``model`` in place and freeze all else in it; returns the names of the wrapped layers.

    Raises:
        ValueError: no layer to wrap.
        LoraUnavailable: ``peft`` is missing, with the command that installs it.
    """
    names = targets(model, config)
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise LoraUnavailable("LoRA needs the package peft: pip install 'lalia[lora]'") from error
    model.requires_grad_(False)
    wanted = PeftConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=names)
    inject_adapter_in_model(wanted, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(ADAPTER in name)
    learning = sum(p.numel() for p in lora_parameters(model))
    log.info("LoRA of rank %d on %d layers: %s parameters learn", config.rank, len(names), f"{learning:,}")
    return names


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the adapters."""
    return [parameter for name, parameter in model.named_parameters() if ADAPTER in name]


def renamed(weights: Mapping[str, Tensor], wrapped: list[str]) -> dict[str, Tensor]:
    """Weights of the model before :func:`add_lora` under the names that they have after it."""
    layers = set(wrapped)
    result = {}
    for name, tensor in weights.items():
        layer, _, last = name.rpartition(".")
        result[f"{layer}.{BASE}{last}" if layer in layers else name] = tensor
    return result


def merge(model: nn.Module) -> int:
    """Add every adapter to its layer's weight: the same outputs, to rounding, at the cost of none. Returns how many."""
    layers = _wrapped(model)
    for layer in layers:
        layer.merge(safe_merge=True)
    return len(layers)


def unmerge(model: nn.Module) -> int:
    """Take every merged adapter out of its weight again. Returns how many."""
    layers = [layer for layer in _wrapped(model) if layer.merged]
    for layer in layers:
        layer.unmerge()
    return len(layers)


def _wrapped(model: nn.Module) -> list:
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]
