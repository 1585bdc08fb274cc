"""Tiny models of every family, built from a config, with a real tokenizer and processor. Untrained."""

from dataclasses import replace

import torch
from PIL import Image
from tiny_text import TEXT, qwen2
from tiny_tokenizer import tokenizer
from tiny_vision import PATCHES, VISION
from transformers import PreTrainedModel

from errata.editor.checkpoints import hash_tensors
from errata.editor.delta import Delta, LowRank
from errata.editor.families import family_of
from errata.editor.model import EditableModel
from errata.editor.prompts import Constraint, Prompt
from errata.editor.requests import Context

__all__ = ["ARCHITECTURES", "FAMILIES", "PATCHES", "tiny_model", "tokenizer"]

FAMILIES = ("llava", "llama", "gpt2")
"""The kinds that the tests of the editor run on; tests/conformance runs on every one of ARCHITECTURES."""

ARCHITECTURES = (*VISION, *TEXT)


def _build(family: str) -> tuple[PreTrainedModel, object]:
    if family in VISION:
        return VISION[family]()
    return TEXT[family](), tokenizer()


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


def whole_window_model() -> EditableModel:
    """A model whose config has a window that none of its layers slides by."""
    torch.manual_seed(0)
    return replace(tiny_model("qwen2"), model=qwen2(first_sliding=4).eval().requires_grad_(False))


def weights_sha256(model: EditableModel) -> str:
    return hash_tensors(model.model.state_dict().items())


def picture(seed: int = 0) -> Image.Image:
    """Noise: two seeds give two pictures that share nothing."""
    pixels = torch.randint(0, 256, (24, 24, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def question(model: EditableModel, text: str = "What is the capital of this country?", seed: int = 0) -> Prompt:
    """A prompt with one picture where the family takes one."""
    return Prompt(text=text, images=() if model.image_token_id is None else (picture(seed),))


def said(model: EditableModel, prompt: Prompt) -> str:
    """What the model says, as the answer to measure: an untrained one never comes to an end by itself."""
    return model.generate([prompt])[0].text


def context(
    model: EditableModel, text: str = "What is the capital of this country?", span: str = "this country", seed: int = 0
) -> Context:
    return Context(prompt=question(model, text, seed), constraint=Constraint(text=span))


def random_delta(
    model: EditableModel, ranks: dict[int, int], seed: int = 0, size: float = 0.2, inner: int = 48
) -> Delta:
    """A delta of the given rank at each layer, large enough to change answers."""
    random = torch.Generator().manual_seed(seed)
    lows = {
        i: LowRank(a=torch.randn(r, inner, generator=random) * size, b=torch.randn(32, r, generator=random) * size)
        for i, r in ranks.items()
    }
    return Delta(base_sha256=model.base_sha256, layers=lows, modules={i: model.down_projection_name(i) for i in ranks})
