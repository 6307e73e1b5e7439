"""Language models behind one contract: our own :class:`lalia.nn.gpt.Gpt`, and a Hugging Face causal language model in its place.

Legend: B rows, P audio positions, L text tokens, W width, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lalia.pretrained import PretrainedError, load_causal_lm, resolve
from lalia.sections import ExternalModel


class LanguageModel(Protocol):
    """A decoder that takes soft tokens (audio) before its text. Rows of unlike length do not disturb each other.

    ``tokens`` int64 [B, L] and ``prefix`` [B, P, W] are filled up at the end; ``lengths`` and ``prefix_lengths`` [B] say how much
    of each row counts (None = all of it). The prefix is in the space of :meth:`embed` and may hold embeddings of tokens as well as
    audio; :class:`lalia.systems.omni.projector.Projector` gives soft tokens the scale that embeddings have.
    """

    width: int
    vocab: int
    context: int

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, L] → [B, L, W], as the first layer is given them."""
        ...

    def __call__(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        prefix: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Logits of the text positions, float32 [B, L, V]; of the N that are ``wanted`` (bool [B, L]) alone, row by row, [N, V]."""
        ...

    def prefill(
        self, tokens: Tensor, lengths: Tensor | None = None, prefix: Tensor | None = None, prefix_lengths: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Logits [B, V] after each row's last token, and the cache that :meth:`step` goes on from."""
        ...

    def step(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """One token [B] more for each row: logits [B, V] after it, and the cache with it."""
        ...


def describe_language(config: ExternalModel, offline: bool = False) -> dict[str, Any]:
    """What :class:`HfLanguage` needs to build the network of ``config`` without its weights: JSON data for a run folder.

    Raises:
        PretrainedError: the model cannot be had, or its folder is not that of a language model.
    """
    folder = resolve(config.source, "language", offline, config.revision)
    if folder is None:
        model: Any = load_causal_lm(config)
        settings = json.loads(model.config.to_json_string())
    else:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vocab = int(_causal(settings, config.source).vocab_size)
    return {"config": {key: value for key, value in settings.items() if not key.startswith("_")}, "vocab": vocab}


def _causal(settings: Mapping[str, Any], source: str) -> Any:
    """The transformers configuration of ``settings``; PretrainedError unless it is a causal language model's."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    rest = {key: value for key, value in settings.items() if key != "model_type" and not key.startswith("_")}
    kind = settings.get("model_type", "")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise PretrainedError(f"language.source: {source} is a {kind or 'model without a model_type'}, not a causal language model")
    return AutoConfig.for_model(kind, **rest)


@dataclass
class HfCache:
    """``past``: transformers' own cache; ``seen`` [B, T] says which positions of it count; ``used`` [B] how many of a row do."""

    past: Any
    seen: Tensor
    used: Tensor
    longest: int  # the greatest of ``used``, known without asking the device


class HfLanguage(nn.Module):
    """A Hugging Face causal language model (SmolLM2, Qwen2, Llama …) as a :class:`LanguageModel`.

    Args:
        description: as :func:`describe_language` makes it.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        super().__init__()
        from transformers import AutoModelForCausalLM

        self.description = dict(description)
        config = _causal(description["config"], "this run's language model")
        self.model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
        self.width: int = config.hidden_size
        self.vocab: int = config.vocab_size
        self.context: int = config.max_position_embeddings
        self._plain: bool | None = None  # see _head_alone

    def load(self, config: ExternalModel, offline: bool = False) -> None:
        """Take the weights of ``config``, the source that the description was made of. PretrainedError when it cannot be had,
        RuntimeError when it has other shapes."""
        self.model.load_state_dict(load_causal_lm(config, offline).state_dict())

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] → [B, L, W]."""
        return self.model.get_input_embeddings()(tokens)

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        prefix: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """As :meth:`LanguageModel.__call__`.

        Raises:
            ValueError: a row longer than ``context``, a prefix of another width, lengths without their values.
        """
        inputs, before = self._prompt(tokens, lengths, prefix, prefix_lengths)
        if wanted is None:
            rows = torch.arange(len(tokens), device=tokens.device).unsqueeze(1)
            places = before.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device)
            places = places.clamp_max(inputs["attention_mask"].shape[1] - 1)  # of what is filled up
        else:
            rows, places = wanted.nonzero(as_tuple=True)
            places = places + before[rows]
        with _attention(inputs["inputs_embeds"]):
            if not self._head_alone():
                return self.model(**inputs, use_cache=False).logits[rows, places].float()
            hidden = self.model.base_model(**inputs, use_cache=False)[0]
            return self.model.get_output_embeddings()(hidden[rows, places]).float()

    @torch.no_grad()
    def _head_alone(self) -> bool:
        """Whether the logits are the output layer's alone, so that it need not see every position. Some models (Gemma, Cohere) do
        something to them afterwards; tried once."""
        if self._plain is None:
            device, training = next(self.parameters()).device, self.model.training
            self.model.eval()
            some = {"input_ids": torch.arange(4, device=device).unsqueeze(0), "use_cache": False}
            with torch.autocast(device.type, enabled=False):
                alone = self.model.get_output_embeddings()(self.model.base_model(**some)[0])
                self._plain = torch.allclose(alone, self.model(**some).logits, rtol=1e-3, atol=1e-4)
            self.model.train(training)
        return self._plain

    @torch.no_grad()
    def prefill(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        prefix: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
    ) -> tuple[Tensor, HfCache]:
        """As :meth:`LanguageModel.prefill`."""
        inputs, _ = self._prompt(tokens, lengths, prefix, prefix_lengths)
        seen = inputs["attention_mask"]
        used = seen.sum(1)
        kept, place = (used - 1).unique(return_inverse=True)
        out = self.model(**inputs, use_cache=True, logits_to_keep=kept)
        rows = torch.arange(len(tokens), device=tokens.device)
        return out.logits[rows, place].float(), HfCache(out.past_key_values, seen, used, int(used.max()))

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: HfCache) -> tuple[Tensor, HfCache]:
        """As :meth:`LanguageModel.step`; the cache is the same object, which now counts the token."""
        self._check_room(cache.longest + 1)
        seen = F.pad(cache.seen, (0, 1), value=1)
        out = self.model(
            input_ids=tokens.unsqueeze(1),
            attention_mask=seen,
            position_ids=cache.used.unsqueeze(1),
            past_key_values=cache.past,
            use_cache=True,
        )
        cache.past, cache.seen, cache.used, cache.longest = out.past_key_values, seen, cache.used + 1, cache.longest + 1
        return out.logits[:, -1].float(), cache

    def _prompt(
        self, tokens: Tensor, lengths: Tensor | None, prefix: Tensor | None, prefix_lengths: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Embeddings, attention mask and positions of audio and text, without gaps between them and filled up at the end; and how
        many positions of each row, [B], stand before its text."""
        if not tokens.shape[1]:
            raise ValueError("a prompt needs at least one token; begin the text with the tokenizer's BOS")
        if prefix is None and prefix_lengths is not None:
            raise ValueError("prefix_lengths were given without a prefix")
        embedded = self.embed(tokens)
        if prefix is None:
            prefix = embedded[:, :0]
        if prefix.shape[-1] != self.width:
            raise ValueError(f"the audio prefix is {prefix.shape[-1]} wide, the language model {self.width}")
        most, text = prefix.shape[1], tokens.shape[1]
        before = torch.full_like(tokens[:, 0], most) if prefix_lengths is None else prefix_lengths.to(tokens)
        used = before + (text if lengths is None else lengths.to(before))
        embedded, total = torch.cat([prefix.to(embedded.dtype), embedded], dim=1), most + text
        if lengths is not None or prefix_lengths is not None:
            total = int(used.max())
        self._check_room(total)
        place = torch.arange(total, device=tokens.device)
        if prefix_lengths is not None:  # each text follows its own audio
            source = place + (place >= before.unsqueeze(1)) * (most - before).unsqueeze(1)
            embedded = embedded.gather(1, source.clamp_max(most + text - 1).unsqueeze(-1).expand(-1, -1, self.width))
        seen = place < used.unsqueeze(1)
        places = place.expand(len(tokens), -1)
        return {"inputs_embeds": embedded[:, :total], "attention_mask": seen.long(), "position_ids": places}, before

    def _check_room(self, used: int) -> None:
        if used > self.context:
            raise ValueError(
                f"{used} positions of audio and text, but the language model has a context of {self.context}: shorten the audio"
                " or the text, or stack more frames in the projector"
            )


def _attention(embedded: Tensor) -> AbstractContextManager[None]:
    """On a CPU the fused attention kernel's backward pass is slower than that of the plain formula, by half again in bf16."""
    if embedded.device.type != "cpu" or not embedded.requires_grad:
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)
