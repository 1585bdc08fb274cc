"""Llama.

LlamaForCausalLM
├── model
│   ├── embed_tokens
│   ├── layers[i]
│   │   ├── self_attn (q_proj, k_proj, v_proj, o_proj)
│   │   └── mlp (gate_proj, up_proj, down_proj)
│   └── norm
└── lm_head
"""

from errata.editor.families.base import ModelFamily

LLAMA = ModelFamily(
    architectures=("LlamaForCausalLM",),
    decoder="model",
    layers="layers",
    final_norm="norm",
    attention="self_attn",
    attention_output="self_attn.o_proj",
    mlp="mlp",
    down_projection="mlp.down_proj",
)
