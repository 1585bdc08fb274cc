"""OPT, whose layers hold the MLP's maps themselves. Not OPT-350m, which has no norm before its head.

OPTForCausalLM
├── model.decoder
│   ├── embed_tokens, embed_positions
│   ├── layers[i]
│   │   ├── self_attn (q_proj, k_proj, v_proj, out_proj)
│   │   └── fc1, fc2
│   └── final_layer_norm
└── lm_head
"""

from errata.editor.families.base import ModelFamily

OPT = ModelFamily(
    architectures=("OPTForCausalLM",),
    decoder="model.decoder",
    layers="layers",
    final_norm="final_layer_norm",
    attention="self_attn",
    attention_output="self_attn.out_proj",
    mlp="fc2",
    down_projection="fc2",
)
