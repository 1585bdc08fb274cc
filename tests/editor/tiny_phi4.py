"""A tiny Phi-4-multimodal: 545 tokens an image, which is the fewest that its processor can count."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tiny_text import sizes
from tiny_tokenizer import tokenizer_with
from torch.nn.functional import interpolate
from transformers import (
    BaseImageProcessor,
    BatchFeature,
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    Phi4MultimodalProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

SIDE = 64
"""Pixels of a side of what the tower sees: 32 patches of 2."""


class SquareImages(BaseImageProcessor):
    """What Phi-4's image processor makes of a square image of at most SIDE pixels: where torchvision is not installed
    it cannot be had.
    """

    def __call__(self, images: Sequence[Image.Image], **_: object) -> BatchFeature:
        patches = SIDE // 2
        pixels = torch.stack([_resized(image) / 127.5 - 1 for image in images])
        data = {
            "image_pixel_values": torch.stack([pixels, pixels], dim=1),  # the whole image, and its only part
            "image_sizes": torch.full((len(images), 2), SIDE),
            "image_attention_mask": torch.ones(len(images), 2, patches, patches),
            "num_img_tokens": [2 * patches**2 // 4 + 2 * patches // 2 + 1] * len(images),
        }
        return BatchFeature(data)


def _resized(image: Image.Image) -> torch.Tensor:
    assert image.width == image.height <= SIDE
    pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]
    return interpolate(pixels, size=[SIDE, SIDE], mode="bilinear", antialias=True)[0]


def image_processor() -> Any:
    """The model's own where it can be had."""
    if find_spec("torchvision") is None:
        return SquareImages()
    return transformers.Phi4MultimodalImageProcessor(size={"height": SIDE, "width": SIDE}, patch_size=2)


def phi4_multimodal(chat_template: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    words = tokenizer_with(image_token="<image>", audio_token="<audio>")
    image, audio = words.convert_tokens_to_ids(["<image>", "<audio>"])
    narrow = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    convolved = dict.fromkeys(
        ("ext_pw_out_channel", "depthwise_separable_out_channel", "nemo_conv_channels", "bias_max_distance"), 8
    )
    config = Phi4MultimodalConfig(
        **{**sizes(), "vocab_size": len(words), "max_position_embeddings": 1024},
        vision_config={
            **narrow,
            "num_hidden_layers": 2,
            "image_size": SIDE,
            "crop_size": SIDE,
            "patch_size": 2,
            "image_token_id": image,
        },
        audio_config={**narrow, **convolved, "num_blocks": 1, "audio_token_id": audio},
    )
    processor = Phi4MultimodalProcessor(
        image_processor=image_processor(),
        audio_processor=Phi4MultimodalFeatureExtractor(),
        tokenizer=words,
        chat_template=chat_template,
    )
    return Phi4MultimodalForCausalLM(config), processor
