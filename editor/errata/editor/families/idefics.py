"""Idefics3 and SmolVLM: an image is cut into parts, each with tokens of its own that say where it was.

Idefics3ForConditionalGeneration
├── model
│   ├── vision_model, connector
│   └── text_model            as Llama's `model`
└── lm_head
"""

from dataclasses import replace

from errata.editor.families.llama import LLAMA

IDEFICS = replace(
    LLAMA,
    architectures=("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"),
    decoder="model.text_model",
    image_token="image_token_id",
)
