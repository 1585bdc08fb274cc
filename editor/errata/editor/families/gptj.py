"""GPT-J: attention and MLP side by side on one norm, and an attention of its own.

GPTJForCausalLM
├── transformer
│   ├── wte
│   ├── h[i]
│   │   ├── attn (q_proj, k_proj, v_proj, out_proj)
│   │   └── mlp (fc_in, fc_out)
│   └── ln_f
└── lm_head
"""

from errata.editor.families.base import ModelFamily

GPTJ = ModelFamily(
    architectures=("GPTJForCausalLM",),
    decoder="transformer",
    layers="h",
    final_norm="ln_f",
    attention="attn",
    attention_output="attn.out_proj",
    mlp="mlp",
    down_projection="mlp.fc_out",
)
