"""Tiny text models, one an architecture, from a config: 4 layers, width 32, MLPs of 48, windows that bite."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tiny_tokenizer import tokenizer
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WINDOW = 5
"""Tokens a sliding layer sees: fewer than any prompt has."""


def sizes() -> dict[str, Any]:
    """What most configs call the sizes of a tiny decoder."""
    return {
        "vocab_size": len(tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        **_ids(),
    }


def _ids() -> dict[str, Any]:
    return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _older() -> dict[str, Any]:
    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 48, "n_positions": 256}
    return {"vocab_size": len(tokenizer()), "initializer_range": 0.3, **sizes, **_ids()}


def _sliding(every: int) -> dict[str, Any]:
    """Every so many layers one that sees the whole prompt."""
    types = ["full_attention" if i % every == every - 1 else "sliding_attention" for i in range(4)]
    return {"sliding_window": WINDOW, "layer_types": types}


def loud(model: PreTrainedModel) -> PreTrainedModel:
    """With a gain of 5 on what the MLPs put out: at the 1 it starts from, no MLP outweighs the rest of the stream."""
    for name, weight in model.named_parameters():
        if name.endswith("post_feedforward_layernorm.weight"):
            torch.nn.init.constant_(weight, 4.0)
    return model


def _gemma2() -> PreTrainedModel:
    caps = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0}
    config = Gemma2Config(**sizes(), **_sliding(2), **caps, head_dim=8, query_pre_attn_scalar=8)
    return loud(Gemma2ForCausalLM(config))


def qwen2(first_sliding: int = 2) -> Qwen2ForCausalLM:
    """With layers that slide from one on; from 4, where there is none, they have a window that nothing slides by."""
    window = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": first_sliding}
    return Qwen2ForCausalLM(Qwen2Config(**sizes(), **window))


def _opt() -> OPTForCausalLM:
    own = {k: v for k, v in sizes().items() if k not in ("intermediate_size", "num_key_value_heads")}
    return OPTForCausalLM(OPTConfig(**own, ffn_dim=48, word_embed_proj_dim=32, init_std=0.3))


TEXT: Mapping[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes())),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**sizes(), sliding_window=WINDOW)),
    "qwen2": qwen2,
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**sizes(), head_dim=8)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**sizes(), sliding_window=WINDOW)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**sizes(), head_dim=8)),
    "gemma2": _gemma2,
    "gemma3": lambda: loud(Gemma3ForCausalLM(Gemma3TextConfig(**sizes(), **_sliding(2), head_dim=8))),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_older())),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**_older(), rotary_dim=4)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**sizes())),
    "opt": _opt,
    "phi": lambda: PhiForCausalLM(PhiConfig(**sizes())),
}
