"""GPT-2, whose linear maps are `Conv1D`: weights stored transposed.

GPT2LMHeadModel
├── transformer
│   ├── wte, wpe
│   ├── h[i]
│   │   ├── attn (c_attn, c_proj)
│   │   └── mlp (c_fc, c_proj)
│   └── ln_f
└── lm_head
"""

from errata.editor.families.base import ModelFamily

GPT2 = ModelFamily(
    architectures=("GPT2LMHeadModel",),
    decoder="transformer",
    layers="h",
    final_norm="ln_f",
    attention="attn",
    attention_output="attn.c_proj",
    mlp="mlp",
    down_projection="mlp.c_proj",
)
