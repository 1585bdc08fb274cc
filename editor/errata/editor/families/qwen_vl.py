"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size, positions in three dimensions.

Qwen2VLForConditionalGeneration
├── model
│   ├── visual
│   └── language_model        as Llama's `model`; in Qwen3-VL image features join after its first layers, too
└── lm_head
"""

from dataclasses import replace

from errata.editor.families.llama import LLAMA

QWEN_VL = replace(
    LLAMA,
    architectures=(
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
    ),
    decoder="model.language_model",
    image_token="image_token_id",
)
