"""Phi-4-multimodal: Phi-3's tree, with the towers for images and speech among its embeddings.

Phi4MultimodalForCausalLM
├── model
│   ├── embed_tokens
│   ├── embed_tokens_extend   image_embed, audio_embed
│   ├── layers[i]
│   │   ├── self_attn (qkv_proj, o_proj)
│   │   └── mlp (gate_up_proj, down_proj)
│   └── norm
└── lm_head
"""

from dataclasses import replace

from errata.editor.families.llama import LLAMA

PHI4 = replace(LLAMA, architectures=("Phi4MultimodalForCausalLM",), image_token="vision_config.image_token_id")
