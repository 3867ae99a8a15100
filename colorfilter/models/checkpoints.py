"""Causal language models in Hugging Face format: building, loading, saving, inspecting."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from colorfilter.config.recipe import Model
from colorfilter.errors import InputError, one_line

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

transformers_logging.disable_progress_bar()


def build(model: Model, vocab_size: int, sequence_length: int, seed: int) -> PreTrainedModel:
    """Build a fresh model with float32 weights that depend on the seed only.

    Raises InputError like `configuration`, and for a model that is not causal.
    """
    config = configuration(model, vocab_size, sequence_length)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = _from_config(config)
    _refuse_not_causal(fresh, f"a model of type {model.type}")
    return fresh


def _from_config(config: PreTrainedConfig) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # architectures raise anything for invalid values
        raise InputError(f"model of type {config.model_type}: {one_line(error)}") from error
    return model


def configuration(model: Model, vocab_size: int, sequence_length: int) -> PreTrainedConfig:
    """Return the configuration of a fresh model.

    Raises InputError for a type that transformers does not know, a key that the type's
    configuration does not have (transformers accepts it silently), or too short a context.
    """
    own = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": None}
    try:
        known = AutoConfig.for_model(model.type).to_dict()
        for key in model.config:
            if key in own:
                raise InputError(f"model.config.{key}: comes from the tokenizer; remove it")
            if key not in known:
                raise InputError(f"model.config.{key}: not a setting of {model.type}; remove it")
        config: PreTrainedConfig = AutoConfig.for_model(model.type, **model.config, **own)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"model of type {model.type}: {one_line(error)}") from error
    _check_context(config, sequence_length, f"a {model.type} of this configuration")
    return config


def load(path: str | Path, precision: str = "float32") -> PreTrainedModel:
    """Load a model from a folder or hub name, in evaluation mode. Reads safetensors only.

    Raises InputError if there is none, or if the model is not causal.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[precision], use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"no model at {path}: {one_line(error)}") from error
    model.eval()
    _refuse_not_causal(model, f"the model at {path}")
    return model


@torch.inference_mode()
def _refuse_not_causal(model: PreTrainedModel, which: str) -> None:
    """Raise InputError if a model's logits depend on later tokens, which are its labels."""
    training = model.training
    model.eval()
    tokens = torch.tensor([[1, 2, 3], [1, 2, 4]], device=model.device)
    first = model(input_ids=tokens).logits[:, 0].float()
    model.train(training)
    if not torch.allclose(first[0], first[1], atol=1e-2, equal_nan=True):
        raise InputError(
            f"{which} is not a causal language model: its outputs depend on later tokens; choose "
            "another"
        )


def check_fit(path: str, vocab_size: int, sequence_length: int) -> None:
    """Raise InputError if a checkpoint does not fit the tokenizer or the sequence length."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"prior.path: no model at {path} ({one_line(error)}); correct the path"
        ) from error
    text = config.get_text_config()
    if vocab_size > text.vocab_size:
        raise InputError(
            f"tokenizer: its {vocab_size} tokens do not fit the {text.vocab_size} of the model at "
            f"{path}; set tokenizer.path to the model's own tokenizer"
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
    """Save a model and its tokenizer, so that `from_pretrained(folder)` loads both."""
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)


def to_device(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to a device, in place, and return it."""
    torch.nn.Module.to(model, device)
    return model


def parameters_of(start: Model | str, vocab_size: int, sequence_length: int) -> int:
    """Return the number of parameters of a fresh model or a checkpoint, without its weights.

    Raises InputError like `configuration`, and if there is no checkpoint.
    """
    if isinstance(start, Model):
        config = configuration(start, vocab_size, sequence_length)
    else:
        try:
            config = AutoConfig.from_pretrained(start, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise InputError(f"no model at {start}: {one_line(error)}") from error
    with torch.device("meta"):
        return n_parameters(_from_config(config))["parameters"]


def n_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Count parameters in total, and without the input and output embeddings."""
    embeddings = {id(p): p.numel() for p in model.get_input_embeddings().parameters()}
    if model.get_output_embeddings() is not None:
        embeddings |= {id(p): p.numel() for p in model.get_output_embeddings().parameters()}
    total = sum(p.numel() for p in model.parameters())
    return {"parameters": total, "body_parameters": total - sum(embeddings.values())}


def weights_per_token(model: PreTrainedModel) -> int:
    """Count the weights that every token is multiplied with: matrices, including the head."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    body = sum(p.numel() for p in model.parameters() if p.ndim > 1 and id(p) not in tables)
    head = model.get_output_embeddings()
    tied = head is not None and id(head.weight) in tables
    return body + (head.weight.numel() if tied else 0)


@torch.inference_mode()
def head_weight(model: PreTrainedModel) -> torch.Tensor | None:
    """Return the head's weight [V, D] if logits are exactly `hidden @ weight.T`, else None.

    Some architectures scale, cap or shift the input or output of the head. To detect this, a few
    tokens pass through the model: the head must receive the unchanged hidden states, and its output
    must be the unchanged logits. The model stays in its mode, training or evaluation, and the
    global random state is preserved.
    """
    head = model.get_output_embeddings()
    weight: Any = getattr(head, "weight", None)
    if weight is None or getattr(head, "bias", None) is not None:
        return None
    seen: dict[str, torch.Tensor] = {}

    def look(_module: object, arguments: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen["input"], seen["output"] = arguments[0], output

    tokens = torch.arange(8, device=weight.device)[None]
    hook = head.register_forward_hook(look)
    try:
        with torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
            torch.manual_seed(0)
            logits = model(input_ids=tokens).logits
            torch.manual_seed(0)  # the same dropout again
            hidden = model.base_model(input_ids=tokens).last_hidden_state
    finally:
        hook.remove()
    plain = torch.equal(seen["input"], hidden) and torch.equal(seen["output"], logits)
    return weight if plain else None
