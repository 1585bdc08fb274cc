"""What a model's context holds: past it every architecture refuses a prompt, up to it every one answers."""

from dataclasses import replace

import pytest
import torch
from tiny import picture, tiny_model
from tiny_text import sizes
from tiny_tokenizer import tokenizer
from transformers import Phi3Config, Phi3ForCausalLM

from errata.editor.errors import PromptError
from errata.editor.model import EditableModel
from errata.editor.prompts import Prompt

# PaliGemma's processor makes arrays of tensors in a way that NumPy 2 asks it not to.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

WORD = " capital"
"""One token."""


def of_length(model: EditableModel, tokens: int) -> Prompt:
    """A prompt of so many tokens, and one image where the model takes any."""
    prompt = Prompt(text="What", images=() if model.image_token_id is None else (picture(),), chat=False)
    more = tokens - len(model.encode(prompt).ids)
    return replace(prompt, text=prompt.text + WORD * more)


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(model: EditableModel) -> None:
    holds = model.context_length
    assert holds == model.model.config.get_text_config().max_position_embeddings
    long = of_length(model, holds + 1)
    with pytest.raises(PromptError, match=rf"has {holds + 1} tokens.*holds {holds} "):
        model.encode(long)
    with pytest.raises(PromptError, match=rf"has {holds} tokens.*holds {holds} "):
        model.generate([of_length(model, holds)])
    with pytest.raises(PromptError, match=rf"has {holds - 1} tokens.*its answer \d.*holds {holds};"):
        model.encode(of_length(model, holds - 1), "the capital")


def test_the_longest_prompt_is_answered_by_the_one_token_that_fits(model: EditableModel) -> None:
    holds = model.context_length
    assert holds is not None
    (answer,) = model.generate([of_length(model, holds - 1)])
    assert len(answer.tokens) <= 1


def test_a_context_ends_where_positions_would_be_read_otherwise() -> None:
    """Phi-3's long factors turn every position as soon as one row of a batch is past its first length."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 16.0, **factors}
    torch.manual_seed(0)
    built = Phi3ForCausalLM(Phi3Config(**sizes(), rope_parameters=rope, original_max_position_embeddings=16))
    model = replace(tiny_model("phi3"), model=built.eval().requires_grad_(False), processor=tokenizer())
    with pytest.raises(PromptError, match=r"has 17 tokens.*holds 16 "):
        model.encode(of_length(model, 17))
    (answer,) = model.generate([of_length(model, 12)], max_new_tokens=9)
    assert len(answer.tokens) == 4 or answer.finished


def test_tokens_of_images_count() -> None:
    model = tiny_model("phi4_multimodal")
    with pytest.raises(PromptError, match=r"has 109\d tokens, those of images included.*holds 1024 "):
        model.encode(Prompt(text="Where?", images=(picture(0), picture(1)), chat=False))
