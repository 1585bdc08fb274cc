"""Tiny models of every family, built from a config, with a real tokenizer and processor. Untrained."""

from functools import cache

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
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
    PreTrainedTokenizerFast,
)

from errata.editor.checkpoints import hash_tensors
from errata.editor.delta import Delta, LowRank
from errata.editor.families import family_of
from errata.editor.model import EditableModel
from errata.editor.prompts import Constraint, Prompt
from errata.editor.requests import Context

FAMILIES = ("llava", "llama", "gpt2")
PATCHES = 9
"""Tokens of one image: 24 pixels in patches of 8, squared."""

_TEMPLATE = (
    "{% for m in messages %}USER: {% for p in m['content'] %}{% if p['type'] == 'image' %}<image>\n"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["What is the capital of this country?", " Paris", " Rome", "The Space Needle is in", "USER: \n ASSISTANT:"]
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )


def _llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def _build(family: str) -> tuple[PreTrainedModel, object]:
    match family:
        case "gpt2":
            config = GPT2Config(
                vocab_size=len(tokenizer()), n_embd=32, n_layer=4, n_head=4, n_inner=48, n_positions=256,
                initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
            )  # fmt: skip
            return GPT2LMHeadModel(config), tokenizer()
        case "llama":
            return LlamaForCausalLM(_llama_config()), tokenizer()
        case _:
            vision = CLIPVisionConfig(
                hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                image_size=24, patch_size=8, initializer_range=0.3,
            )  # fmt: skip
            config = LlavaConfig(
                vision_config=vision,
                text_config=_llama_config(),
                image_token_id=tokenizer().convert_tokens_to_ids("<image>"),
                vision_feature_layer=-1,
                vision_feature_select_strategy="default",
            )
            processor = LlavaProcessor(
                image_processor=CLIPImageProcessorPil(size={"height": 24, "width": 24}, do_center_crop=False),
                tokenizer=tokenizer(),
                patch_size=8,
                vision_feature_select_strategy="default",
                num_additional_image_tokens=1,
                chat_template=_TEMPLATE,
            )
            return LlavaForConditionalGeneration(config), processor


def tiny_model(family: str, seed: int = 0) -> EditableModel:
    """A fresh untrained model of a family; the same seed gives the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, processor = _build(family)
    model.eval().requires_grad_(False)
    return EditableModel(
        name=f"tiny-{family}",
        model=model,
        processor=processor,
        family=family_of(model),
        base_sha256=hash_tensors(model.state_dict().items()),
    )


def weights_sha256(model: EditableModel) -> str:
    return hash_tensors(model.model.state_dict().items())


def picture(seed: int = 0) -> Image.Image:
    """Noise: two seeds give two pictures that share nothing."""
    pixels = torch.randint(0, 256, (24, 24, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def question(model: EditableModel, text: str = "What is the capital of this country?", seed: int = 0) -> Prompt:
    """A prompt with one picture where the family takes one."""
    return Prompt(text=text, images=() if model.image_token_id is None else (picture(seed),))


def context(
    model: EditableModel, text: str = "What is the capital of this country?", span: str = "this country", seed: int = 0
) -> Context:
    return Context(prompt=question(model, text, seed), constraint=Constraint(text=span))


def random_delta(model: EditableModel, ranks: dict[int, int], seed: int = 0, size: float = 0.2) -> Delta:
    """A delta of the given rank at each layer, large enough to change answers."""
    random = torch.Generator().manual_seed(seed)
    lows = {
        i: LowRank(a=torch.randn(r, 48, generator=random) * size, b=torch.randn(32, r, generator=random) * size)
        for i, r in ranks.items()
    }
    return Delta(base_sha256=model.base_sha256, layers=lows, modules={i: model.down_projection_name(i) for i in ranks})
