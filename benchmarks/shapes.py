"""Untrained models in the shapes of those that are edited, built from a config, with Atlas's tokenizer."""

import math
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
)

from errata.editor.checkpoints import ATLAS, hash_tensors, load_model
from errata.editor.families import family_of
from errata.editor.model import EditableModel

_PATCH = 14


def llava(width: int, layers: int, image_tokens: int = 576) -> EditableModel:
    """LLaVA-1.5's shape: a picture of so many tokens before the text. The tower is small: no method saves there."""
    tokenizer: Any = load_model(ATLAS).tokenizer
    side = math.isqrt(image_tokens) * _PATCH
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=side,
            patch_size=_PATCH,
            initializer_range=0.3,
        ),
        text_config=_llama(len(tokenizer), width, layers),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"height": side, "width": side}, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=load_model(ATLAS).processor.chat_template,
    )
    return _editable(LlavaForConditionalGeneration, config, processor)


def llama(width: int, layers: int) -> EditableModel:
    """Llama's shape."""
    tokenizer = load_model(ATLAS).tokenizer
    return _editable(LlamaForCausalLM, _llama(len(tokenizer), width, layers), tokenizer)


def gpt2(width: int = 768, layers: int = 12, vocabulary: int = 50257) -> EditableModel:
    """GPT-2 small's shape. Of its vocabulary it says only what the tokenizer knows."""
    tokenizer = load_model(ATLAS).tokenizer
    config = GPT2Config(
        n_embd=width, n_layer=layers, n_head=width // 64, vocab_size=vocabulary, initializer_range=0.06,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = _editable(GPT2LMHeadModel, config, tokenizer)
    with torch.no_grad():
        cast(nn.Embedding, model.model.get_input_embeddings()).weight[len(cast(Any, tokenizer)) :] = 0
    return model


def picture(model: EditableModel, seed: int) -> Image.Image:
    """Noise of the size that the model's tower takes."""
    side = model.model.config.vision_config.image_size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def _llama(vocabulary: int, width: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=2048,
        initializer_range=0.06,
    )


def _editable(cls: type[PreTrainedModel], config: Any, processor: Any) -> EditableModel:
    torch.manual_seed(0)
    model = cls(config).eval().requires_grad_(False)
    return EditableModel(
        name="untrained",
        model=model,
        processor=processor,
        family=family_of(model),
        base_sha256=hash_tensors(model.state_dict().items()),
    )
