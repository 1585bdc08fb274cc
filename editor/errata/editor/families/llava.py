"""LLaVA-1.5: a CLIP tower and a Llama decoder.

LlavaForConditionalGeneration
├── model
│   ├── vision_tower, multi_modal_projector
│   └── language_model        as Llama's `model`
└── lm_head

The processor expands each `<image>` of the prompt to as many image tokens as the tower has patches.
"""

from dataclasses import replace

from errata.editor.families.llama import LLAMA

LLAVA = replace(
    LLAMA,
    architectures=("LlavaForConditionalGeneration",),
    decoder="model.language_model",
    image_token="image_token_id",
)
