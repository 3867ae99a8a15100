"""Speeding up the body of a causal language model without changing its mathematics.

On a CPU: blockwise causal attention, and float32 matrix products with oneDNN, if they are faster.
On CUDA: a compiled body, which fuses the operations between matrix products, and the faster one of
torch's attention implementations.
"""

import contextlib
import time
import warnings
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCK_CAUSAL = "block_causal"
BLOCKS = 4
LEAST_ROWS = 128
# Orders in which torch tries its attention implementations.
ORDERS = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION],
}
OTHERS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def prepare(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a model to a device and apply the optimizations for that device, in place."""
    torch.nn.Module.to(model, device)
    attend_by_blocks(model)
    if device.type == "cpu":
        prefer_onednn()
    elif device.type == "cuda":
        compile_body(model)
    return model


def attend_by_blocks(model: PreTrainedModel) -> None:
    """Use blockwise attention for a model on a CPU, in place, if it is faster than torch's.

    Useful in training too, where torch's attention spends most of its time in the backward pass.
    """
    # With AMX, torch's attention is faster.
    own = model.device.type != "cpu" or torch.cpu._is_amx_tile_supported()
    if not own and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(BLOCK_CAUSAL)


def compile_body(model: PreTrainedModel) -> None:
    """Compile a model's body for batches of one shape, in place.

    Parts that the compiler does not support run uncompiled.
    """
    settings: Any = torch._dynamo.config
    settings.suppress_errors = True
    # The compiler recommends TensorFloat32, which would round float32.
    warnings.filterwarnings("ignore", message="TensorFloat32")
    model.base_model.compile(dynamic=False)


def fastest_attention(model: PreTrainedModel, tokens: torch.Tensor) -> str | None:
    """Measure which of ORDERS is fastest for a batch, and return its key; None if not on CUDA."""
    if tokens.device.type != "cuda":
        return None
    seconds = {}
    for order in ORDERS:
        with attention(order), torch.compiler.set_stance("force_eager"):
            for _ in range(3):  # the last run counts
                torch.cuda.synchronize()
                begun = time.perf_counter()
                model.base_model(input_ids=tokens, use_cache=False)
                torch.cuda.synchronize()
                seconds[order] = time.perf_counter() - begun
    return min(seconds, key=lambda order: seconds[order])


def attention(order: str | None) -> contextlib.AbstractContextManager[None]:
    """Return a context manager that sets the order of torch's attentions; None changes nothing."""
    if order is None:
        return contextlib.nullcontext()
    return sdpa_kernel([*ORDERS[order], *OTHERS], set_priority=True)


def prefer_onednn() -> None:
    """Use oneDNN for float32 matrix products if it computes them in float32.

    The setting permits bf16. On a processor without AMX, oneDNN still multiplies in float32, on
    some at twice the speed of the default library. With AMX it multiplies in bf16. The error of one
    product shows which of the two it does; if bf16, the setting is reverted.
    """
    if not torch.backends.mkldnn.is_available():
        return
    backend: Any = torch.backends.mkldnn
    settings = backend.matmul
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(256, 512, generator=generator)
    right = torch.randn(512, 256, generator=generator)
    exact = left.double() @ right.double()
    settings.fp32_precision = "bf16"
    error = ((left @ right) - exact).abs().max() / exact.abs().max()
    if not error < 1e-5:
        settings.fp32_precision = "none"


def block_causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute causal attention in blocks of rows, each over the columns visible to it.

    query [B, H, T, D], key and value [B, H or fewer, T, D] -> [B, T, H, D]. This takes about 5/8 of
    the products of full rows, and a block's weights stay in cache. Anything other than plain causal
    self-attention is passed to torch's implementation.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = attention_mask is None and causal and query.shape[2] == key.shape[2]
    if not plain or dropout or any(extra is not None for extra in _changing(others)):
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **others,
        )
    B, H, T, D = query.shape
    scale = D**-0.5 if scaling is None else scaling
    rows = (query * scale).reshape(B * H, T, D)
    columns = repeat_kv(key, H // key.shape[1]).reshape(B * H, T, D).transpose(1, 2)
    values = repeat_kv(value, H // value.shape[1]).reshape(B * H, T, -1)
    out = values.new_empty(B, T, H, values.shape[-1])
    step = max(LEAST_ROWS, -(-T // BLOCKS))
    for start in range(0, T, step):
        stop = min(start + step, T)
        weights = torch.bmm(rows[:, start:stop], columns[:, :, :stop])
        later = torch.ones(stop - start, stop - start, dtype=torch.bool, device=query.device)
        weights[:, :, start:stop].masked_fill_(later.triu(1), -torch.inf)
        attended = torch.bmm(weights.softmax(dim=-1), values[:, :stop])
        out[:, start:stop] = attended.view(B, H, stop - start, -1).transpose(1, 2)
    return out, None


def _changing(others: dict[str, Any]) -> list[Any]:
    """Return the arguments that would change plain attention."""
    names = ("softcap", "s_aux", "position_bias", "cache")
    return [others.get(name) for name in names]


AttentionInterface.register(BLOCK_CAUSAL, block_causal_attention)
AttentionMaskInterface.register(BLOCK_CAUSAL, sdpa_mask)
