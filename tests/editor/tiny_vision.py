"""Tiny vision-language models, one an architecture, with processors built from their classes."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import transformers
from tiny_phi4 import phi4_multimodal
from tiny_text import WINDOW, loud, sizes
from tiny_tokenizer import tokenizer, tokenizer_with
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

PATCHES = 9
"""Tokens of one image of LLaVA-1.5: 24 pixels in patches of 8, squared."""

Built = tuple[PreTrainedModel, ProcessorMixin]

_TOWER: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_PINPOINTS = [[24, 48], [48, 24]]


def _template(image: str = "<image>") -> str:
    return (
        "{% for m in messages %}USER: {% for p in m['content'] %}{% if p['type'] == 'image' %}" + image + "\n"
        "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    )


def _with_videos(cls: type[Any], videos: str) -> Callable[..., ProcessorMixin]:
    """The processor with its part for videos; without it where torchvision, which that part needs, is not installed."""
    if find_spec("torchvision") is not None:
        return partial(cls, video_processor=getattr(transformers, videos)())

    def taken(_self: object, _name: str, _argument: object) -> None:
        return None

    processor: type[ProcessorMixin] = type(cls.__name__, (cls,), {"check_argument_for_proper_class": taken})
    return processor


def _clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(**_TOWER, image_size=24, patch_size=8, initializer_range=0.3)


def _siglip() -> SiglipVisionConfig:
    return SiglipVisionConfig(**_TOWER, image_size=24, patch_size=8)


def _image_id(words: PreTrainedTokenizerFast) -> int:
    return int(words.convert_tokens_to_ids("<image>"))


def _llava() -> Built:
    config = LlavaConfig(
        vision_config=_clip(),
        text_config=LlamaConfig(**sizes()),
        image_token_id=_image_id(tokenizer()),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"height": 24, "width": 24}, do_center_crop=False),
        tokenizer=tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template(),
    )
    return LlavaForConditionalGeneration(config), processor


def _llava_next() -> Built:
    config = LlavaNextConfig(
        vision_config=_clip(),
        text_config=LlamaConfig(**sizes()),
        image_token_index=_image_id(tokenizer()),
        image_grid_pinpoints=_PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}, image_grid_pinpoints=_PINPOINTS
        ),
        tokenizer=tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template(),
    )
    return LlavaNextForConditionalGeneration(config), processor


def _llava_onevision() -> Built:
    words = tokenizer_with(image_token="<image>", video_token="<video>")
    config = LlavaOnevisionConfig(
        vision_config=_siglip(),
        text_config={**sizes(), "model_type": "qwen2", "vocab_size": len(words)},
        image_token_index=_image_id(words),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=_PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    processor = _with_videos(LlavaOnevisionProcessor, "LlavaOnevisionVideoProcessor")(
        image_processor=LlavaOnevisionImageProcessorPil(
            size={"height": 24, "width": 24}, image_grid_pinpoints=_PINPOINTS
        ),
        tokenizer=words,
        num_image_tokens=9,
        vision_feature_select_strategy="full",
        chat_template=_template(),
    )
    return LlavaOnevisionForConditionalGeneration(config), processor


def _qwen_vl(kind: str, vision: dict[str, Any], **rope: Any) -> dict[str, Any]:
    """The parts of a config that the Qwen-VL models share."""
    words = _qwen_tokens()
    text = {**sizes(), "vocab_size": len(words), "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **rope}}
    if kind == "qwen3_vl":
        text["head_dim"] = 8
    ids = {
        f"{name}_token_id": words.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    tower = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_heads": 2, "depth": 2, **vision}
    return {"text_config": text, "vision_config": tower, **ids}


def _qwen_tokens() -> PreTrainedTokenizerFast:
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    return tokenizer_with(**{f"{name}_token": f"<|{name}|>" for name in names})


def _qwen_processor(cls: type[Any], videos: str = "Qwen2VLVideoProcessor") -> ProcessorMixin:
    return _with_videos(cls, videos)(
        image_processor=Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 4096}
        ),
        tokenizer=_qwen_tokens(),
        chat_template=_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )


def _qwen2_vl() -> Built:
    parts = _qwen_vl("qwen2_vl", {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}, mrope_section=[1, 1, 2])
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(**parts)), _qwen_processor(Qwen2VLProcessor)


def _qwen2_5_vl() -> Built:
    vision = {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "window_size": 16}
    parts = _qwen_vl("qwen2_5_vl", {**vision, "fullatt_block_indexes": [1]}, mrope_section=[1, 1, 2])
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**parts)), _qwen_processor(Qwen2_5_VLProcessor)


def _qwen3_vl() -> Built:
    vision = {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "num_position_embeddings": 36}
    stack = {**vision, "deepstack_visual_indexes": [0, 1]}
    parts = _qwen_vl("qwen3_vl", stack, mrope_section=[2, 1, 1], mrope_interleaved=True)
    processor = _qwen_processor(Qwen3VLProcessor, "Qwen3VLVideoProcessor")
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(**parts)), processor


def _gemma3() -> Built:
    words = tokenizer_with(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>")
    types = ["sliding_attention", "full_attention"] * 2
    text = {**sizes(), "vocab_size": len(words), "head_dim": 8, "sliding_window": WINDOW, "layer_types": types}
    config = Gemma3Config(
        text_config=text,
        vision_config=_siglip(),
        mm_tokens_per_image=9,
        image_token_index=_image_id(words),
        boi_token_index=words.convert_tokens_to_ids("<boi>"),
        eoi_token_index=words.convert_tokens_to_ids("<eoi>"),
        eos_token_id=2,
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessorPil(size={"height": 24, "width": 24}),
        tokenizer=words,
        image_seq_length=9,
        chat_template=_template("<boi>"),
    )
    return loud(Gemma3ForConditionalGeneration(config)), processor


def _paligemma() -> Built:
    return _paligemma_on({"model_type": "gemma"})


def _paligemma2() -> Built:
    model, processor = _paligemma_on({"model_type": "gemma2", "query_pre_attn_scalar": 8, "sliding_window": WINDOW})
    return loud(model), processor


def _paligemma_on(text: dict[str, Any]) -> Built:
    image_processor = SiglipImageProcessorPil(size={"height": 24, "width": 24})
    image_processor.image_seq_length = 9
    words = tokenizer_with(begins=False, image_token="<image>")
    processor = PaliGemmaProcessor(image_processor=image_processor, tokenizer=words)
    config = PaliGemmaConfig(
        text_config={**sizes(), **text, "vocab_size": len(words), "head_dim": 8},
        vision_config=_siglip(),
        projection_dim=32,
        image_token_index=_image_id(words),
    )
    return PaliGemmaForConditionalGeneration(config), processor


def _idefics3() -> Built:
    return _idefics(Idefics3ForConditionalGeneration, Idefics3Config)


def _smolvlm() -> Built:
    """With Idefics3's processor: its own does the same for images, and needs a package that Errata does not."""
    return _idefics(SmolVLMForConditionalGeneration, SmolVLMConfig)


def _idefics(model: type[Any], config: type[Any]) -> Built:
    tags = {f"row_{i}_col_{j}_token": f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)}
    ends = {
        "fake_token": "<fake_token_around_image>",
        "global_token": "<global-img>",
        "end_token": "<end_of_utterance>",
    }
    words = tokenizer_with(image_token="<image>", **ends, **tags)
    text = {**sizes(), "model_type": "llama", "vocab_size": len(words)}
    tower = {**_TOWER, "image_size": 24, "patch_size": 4}
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(size={"longest_edge": 48}, max_image_size={"longest_edge": 24}),
        tokenizer=words,
        image_seq_len=9,
        chat_template=_template(),
    )
    parts = {"text_config": text, "vision_config": tower, "image_token_id": _image_id(words), "scale_factor": 2}
    return model(config(**parts)), processor


def _internvl() -> Built:
    words = tokenizer_with(
        context_image_token="<IMG_CONTEXT>", start_image_token="<img>", end_image_token="</img>", video_token="<video>"
    )
    config = InternVLConfig(
        text_config={**sizes(), "model_type": "qwen2", "vocab_size": len(words)},
        vision_config={**_TOWER, "image_size": [24, 24], "patch_size": [4, 4], "initializer_range": 0.3},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=9,
    )
    processor = _with_videos(InternVLProcessor, "InternVLVideoProcessor")(
        image_processor=GotOcr2ImageProcessorPil(size={"height": 24, "width": 24}, crop_to_patches=True, max_patches=2),
        tokenizer=words,
        image_seq_length=9,
        chat_template=_template("<IMG_CONTEXT>"),
    )
    return InternVLForConditionalGeneration(config), processor


VISION: Mapping[str, Callable[[], Built]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "gemma3_vision": _gemma3,
    "paligemma": _paligemma,
    "paligemma2": _paligemma2,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "internvl": _internvl,
    "phi4_multimodal": lambda: phi4_multimodal(_template()),
}

NEED_TORCHVISION = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "phi4_multimodal")
"""Those whose processors are not read without it: most have a part for videos, too."""
