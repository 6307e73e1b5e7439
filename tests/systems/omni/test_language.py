"""Hugging Face language models behind the contract of our own: prefixes, caches and weights (O-04, O-05, O-06, O-22)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lalia.nn.gpt import Gpt, GptConfig
from lalia.pretrained import PretrainedError
from lalia.sections import ExternalModel
from lalia.systems.omni.language import HfLanguage, LanguageModel, describe_language

TEXT, AUDIO = [11, 4, 7, 1], [6, 0, 9, 3]
SHAPE = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama with grouped heads and a Qwen2 with tied embeddings, random, as their folders."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    limits = {"max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}
    made = {
        "llama": LlamaForCausalLM(LlamaConfig(**SHAPE, **limits, num_key_value_heads=2)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SHAPE, **limits, num_key_value_heads=4, tie_word_embeddings=True)),
    }
    root = tmp_path_factory.mktemp("hf")
    for name, model in made.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in made}


@pytest.fixture(params=["llama", "qwen2"])
def language(request: pytest.FixtureRequest, folders: dict[str, Path]) -> HfLanguage:
    return loaded(folders[request.param])


def loaded(folder: Path) -> HfLanguage:
    config = ExternalModel(source=str(folder))
    model = HfLanguage(json.loads(json.dumps(describe_language(config))))
    model.load(config)
    return model.eval()


def some(*shape: int) -> Tensor:
    return torch.randint(0, 67, shape, generator=torch.Generator().manual_seed(sum(shape)))


def sound(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_text_alone_is_the_model_itself(language: HfLanguage, folders: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    kind = language.description["config"]["model_type"]
    plain = AutoModelForCausalLM.from_pretrained(folders[kind]).eval()
    tokens = some(2, 9)
    with torch.no_grad():
        assert torch.allclose(language(tokens), plain(tokens).logits, atol=1e-5)
        assert torch.equal(language(tokens), language(tokens, prefix=torch.zeros(2, 0, 32)))
        assert torch.equal(language.embed(tokens), plain.get_input_embeddings()(tokens))
    assert (language.width, language.vocab, language.context) == (32, 67, 64)


def test_rows_of_unlike_lengths_equal_the_same_rows_alone(language: HfLanguage) -> None:
    tokens, prefix, more = some(4, 11), 7 * sound(4, 9, 32), some(4, 6)
    lengths, heard = torch.tensor(TEXT), torch.tensor(AUDIO)
    with torch.no_grad():
        together = language(tokens, lengths, prefix, heard)
        logits, cache = language.prefill(tokens, lengths, prefix, heard)
        steps = [logits]
        for place in range(6):
            logits, cache = language.step(more[:, place], cache)
            steps.append(logits)
        for row, (text, audio) in enumerate(zip(TEXT, AUDIO, strict=True)):
            own = prefix[row : row + 1, :audio] if audio else None
            alone = language(tokens[row : row + 1, :text], prefix=own)
            assert (together[row, :text] - alone[0]).abs().max() <= 2e-5
            line = torch.cat([tokens[row, :text], more[row]])[None]
            whole = language(line, prefix=own)[0, text - 1 :]
            assert (torch.stack([step[row] for step in steps]) - whole).abs().max() < 1e-4
    assert cache.longest == 17 + 6 and cache.used.tolist() == [a + t + 6 for a, t in zip(AUDIO, TEXT, strict=True)]


def test_embeddings_of_tokens_before_the_audio_are_the_tokens_themselves(language: HfLanguage) -> None:
    tokens, audio = some(1, 7), sound(1, 4, 32)
    with torch.no_grad():
        prefix = torch.cat([language.embed(tokens[:, :3]), audio], dim=1)
        ours = language(tokens[:, 3:], prefix=prefix)
        table = language.model.get_input_embeddings()
        rows = torch.cat([table(tokens[:, :3]), audio, table(tokens[:, 3:])], dim=1)
        theirs = language.model(inputs_embeds=rows).logits[:, -4:]
        assert torch.equal(language(tokens[:, 3:], prefix=language.embed(tokens[:, :3])), language(tokens)[:, 3:])
    assert (ours - theirs).abs().max() <= 2e-5


def test_gradients_reach_the_audio_and_no_padding(language: HfLanguage) -> None:
    prefix = sound(2, 5, 32).requires_grad_()
    language(some(2, 4), prefix=prefix, prefix_lengths=torch.tensor([5, 2])).square().sum().backward()
    assert prefix.grad is not None and torch.isfinite(prefix.grad).all()
    assert prefix.grad[0].abs().sum(-1).gt(0).all() and prefix.grad[1, :2].abs().sum(-1).gt(0).all()
    assert not prefix.grad[1, 2:].any()


def test_a_run_folder_rebuilds_it_without_the_source(language: HfLanguage) -> None:
    twin = HfLanguage(language.description)
    twin.load_state_dict(language.state_dict())
    with torch.no_grad():
        assert torch.equal(twin.eval()(some(1, 6), prefix=sound(1, 3, 32)), language(some(1, 6), prefix=sound(1, 3, 32)))


def test_what_does_not_fit_is_named(language: HfLanguage) -> None:
    for arguments, message in (
        ({"prefix": sound(1, 3, 31)}, "31 wide, the language model 32"),
        ({"prefix_lengths": torch.tensor([3])}, "without a prefix"),
        ({"prefix": sound(1, 60, 32)}, "65 positions .* context of 64"),
        ({"tokens": some(1, 0)}, "at least one token"),
    ):
        given: dict[str, Any] = {"tokens": some(1, 5), **arguments}
        with pytest.raises(ValueError, match=message):
            language(**given)
    _, cache = language.prefill(some(1, 5), prefix=sound(1, 59, 32))
    with pytest.raises(ValueError, match="65 positions"):
        language.step(some(1), cache)


def test_a_folder_of_another_kind_is_refused(tmp_path: Path, folders: dict[str, Path]) -> None:
    for file in folders["llama"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    settings = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model_type": "wavlm"}), encoding="utf-8")
    with pytest.raises(PretrainedError, match="is a wavlm, not a causal language model"):
        describe_language(ExternalModel(source=str(tmp_path)))
    with pytest.raises(PretrainedError, match="there is no folder"):
        describe_language(ExternalModel(source=str(tmp_path / "absent")))


def test_tiny_and_our_own_gpt_keep_the_same_contract() -> None:
    tiny = ExternalModel(source="tiny")
    hf = HfLanguage(describe_language(tiny))
    hf.load(tiny)
    models: list[LanguageModel] = [hf, Gpt(GptConfig(depth=2, vocab=257, aspect=8, head_width=16))]
    for model in models:
        prefix, tokens = sound(2, 3, model.width), some(2, 4)
        logits, cache = model.prefill(tokens, None, prefix)
        assert logits.shape == (2, model.vocab) and model.embed(tokens).shape == (2, 4, model.width)
        assert torch.allclose(logits, model(tokens, prefix=prefix)[:, -1], atol=1e-5)
        assert model.step(tokens[:, 0], cache)[0].shape == (2, 257)
