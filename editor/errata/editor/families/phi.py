"""Phi-1, Phi-1.5 and Phi-2: attention and MLP side by side on one norm.

PhiForCausalLM
├── model
│   ├── embed_tokens
│   ├── layers[i]
│   │   ├── self_attn (q_proj, k_proj, v_proj, dense)
│   │   └── mlp (fc1, fc2)
│   └── final_layernorm
└── lm_head
"""

from errata.editor.families.base import ModelFamily

PHI = ModelFamily(
    architectures=("PhiForCausalLM",),
    decoder="model",
    layers="layers",
    final_norm="final_layernorm",
    attention="self_attn",
    attention_output="self_attn.dense",
    mlp="mlp",
    down_projection="mlp.fc2",
)
