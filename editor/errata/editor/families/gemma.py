"""Gemma 2 and 3, with and without images, and PaliGemma.

Gemma2ForCausalLM
└── model.layers[i]           Llama's tree, and norms between attention, MLP and the residual stream
    ├── self_attn, post_attention_layernorm
    └── mlp, post_feedforward_layernorm

Gemma3ForConditionalGeneration, PaliGemmaForConditionalGeneration
└── model
    ├── vision_tower, multi_modal_projector
    └── language_model        as `model` above; in PaliGemma that of Gemma or Gemma 2

Tokens of one image see one another; in PaliGemma all tokens of image and prompt do.
"""

from dataclasses import replace

from errata.editor.families.llama import LLAMA

GEMMA = replace(
    LLAMA,
    architectures=("Gemma2ForCausalLM", "Gemma3ForCausalLM"),
    mlp_norm="post_feedforward_layernorm",
)

GEMMA_VISION = replace(
    GEMMA,
    architectures=("Gemma3ForConditionalGeneration",),
    decoder="model.language_model",
    image_token="image_token_id",
)

PALIGEMMA = replace(GEMMA_VISION, architectures=("PaliGemmaForConditionalGeneration",), answer_token_type=1)
