"""Llama, and the families that share its tree: Vicuna, Mistral, Qwen2, Qwen3, Phi-3, Gemma.

LlamaForCausalLM
├── model
│   ├── embed_tokens
│   ├── layers[i]
│   │   ├── self_attn (q_proj, k_proj, v_proj, o_proj)     Phi-3: qkv_proj, o_proj
│   │   └── mlp (gate_proj, up_proj, down_proj)            Phi-3: gate_up_proj, down_proj
│   └── norm
└── lm_head
"""

from errata.editor.families.base import ModelFamily

LLAMA = ModelFamily(
    architectures=(
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Phi3ForCausalLM",
        "GemmaForCausalLM",
    ),
    decoder="model",
    layers="layers",
    final_norm="norm",
    attention="self_attn",
    attention_output="self_attn.o_proj",
    mlp="mlp",
    down_projection="mlp.down_proj",
)
