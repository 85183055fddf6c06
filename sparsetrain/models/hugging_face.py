"""Weights under the names, and in the shapes, of Hugging Face's models: LlamaForCausalLM and GPT2LMHeadModel."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsetrain.config.model import ModelConfig
from sparsetrain.errors import ConfigError

_LLAMA = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
_GPT2 = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "head": "lm_head",
    "attention_norm": "ln_1",
    "ffn_norm": "ln_2",
    "attention.o": "attn.c_proj",
    "ffn.up": "mlp.c_fc",
    "ffn.down": "mlp.c_proj",
}


def to_hugging_face(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a whole model's weights; zeros stay where they are.

    Args:
        config: Of the model.
        weights: As in its `state_dict`.

    Raises:
        ConfigError: A model with experts.
    """
    if config.moe is not None:
        raise ConfigError("model.moe: experts have no counterpart with these names; export with names=ours")
    return _to_gpt2(weights) if config.arch == "gpt2" else _to_llama(weights)


def _to_llama(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        layer, part, kind = _split(name)
        prefix = "" if layer is None else f"model.layers.{layer}."
        renamed[f"{prefix}{_LLAMA[part]}.{kind}"] = tensor
    return renamed


def _to_gpt2(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices inside layers are transposed there, and query, key and value are one."""
    renamed = {}
    for name, tensor in weights.items():
        layer, part, kind = _split(name)
        if layer is None:
            renamed[f"{_GPT2[part]}.{kind}"] = tensor
            continue
        place = _GPT2.get(part)
        if part == "attention.q":
            place = "attn.c_attn"
            tensor = torch.cat([weights[name.replace("attention.q", f"attention.{which}")] for which in "qkv"])
        if place is not None:  # keys and values are with the queries
            renamed[f"transformer.h.{layer}.{place}.{kind}"] = tensor.T.contiguous() if tensor.ndim == 2 else tensor
    return renamed


def _split(name: str) -> tuple[str | None, str, str]:
    """3, ffn.up and weight of layers.3.ffn.up.weight."""
    part, _, kind = name.rpartition(".")
    if not part.startswith("layers."):
        return None, part, kind
    _, layer, part = part.split(".", 2)
    return layer, part, kind
