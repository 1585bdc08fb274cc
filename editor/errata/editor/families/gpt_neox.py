"""GPT-NeoX and Pythia: attention and MLP side by side.

GPTNeoXForCausalLM
├── gpt_neox
│   ├── embed_in
│   ├── layers[i]
│   │   ├── attention (query_key_value, dense)
│   │   └── mlp (dense_h_to_4h, dense_4h_to_h)
│   └── final_layer_norm
└── lm_head
"""

from errata.editor.families.base import ModelFamily

GPT_NEOX = ModelFamily(
    architectures=("GPTNeoXForCausalLM",),
    decoder="gpt_neox",
    layers="layers",
    final_norm="final_layer_norm",
    attention="attention",
    attention_output="attention.dense",
    mlp="mlp",
    down_projection="mlp.dense_4h_to_h",
)
