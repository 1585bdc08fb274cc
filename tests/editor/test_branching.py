"""Trunks: rows that begin alike are read once, and are what the full model makes of each (module `branching`)."""

import gc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from tiny import picture, question, tiny_model, whole_window_model

from errata.editor.answering import answer_rows
from errata.editor.branching import Trunk, forget_below, trunks_of
from errata.editor.errors import InvalidInputError, MemoryLimitError
from errata.editor.memory import Memory
from errata.editor.model import EditableModel, Encoded
from errata.editor.prompts import Prompt
from errata.editor.recording import Recording, record
from errata.editor.states import Component, logits_of
from errata.editor.suffix import Suffix

LONG = "What is the capital of this country? " * 8
TEXTS = ("What is it?", "Where is the capital of this country?", "Is it that?", "Where?")


def asked(model: EditableModel) -> list[Prompt]:
    """Two pictures with four questions each; of a text model, questions behind one long text."""
    if model.image_token_id is None:
        return [Prompt(text=LONG + text, chat=False) for text in TEXTS]
    # Pictures are small here: the text behind them makes a trunk worth its pass.
    return [question(model, LONG + text, seed) for seed in (0, 1) for text in TEXTS]


def trunked(model: EditableModel) -> tuple[list[Encoded], list[int], list[Trunk | None]]:
    """Rows with answers of several lengths, the tokens they are kept from, and their trunks."""
    answers = ("Rome", "the capital of Rome", "Rome Rome")
    rows = [model.encode(prompt, answers[n % 3]) for n, prompt in enumerate(asked(model))]
    starts = [row.prompt_length - 1 - n % 3 for n, row in enumerate(rows)]
    return rows, starts, trunks_of(model, rows, starts)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


def climbed(
    model: EditableModel,
    recordings: Sequence[Recording],
    starts: Sequence[int],
    layer: int,
    packed: Sequence[int] | None = None,
) -> list[torch.Tensor]:
    with Suffix(model, recordings, starts, packed) as suffix, torch.no_grad():
        hidden = suffix.outputs(layer - 1)
        for index in range(layer, len(model.layers)):
            hidden = suffix.run(index, hidden)
        logits = logits_of(model, hidden)
    return [logits[row, span] for row, span in suffix.spans]


def test_rows_behind_a_trunk_are_recorded_as_the_full_model_runs_them(model: EditableModel) -> None:
    rows, starts, trunks = trunked(model)
    assert all(trunk and trunk.tokens > 20 for trunk in trunks)
    assert len({id(trunk) for trunk in trunks}) == len(rows) // len(TEXTS)
    found = record(model, rows, starts, components=tuple(Component), key_layers=(1,), trunks=trunks)
    for row, start, recording in zip(rows, starts, found, strict=True):
        states = oracle.outputs(model, row, [c.value for c in Component])
        for (component, index), expected in states.items():
            close(recording.outputs[Component(component)][index], expected[start:])
        for index in range(1, len(model.layers)):
            close(recording.inputs[index], states["layer", index - 1][start:])
        close(recording.keys[1], oracle.keys(model, row, 1)[start:])


@pytest.mark.parametrize("layer", [1, 3])
@pytest.mark.parametrize("picked", [slice(None), slice(1, 4), slice(2, None)])
def test_rows_go_on_behind_their_trunks_as_the_full_model_does(model: EditableModel, layer: int, picked: slice) -> None:
    """With as many rows behind every trunk, with one trunk, and with more behind one than behind another."""
    rows, starts, trunks = trunked(model)
    recordings = record(model, rows, starts, trunks=trunks, lowest=layer)
    forget_below(trunks, layer)
    for row, start, found in zip(
        rows[picked], starts[picked], climbed(model, recordings[picked], starts[picked], layer), strict=True
    ):
        close(found, oracle.logits(model, row)[start:])


# PaliGemma's processor makes arrays of tensors in a way that NumPy 2 asks it not to.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", ["gemma3_vision", "paligemma2", "qwen3_vl", "llava_next", "mistral", "gptj", "opt"])
def test_whatever_an_architecture_sees_its_rows_go_on_as_the_full_model_does(name: str) -> None:
    """Windows that slide, positions in three dimensions, features between layers, and prompts that see all of them.

    Each in a row of its own, and all of one picture in one.
    """
    model = tiny_model(name)
    rows, starts, trunks = trunked(model)
    assert [trunk is None for trunk in trunks] == [name == "paligemma2"] * len(rows)
    recordings = record(model, rows, starts, trunks=trunks)
    for packed in (None, [len(TEXTS)] * 2):
        for row, start, found in zip(rows, starts, climbed(model, recordings, starts, 1, packed), strict=True):
            close(found, oracle.logits(model, row)[start:])


@pytest.mark.parametrize("packed", [[len(TEXTS)] * 2, [1, len(TEXTS) - 1, 2, len(TEXTS) - 2]])
def test_rows_packed_behind_their_trunk_see_nothing_of_one_another(model: EditableModel, packed: list[int]) -> None:
    rows, starts, trunks = trunked(model)
    recordings = record(model, rows, starts, trunks=trunks)
    for row, start, found in zip(rows, starts, climbed(model, recordings, starts, 1, packed), strict=True):
        close(found, oracle.logits(model, row)[start:])


def test_rows_with_and_without_a_trunk_go_on_together(model: EditableModel) -> None:
    rows, starts, trunks = trunked(model)
    recordings = record(model, rows, starts, trunks=[None, *trunks[1:]])
    for row, start, found in zip(rows, starts, climbed(model, recordings, starts, 1), strict=True):
        close(found, oracle.logits(model, row)[start:])


def test_a_run_keeps_nothing_of_the_layers_below_the_lowest(llava: EditableModel) -> None:
    rows, starts, trunks = trunked(llava)
    recordings = record(llava, rows, starts, trunks=trunks, lowest=2)
    forget_below(trunks, 2)
    assert all(set(r.kv) == {2, 3} for r in recordings)
    assert all(t and set(t.stack) == {2, 3} for t in trunks)


def test_rows_that_share_too_little_or_another_picture_are_read_whole(llava: EditableModel) -> None:
    few = [llava.encode(question(llava, text)) for text in TEXTS[:2]]
    other = [llava.encode(question(llava, LONG, seed)) for seed in (0, 1)]
    for rows in (few, other):
        assert trunks_of(llava, rows, [row.prompt_length - 1 for row in rows]) == [None, None]


def test_rows_whose_states_are_wanted_from_within_the_picture_are_read_whole(llava: EditableModel) -> None:
    rows = [llava.encode(prompt) for prompt in asked(llava)]
    assert trunks_of(llava, rows, [row.images[0].stop - 1 for row in rows]) == [None] * len(rows)


@pytest.mark.parametrize("draft", ["", "Rome", "own", "beginning"])
def test_answers_are_those_the_model_generates_whatever_the_drafts(model: EditableModel, draft: str) -> None:
    prompts = [*asked(model), *(question(model, text, 5) for text in TEXTS)]
    expected = model.generate(prompts, max_new_tokens=6)
    rows = [model.encode(prompt) for prompt in prompts]
    told = {
        "": [[] for _ in rows],
        "Rome": [model.encode(p, "Rome").answer.tolist() for p in prompts],
        "own": [[*a.tokens, *[model.end_token_id] * a.finished] for a in expected],
        "beginning": [[*a.tokens[: n % 4], 7] for n, a in enumerate(expected)],
    }[draft]
    drafted = [
        replace(r, ids=torch.cat([r.ids, torch.tensor(d, dtype=torch.long)])) for r, d in zip(rows, told, strict=True)
    ]
    found = answer_rows(model, drafted, max_new_tokens=6)
    assert [f.answer for f in found] == expected
    if draft == "own":
        assert all(f.agreed == 1.0 for f in found)


def test_a_window_that_no_layer_slides_by_hides_nothing_from_an_answer() -> None:
    model = whole_window_model()
    expected = model.generate(asked(model), max_new_tokens=6)
    found = answer_rows(model, [model.encode(prompt) for prompt in asked(model)], max_new_tokens=6)
    assert [f.answer for f in found] == expected


def test_what_is_generated_ends_with_the_token_that_ends_the_answer_whatever_the_draft_says_behind_it() -> None:
    model = tiny_model("llama")
    (own,) = model.generate(asked(model)[:1], max_new_tokens=6)
    model.model.generation_config.eos_token_id = [model.end_token_id, own.tokens[2]]
    row = model.encode(asked(model)[0])
    (found,) = answer_rows(model, [row.replaced(torch.cat([row.ids, torch.tensor(own.tokens)]))], max_new_tokens=6)
    assert found.tokens == own.tokens[:3]
    assert found.answer.finished


@pytest.mark.parametrize("tokens", [0, -1])
def test_answers_without_tokens_are_refused(llama: EditableModel, tokens: int) -> None:
    for answer in (
        lambda: llama.generate(asked(llama), max_new_tokens=tokens),
        lambda: answer_rows(llama, [llama.encode(p) for p in asked(llama)], max_new_tokens=tokens),
    ):
        with pytest.raises(InvalidInputError, match=rf"max_new_tokens is {tokens}; give at least 1"):
            answer()


def test_an_answer_ends_where_the_models_context_does(gpt2: EditableModel) -> None:
    assert gpt2.context_length
    words = next(n for n in range(gpt2.context_length) if _tokens(gpt2, n) > gpt2.context_length - 8)
    prompt = Prompt(text="What " * words + "?", chat=False)
    room = gpt2.context_length - _tokens(gpt2, words)
    (found,) = answer_rows(gpt2, [gpt2.encode(prompt)], max_new_tokens=16)
    assert len(found.answer.tokens) == room < 16
    assert found.answer == gpt2.generate([prompt], max_new_tokens=16)[0]


def _tokens(model: EditableModel, words: int) -> int:
    return len(model.tokenizer("What " * words + "?")["input_ids"])


def test_prompts_that_memory_does_not_hold_together_are_answered_one_by_one(model: EditableModel) -> None:
    rows = [model.encode(prompt) for prompt in asked(model)]
    whole = answer_rows(model, rows, max_new_tokens=4)
    little = Memory(free=lambda: 4_000_000)
    assert [f.answer for f in answer_rows(model, rows, max_new_tokens=4, memory=little)] == [f.answer for f in whole]
    with pytest.raises(MemoryLimitError, match=r"one row takes about .*smaller picture or a shorter prompt"):
        answer_rows(model, rows, memory=Memory(free=lambda: 1000))


def test_a_picture_is_told_from_another_by_its_pixels(llava: EditableModel) -> None:
    same = [llava.encode(Prompt(text=LONG + text, images=(picture(3).copy(),))) for text in TEXTS[:2]]
    trunks = trunks_of(llava, same, [row.prompt_length - 1 for row in same])
    assert trunks[0] is trunks[1] is not None


def test_halves_of_what_ran_out_of_memory_are_run_without_its_trunks(llama: EditableModel) -> None:
    """Which would take the very memory that was lacking; of what failed nothing is left, hooks and cache included."""
    rows = [llama.encode(prompt) for prompt in asked(llama)]
    whole = answer_rows(llama, rows, max_new_tokens=4)
    alive: list[int] = []

    def lacking(_decoder: object, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        if len(given["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if given["input_ids"].shape[1] > len(rows[0].ids) // 2:  # a trunk is read
            alive.append(sum(type(x) is Trunk for x in gc.get_objects()))

    handle = llama.family.decoder_of(llama.model).register_forward_pre_hook(lacking, with_kwargs=True)
    try:
        found = answer_rows(llama, rows, max_new_tokens=4)
    finally:
        handle.remove()
    assert [f.answer for f in found] == [f.answer for f in whole]
    assert alive == [0, 0, 0]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.model.modules())


def test_rows_that_fit_alone_and_not_behind_a_trunk_are_read_whole(model: EditableModel) -> None:
    rows = [model.encode(prompt) for prompt in asked(model)]
    whole = answer_rows(model, rows, max_new_tokens=4)
    one = (max(len(row.ids) for row in rows) + 4) * model.token_bytes
    just = Memory(free=lambda: int(1.3 * one))
    assert [f.answer for f in answer_rows(model, rows, max_new_tokens=4, memory=just)] == [f.answer for f in whole]
