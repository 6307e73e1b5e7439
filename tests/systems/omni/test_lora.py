"""O-15: adapters that change nothing at first, merge exactly, and are all that learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lalia.nn.gpt import Gpt, GptConfig
from lalia.systems.omni import lora
from lalia.systems.omni.config_chat import LoraConfig

pytest.importorskip("peft")


def gpt() -> Gpt:
    torch.manual_seed(0)
    model = Gpt(GptConfig(depth=2, vocab=65, context=64, aspect=16, head_width=16))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=65)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).eval()


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    found = model(tokens)
    return found if isinstance(found, Tensor) else found.logits


def shaken(model: nn.Module) -> None:
    """Adapters as if they had learnt something."""
    with torch.no_grad():
        for parameter in lora.lora_parameters(model):
            parameter.normal_(0, 0.05)


def adapters_of(model: nn.Module) -> set[str]:
    """Names of the adapters' tensors in what is saved."""
    return {name for name in model.state_dict() if lora.ADAPTER in name}


MODELS = pytest.mark.parametrize("make", [gpt, llama])
TOKENS = torch.arange(24).view(2, 12)


@MODELS
def test_nothing_changes_at_first_and_then_something_does(make: Any) -> None:
    model = make()
    before = logits(model, TOKENS)
    lora.add_lora(model, LoraConfig(rank=4))
    assert torch.equal(logits(model, TOKENS), before)
    shaken(model)
    assert (logits(model, TOKENS) - before).abs().max() > 1e-3


@MODELS
def test_merged_is_unmerged(make: Any) -> None:
    model = make()
    names = lora.add_lora(model, LoraConfig(rank=4))
    shaken(model)
    before, weights = logits(model, TOKENS), {k: v.clone() for k, v in model.state_dict().items()}
    assert lora.merge(model) == len(names)
    assert (logits(model, TOKENS) - before).abs().max() < 1e-5
    assert any(not torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert lora.unmerge(model) == len(names)
    assert all(torch.allclose(v, weights[k], atol=1e-6) for k, v in model.state_dict().items())


@MODELS
def test_every_adapter_and_nothing_else_learns(make: Any) -> None:
    """Also proves that no layer reads its weight past the adapter: such a one would get no gradient."""
    model = make()
    names = lora.add_lora(model, LoraConfig(rank=4))
    functional.cross_entropy(logits(model, TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {f"{name}.lora_B.default.weight" for name in names}  # A is still: B is zero at the start
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == adapters_of(model) and len(learning) == 2 * len(names)


@MODELS
def test_the_head_and_the_embedding_stay_and_the_rank_is_as_asked(make: Any) -> None:
    model = make()
    names = lora.add_lora(model, LoraConfig(rank=4))
    assert len(names) >= 12 and not any("head" in name or "embed" in name for name in names)
    state = model.state_dict()
    assert all(min(state[name].shape) == 4 for name in adapters_of(model))


def test_wrapped_layers_compute_what_hu_et_al_say() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(8, 6)])  # type: ignore[assignment]
    lora.add_lora(model, LoraConfig(rank=2, alpha=6))
    shaken(model)
    layer: Any = model.blocks[0]  # type: ignore[index]
    x = torch.randn(5, 8)
    a, b = (layer.get_submodule(f"{name}.default").weight for name in ("lora_A", "lora_B"))
    by_hand = x @ layer.base_layer.weight.T + layer.base_layer.bias + (6 / 2) * x @ a.T @ b.T
    assert torch.allclose(layer(x), by_hand, atol=1e-6)


def test_muon_never_gets_an_adapter() -> None:
    model = gpt()
    lora.add_lora(model, LoraConfig(rank=4))
    adapters = {id(p) for p in lora.lora_parameters(model)}
    assert not any(id(p) in adapters and p.requires_grad is False for p in model.parameters())
    assert adapters.isdisjoint(id(p) for p in gpt().matrices())
    frozen = [p for p in model.parameters() if id(p) not in adapters]
    assert not any(p.requires_grad for p in frozen)


def test_targets_can_be_named_and_a_wrong_name_is_told() -> None:
    last = lora.targets(gpt(), LoraConfig(rank=4))[0].rsplit(".", 1)[-1]
    chosen = lora.targets(gpt(), LoraConfig(rank=4, targets=[last]))
    assert chosen and all(name.endswith(f".{last}") for name in chosen)
    with pytest.raises(ValueError, match=f"no linear layer for LoRA.*{last}"):
        lora.targets(gpt(), LoraConfig(targets=["q_prj"], rank=4))


def test_names_of_the_base_are_found_again() -> None:
    model = gpt()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = lora.add_lora(model, LoraConfig(rank=4))
    found = lora.renamed(weights, names)
    own = model.state_dict()
    assert {name for name in own if name not in found} == adapters_of(model)
    assert all(torch.equal(tensor, own[name]) for name, tensor in found.items())
