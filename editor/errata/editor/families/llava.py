"""LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision and InternVL: a tower, a projector and a text decoder of Llama's tree.

LlavaForConditionalGeneration
├── model
│   ├── vision_tower, multi_modal_projector
│   └── language_model        as Llama's `model`, or as Gemma's
└── lm_head

The processor expands the placeholder of each image to as many image tokens as the tower makes of it.
"""

from dataclasses import replace

from errata.editor.families.llama import LLAMA

LLAVA = replace(
    LLAMA,
    architectures=(
        "LlavaForConditionalGeneration",
        "LlavaNextForConditionalGeneration",
        "LlavaOnevisionForConditionalGeneration",
        "InternVLForConditionalGeneration",
    ),
    decoder="model.language_model",
    mlp_norm="post_feedforward_layernorm",
    image_token="image_token_id",
)
