"""Layers whose weights are laid out for oneDNN once, instead of at every call; for inference on a CPU.

oneDNN computes with weights in blocks that fit the processor's registers, and PyTorch otherwise reorders them at each call. With
one sentence at a time there is little work to spread that over: a call of these networks gets 1.2 (kernel 5) to 1.8 times (kernel
1) as fast, one thread.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lalia.nn.linear import Linear

TYPICAL_LENGTH = 256  # the layout is chosen for sequences of about this length, and valid for all
SHORTEST = 16  # below it, as for a speaker vector of length 1, the packed layout has only slow kernels (measured 300 times slower)


class PackedConv(nn.Module):
    """Stands in for ``plain``, a convolution of stride 1 without groups: [B, C, T] → [B, C', T'], values to rounding the same.

    Whatever the packed weights do not serve goes to ``plain``: another device or precision, autocast, a gradient.
    """

    def __init__(self, plain: nn.Conv1d) -> None:
        super().__init__()
        self.plain = plain
        operators: Any = torch.ops.mkldnn
        self.geometry = ((0, int(plain.padding[0])), (1, 1), (1, plain.dilation[0]), 1)  # padding, stride, dilation, groups
        size = (1, plain.in_channels, 1, TYPICAL_LENGTH)
        # not a buffer: its layout is opaque, it can neither be saved nor moved
        self.packed = [operators._reorder_convolution_weight(plain.weight.detach().unsqueeze(2), *self.geometry, size)]
        self.operator = operators._convolution_pointwise

    def forward(self, hidden: Tensor) -> Tensor:
        served = hidden.device.type == "cpu" and hidden.dtype == torch.float32 and hidden.shape[-1] >= SHORTEST
        if not served or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return self.plain(hidden)
        return self.operator(hidden.unsqueeze(2), self.packed[0], self.plain.bias, *self.geometry, "none", [], "").squeeze(2)


def pack_layers(network: nn.Module) -> int:
    """Pack the convolutions and :class:`~lalia.nn.linear.Linear` layers inside ``network`` that can be; returns how many.

    Their weights must not change afterwards.

    None where the operators are missing, off the CPU, or with norms that were not folded first (:func:`lalia.nn.conv.fold_norms`).
    """
    if not hasattr(torch.ops.mkldnn, "_reorder_convolution_weight") or not torch.backends.mkldnn.is_available():
        return 0
    parents = [module for module in network.modules() if not isinstance(module, PackedConv)]
    children = [(parent, name, child) for parent in parents for name, child in parent.named_children()]
    found = [(parent, name, child) for parent, name, child in children if isinstance(child, nn.Conv1d) and _fits(child)]
    for parent, name, child in found:
        setattr(parent, name, PackedConv(child))
    products = [module for module in network.modules() if isinstance(module, Linear)]
    for layer in products:
        layer.pack()
    return len(found) + len(products)


def _fits(layer: nn.Conv1d) -> bool:
    if type(layer) is not nn.Conv1d or layer.groups != 1 or layer.stride != (1,) or layer.padding_mode != "zeros":
        return False
    return layer.weight.device.type == "cpu" and layer.weight.dtype == torch.float32 and not isinstance(layer.padding, str)
