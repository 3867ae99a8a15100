"""Causal language models in Hugging Face form: build a fresh one, load, save, take apart."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from colorfilter.errors import InputError
from colorfilter.recipe import Model

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

transformers_logging.disable_progress_bar()


def build(model: Model, vocab_size: int, sequence_length: int, seed: int) -> PreTrainedModel:
    """A fresh model with float32 weights that depend on the seed alone.

    Raises InputError for a type that transformers does not know, a key that its configuration
    does not have (transformers itself would take it in silence), or too short a context.
    """
    try:
        known = AutoConfig.for_model(model.type).to_dict()
        for key in model.config:
            if key not in known:
                raise InputError(f"model.config.{key}: not a setting of {model.type}; remove it")
        config = AutoConfig.for_model(
            model.type, **model.config, vocab_size=vocab_size, bos_token_id=None, eos_token_id=0
        )
        _check_context(config, sequence_length, f"a {model.type} of this configuration")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            fresh: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            return fresh
    except ValueError as error:
        raise InputError(f"model of type {model.type}: {str(error).splitlines()[0]}") from error


def load(path: str | Path, precision: str = "float32") -> PreTrainedModel:
    """A model from a folder or hub name, safetensors only, in evaluation mode.

    Raises InputError where there is none.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[precision], use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise InputError(f"no model at {path}: {str(error).strip().splitlines()[0]}") from error
    model.eval()
    return model


def check_fit(path: str, vocab_size: int, sequence_length: int) -> None:
    """Refuse a given checkpoint that the tokenizer or the sequence length does not fit.

    Raises InputError.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"prior.path: no model at {path} ({str(error).splitlines()[0]})"
        ) from error
    text = config.get_text_config()
    if vocab_size > text.vocab_size:
        raise InputError(
            f"tokenizer: its {vocab_size} tokens do not fit the {text.vocab_size} of the model at "
            f"{path}; set tokenizer.path to the tokenizer that the model was trained with"
        )
    _check_context(text, sequence_length, f"the model at {path}")


def _check_context(config: PreTrainedConfig, sequence_length: int, which: str) -> None:
    context = getattr(config, "max_position_embeddings", None)
    if context and sequence_length > context:
        raise InputError(
            f"sequence_length: {sequence_length} is longer than the context ({context}) of "
            f"{which}; shorten it or raise max_position_embeddings"
        )


def save(model: PreTrainedModel, folder: Path, tokenizer: Path) -> None:
    """Save a model with its tokenizer, so that `from_pretrained(folder)` gives both."""
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)


def to_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The model with its weights on a device."""
    torch.nn.Module.to(model, device)
    return model


def n_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Number of parameters, in all and without the embeddings of tokens in and out."""
    embeddings = {id(p): p.numel() for p in model.get_input_embeddings().parameters()}
    if model.get_output_embeddings() is not None:
        embeddings |= {id(p): p.numel() for p in model.get_output_embeddings().parameters()}
    total = sum(p.numel() for p in model.parameters())
    return {"parameters": total, "body_parameters": total - sum(embeddings.values())}


@torch.inference_mode()
def head_weight(model: PreTrainedModel) -> torch.Tensor | None:
    """The head's weight [V, D] where logits are `hidden @ weight.T` and nothing else, else None.

    Tried on a few tokens and not believed: some architectures scale, cap or shift their logits.
    """
    head = model.get_output_embeddings()
    weight: Any = getattr(head, "weight", None)
    if weight is None:
        return None
    tokens = torch.arange(8, device=weight.device)[None]
    hidden = model.base_model(input_ids=tokens).last_hidden_state
    logits = model(input_ids=tokens).logits
    if hidden.shape[-1] != weight.shape[-1] or logits.shape[-1] != weight.shape[0]:
        return None
    plain = (hidden @ weight.T).float()
    scale = logits.float().abs().max().item()
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
    same = torch.allclose(plain, logits.float(), rtol=0, atol=tolerance * max(scale, 1.0))
    return weight if same else None
