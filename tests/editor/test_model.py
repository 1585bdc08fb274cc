"""Tokens of a prompt, positions of a constraint after image expansion, and greedy answers."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import PATCHES, picture, question, tiny_model, tokenizer
from tiny_tokenizer import tokenizer_with

from errata.editor.errors import ConstraintNotFoundError, LayerError, MemoryLimitError, PromptError, TargetError
from errata.editor.memory import Memory
from errata.editor.mixed import replica
from errata.editor.model import EditableModel, by_length
from errata.editor.prompts import Constraint, Prompt

BOS, IMAGE = 1, 3
LLAVA, GPT2 = tiny_model("llava"), tiny_model("gpt2")
"""For the property tests, which take no fixture."""


def plain_tokens(rendered: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a rendered prompt and the bytes each stands for, counted without the tokenizer's offsets.

    A byte-level token is as many bytes as it has letters in the vocabulary; an image stands for no byte of ours.
    """
    ids, spans, at = [BOS], [(-1, -1)], 0
    for n, piece in enumerate(rendered.split("<image>")):
        if n:
            at += len("<image>")
            ids += [IMAGE] * PATCHES
            spans += [(-1, -1)] * PATCHES
        for i in tokenizer().encode(piece, add_special_tokens=False):
            size = len(tokenizer().convert_ids_to_tokens(i))
            ids.append(i)
            spans.append((at, at + size))
            at += size
    return ids, spans


def rendered(model: EditableModel, prompt: Prompt) -> tuple[str, int]:
    """The prompt in its template, one placeholder an image, and the characters before its own text."""
    before = "" if "<image>" in prompt.text else "<image>\n" * len(prompt.images)
    if model.image_token_id is None or not prompt.chat:
        before = before.replace("\n", "")
        return before + prompt.text, len(before)
    return f"USER: {before}{prompt.text} ASSISTANT:", len(f"USER: {before}")


def expected_positions(model: EditableModel, prompt: Prompt, constraint: Constraint) -> range:
    whole, low = rendered(model, prompt)
    start, end = constraint.span(prompt.text)
    first, last = len(whole[: low + start].encode()), len(whole[: low + end].encode())
    ids, spans = plain_tokens(whole)
    assert model.encode(prompt).ids.tolist() == ids
    inside = [t for t, (a, b) in enumerate(spans) if a < last and b > first]
    return range(inside[0], inside[-1] + 1)


def assert_found(model: EditableModel, prompt: Prompt, constraint: Constraint) -> None:
    assert model.constraint_positions(prompt, constraint) == expected_positions(model, prompt, constraint)


LETTERS = st.text(st.sampled_from("ab i?e\u0301ñ国é🇪🇪👩\u200d🚀\n"), max_size=12)


@given(before=LETTERS, span=LETTERS.filter(str.strip), after=LETTERS, images=st.integers(0, 2), chat=st.booleans())
def test_a_constraint_is_found_in_any_script_behind_any_number_of_images(
    before: str, span: str, after: str, images: int, chat: bool
) -> None:
    text = before + span + after
    prompt = Prompt(text=text, images=tuple(picture(i) for i in range(images)), chat=chat)
    occurrence = sum(text.startswith(span, i) for i in range(len(before)))
    assert_found(LLAVA, prompt, Constraint(text=span, occurrence=occurrence))


@given(pieces=st.lists(LETTERS, min_size=2, max_size=4), data=st.data(), chat=st.booleans())
def test_a_constraint_is_found_between_inline_images(pieces: list[str], data: st.DataObject, chat: bool) -> None:
    text = "<image>".join(pieces)
    filled = [i for i, piece in enumerate(pieces) if piece.strip()]
    if not filled:
        return
    chosen = data.draw(st.sampled_from(filled))
    start = len("<image>".join([*pieces[:chosen], ""]))
    span = pieces[chosen]
    prompt = Prompt(text=text, images=tuple(picture(i) for i in range(len(pieces) - 1)), chat=chat)
    occurrence = sum(text.startswith(span, i) for i in range(start))
    assert_found(LLAVA, prompt, Constraint(text=span, occurrence=occurrence))


@given(before=LETTERS, span=LETTERS.filter(str.strip), after=LETTERS)
def test_a_constraint_is_found_in_any_script_in_a_text_only_model(before: str, span: str, after: str) -> None:
    text = before + span + after
    occurrence = sum(text.startswith(span, i) for i in range(len(before)))
    assert_found(GPT2, Prompt(text=text), Constraint(text=span, occurrence=occurrence))


@pytest.mark.parametrize("text", ["A", "ASSISTANT", "S", ":", "USER", "USER: ", "T:", "e", "image"])
def test_a_prompt_that_says_what_the_template_says_is_still_found_in_its_own_place(text: str) -> None:
    assert_found(LLAVA, Prompt(text=text, images=(picture(),)), Constraint(text=text))


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("image<image>Where is this?", "image"),
        ("mage<image> or <image>e", "mage"),
        ("Is <image>A or B?", "Is"),
        ("Is this <image>A", "A"),
        ("this <image>", "this"),
        ("<image>this", "this"),
        ("<image><image> this", "this"),
        ("this<image>this<image>this", "this"),
    ],
)
@pytest.mark.parametrize("chat", [True, False])
def test_text_beside_an_inline_image_is_not_mistaken_for_the_image_or_the_template(
    text: str, span: str, chat: bool
) -> None:
    prompt = Prompt(text=text, images=tuple(picture(i) for i in range(text.count("<image>"))), chat=chat)
    for n in range(text.replace("<image>", "\0" * 7).count(span)):
        starts = [i for i in range(len(text)) if text.startswith(span, i)]
        real = [i for i, s in enumerate(starts) if text.replace("<image>", "\0" * 7).startswith(span, s)]
        assert_found(LLAVA, prompt, Constraint(text=span, occurrence=real[n]))


def test_several_constraints_of_one_prompt_are_found_each_in_its_place(llava: EditableModel) -> None:
    prompt = question(llava, "Which movie directed by this director won a Golden Globe?")
    for span in ("this director", "Golden Globe", "movie", "Which movie directed by this director won a Golden Globe?"):
        assert_found(llava, prompt, Constraint(text=span))


def test_a_constraint_of_several_tokens_covers_them_all(llava: EditableModel) -> None:
    found = llava.constraint_positions(question(llava), Constraint(text="this country"))
    assert len(found) > 1
    assert llava.tokenizer.decode(llava.encode(question(llava)).ids[list(found)]).strip() == "this country"


def test_a_constraint_inside_a_token_is_the_whole_token(gpt2: EditableModel) -> None:
    prompt = question(gpt2)
    inside, whole = (gpt2.constraint_positions(prompt, Constraint(text=t)) for t in ("apita", "capital"))
    assert inside[0] in whole


def test_a_constraint_that_is_only_an_image_placeholder_is_refused(llava: EditableModel) -> None:
    prompt = Prompt(text="What is <image>?", images=(picture(),))
    with pytest.raises(ConstraintNotFoundError, match="no token"):
        llava.constraint_positions(prompt, Constraint(text="<image>"))


def test_each_image_is_one_run_of_image_tokens(llava: EditableModel) -> None:
    for text, chat in (
        ("Compare.", True),
        ("Compare.", False),
        ("<image> or <image>?", True),
        ("<image><image>", False),
    ):
        found = llava.encode(Prompt(text=text, images=(picture(1), picture(2)), chat=chat))
        assert [len(run) for run in found.images] == [PATCHES, PATCHES]
        assert all(found.ids[t] == IMAGE for run in found.images for t in run)


def test_a_prompt_without_images_is_fine_for_a_multimodal_model(llava: EditableModel) -> None:
    found = llava.encode(Prompt(text="The capital of Estonia?"))
    assert found.images == ()
    assert found.vision == {}


def test_a_text_only_model_refuses_images(llama: EditableModel) -> None:
    with pytest.raises(PromptError, match="'tiny-llama' is a text-only model; drop the image"):
        llama.encode(Prompt(text="What?", images=(picture(),)))


@pytest.mark.parametrize(("placeholders", "images"), [(1, 0), (2, 1), (1, 2)])
def test_placeholders_and_images_must_agree_in_number(llava: EditableModel, placeholders: int, images: int) -> None:
    prompt = Prompt(text="<image> " * placeholders + "what?", images=tuple(picture(i) for i in range(images)))
    with pytest.raises(PromptError, match=rf"{placeholders} image placeholders for {images} image") as caught:
        llava.encode(prompt)
    assert caught.value.field == "prompt.images"


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize("size", [(24, 24), (7, 60)])
def test_images_of_any_mode_and_size_are_taken(llava: EditableModel, mode: str, size: tuple[int, int]) -> None:
    prompt = Prompt(text="What?", images=(Image.new(mode, size),))
    try:
        encoded = llava.encode(prompt)
    except PromptError:
        return
    assert encoded.vision["pixel_values"].shape == (1, 3, 24, 24)
    assert len(llava.generate([prompt])) == 1


def test_an_answer_follows_the_prompts_own_tokens(model: EditableModel) -> None:
    prompt = question(model)
    alone, answered = model.encode(prompt), model.encode(prompt, "Rome")
    assert answered.ids[: len(alone.ids)].equal(alone.ids)
    assert answered.prompt_length == len(alone.ids) == alone.prompt_length
    assert len(answered.spans) == len(answered.ids)
    assert alone.answer.tolist() == []
    assert model.tokenizer.decode(answered.answer, skip_special_tokens=True) == " Rome"


def test_a_chat_answer_ends_with_the_end_of_sequence_and_a_bare_one_does_not(llava: EditableModel) -> None:
    chat, bare = (llava.encode(Prompt(text="What?", chat=c), "Rome").answer.tolist() for c in (True, False))
    assert chat == [*bare, llava.end_token_id]


def filling(model: EditableModel, tokens: int) -> Prompt:
    """A prompt of so many tokens: a letter that no other merges with is one."""
    others = len(model.encode(Prompt(text="q", chat=False)).ids) - 1
    return Prompt(text="q" * (tokens - others), chat=False)


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_with_the_numbers(model: EditableModel) -> None:
    assert len(model.encode(filling(model, 255)).ids) == 255
    for ask in (model.encode, lambda prompt: model.generate([prompt])):
        with pytest.raises(PromptError, match=r'prompt\.text: the prompt "q+…" has 256 tokens.* holds 256'):
            ask(filling(model, 256))


def test_an_answer_that_does_not_fit_behind_its_prompt_is_refused_with_the_numbers(model: EditableModel) -> None:
    prompt = filling(model, 250)
    fits = model.encode(prompt, "q" * 5)
    assert len(fits.ids) == 256
    with pytest.raises(PromptError, match=r"target: .* has 250 tokens.*, and its answer 7; .* holds 256"):
        model.encode(prompt, "q" * 6)


def test_an_answer_ends_where_the_context_does(model: EditableModel) -> None:
    [answer] = model.generate([filling(model, 253)], max_new_tokens=16)
    assert len(answer.tokens) <= 3


@pytest.mark.parametrize("answer", ["", "  ", "\n"])
def test_an_empty_answer_is_refused(model: EditableModel, answer: str) -> None:
    with pytest.raises(TargetError, match="the target is empty"):
        model.encode(question(model), answer)


@given(answer=LETTERS.filter(str.strip))
def test_any_answer_is_kept_letter_by_letter(answer: str) -> None:
    row = GPT2.encode(Prompt(text="What is"), answer)
    assert GPT2.tokenizer.decode(row.answer, clean_up_tokenization_spaces=False) == " " + answer.strip()


def test_a_prompt_that_ends_in_a_space_gets_no_second_one(gpt2: EditableModel) -> None:
    row = gpt2.encode(Prompt(text="The capital is "), "Rome")
    assert gpt2.tokenizer.decode(row.ids[1:]) == "The capital is Rome"


def test_one_start_token_is_put_before_a_prompt_even_where_it_brings_its_own(gpt2: EditableModel) -> None:
    for text in ("What?", "<s>What?"):
        assert (gpt2.encode(Prompt(text=text)).ids == BOS).sum() == 1


PROMPTS = (
    "What is the capital of this country?",
    "Where is this?",
    "What is the capital of that country?",
    "Which one?",
    "Where was this?",
    "What is the capital of this country?",
)


def test_answers_equal_transformers_own_greedy_generation_row_by_row(model: EditableModel) -> None:
    prompts = [question(model, text, seed) for seed, text in enumerate(PROMPTS)]
    for prompt, answer in zip(prompts, model.generate(prompts, max_new_tokens=9), strict=True):
        row = model.encode(prompt)
        out = model.model.generate(
            input_ids=row.ids[None],
            attention_mask=torch.ones(1, len(row.ids), dtype=torch.long),
            **row.vision,
            do_sample=False,
            max_new_tokens=9,
            pad_token_id=0,
        )[0, len(row.ids) :].tolist()
        ended = model.end_token_id in out
        assert answer.tokens == tuple(out[: out.index(model.end_token_id)] if ended else out)
        assert answer.finished == ended
        assert answer.text == model.tokenizer.decode(answer.tokens, skip_special_tokens=True).strip()


def test_a_batch_answers_like_each_prompt_alone_in_the_order_of_the_prompts(model: EditableModel) -> None:
    prompts = [question(model, text, seed) for seed, text in enumerate(PROMPTS)]
    alone = [model.generate([p])[0] for p in prompts]
    assert model.generate(prompts) == alone
    assert model.generate(prompts, batch_size=2) == alone
    assert model.generate(prompts[::-1]) == alone[::-1]


def test_prompts_with_and_without_images_are_answered_together(llava: EditableModel) -> None:
    # 12 tokens more or less than an image, its newline and nothing else: some lengths agree by chance.
    mixed = [Prompt(text="a" * n) for n in range(1, 24)] + [question(llava, "a" * n) for n in range(1, 12)]
    assert llava.generate(mixed, max_new_tokens=2) == [llava.generate([p], max_new_tokens=2)[0] for p in mixed]


def test_no_prompts_have_no_answers(model: EditableModel) -> None:
    assert model.generate([]) == []


def test_an_answer_stops_at_the_end_token_and_says_so() -> None:
    model = tiny_model("llama")
    _always_saying(model, model.end_token_id)
    assert [dataclasses.astuple(a) for a in model.generate([Prompt(text="What?")])] == [("", (), True)]


def test_an_answer_that_runs_out_of_tokens_says_so() -> None:
    model = tiny_model("llama")
    _always_saying(model, 40)
    answer = model.generate([Prompt(text="What?")], max_new_tokens=5)[0]
    assert (answer.tokens, answer.finished) == ((40,) * 5, False)


def test_every_end_token_of_the_checkpoint_ends_an_answer() -> None:
    """Llama 3 names three; the tokenizer knows one of them."""
    model = tiny_model("llama")
    model.model.generation_config.eos_token_id = [model.end_token_id, 41]
    _always_saying(model, 41)
    answer = model.generate([Prompt(text="What?")])[0]
    assert (answer.text, answer.tokens, answer.finished) == ("", (), True)


@pytest.mark.parametrize(
    "defaults",
    [
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
        {"num_beams": 3},
        {"repetition_penalty": 9.0},
        {"no_repeat_ngram_size": 1},
        {"max_length": 20},
        {"suppress_tokens": list(range(4, 300))},
        {"bad_words_ids": [[n] for n in range(4, 300)]},
        {"forced_eos_token_id": 2},
        {"exponential_decay_length_penalty": (1, 5.0)},
        {"return_dict_in_generate": True},
        {"stop_strings": ["a", "e"]},
    ],
)
def test_answers_are_greedy_whatever_the_checkpoints_generation_defaults_say(defaults: dict[str, object]) -> None:
    prompts = [Prompt(text=t) for t in PROMPTS[:3]]
    model = tiny_model("llama")
    greedy = model.generate(prompts)
    model.model.generation_config.update(**defaults)
    assert model.generate(prompts) == greedy


def test_a_checkpoints_generation_defaults_are_left_as_they_are() -> None:
    model = tiny_model("llama")
    before = model.model.generation_config
    model.generate([Prompt(text="What?")])
    assert model.model.generation_config is before


def test_prompts_that_memory_does_not_hold_together_are_asked_one_by_one(llava: EditableModel) -> None:
    prompts = [question(llava, t) for t in PROMPTS for _ in range(2)]
    widths: list[int] = []
    decoder = llava.family.decoder_of(llava.model)
    handle = decoder.register_forward_pre_hook(
        lambda _m, _a, k: widths.append(len(k["inputs_embeds"])), with_kwargs=True
    )
    longest = max(len(llava.encode(p).ids) for p in prompts) + 4
    little = Memory(free=lambda: int(1.3 * longest * llava.token_bytes))
    try:
        found = llava.generate(prompts, max_new_tokens=4, memory=little)
    finally:
        handle.remove()
    assert set(widths) == {1}
    assert found == llava.generate(prompts, max_new_tokens=4)
    with pytest.raises(MemoryLimitError, match="one row takes about"):
        llava.generate(prompts, memory=Memory(free=lambda: 1000))


def test_an_error_names_the_prompt_that_cannot_be_asked(llama: EditableModel) -> None:
    with pytest.raises(PromptError) as refused:
        llama.generate([Prompt(text="What?"), Prompt(text="q" * 300)], field="requests[{}].contexts[0]".format)
    assert refused.value.field == "requests[1].contexts[0].prompt.text"


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_images_that_a_model_could_not_tell_apart_are_refused(name: str) -> None:
    """Qwen-VL counts positions by runs of image tokens: two without anything between are one, of the wrong size."""
    model = tiny_model(name)
    mark = model.placeholder
    both = (picture(0), picture(1))
    for text, chat in (("Where?", False), (f"{mark}{mark} Where?", True)):
        with pytest.raises(PromptError, match=r"images: .*two have nothing there; put text or the model's own marks"):
            model.encode(Prompt(text=text, images=both, chat=chat))
    for prompt in (Prompt(text="Where?", images=both), Prompt(text=f"{mark} and {mark}?", images=both, chat=False)):
        assert model.generate([prompt], max_new_tokens=2)


def _always_saying(model: EditableModel, token: int) -> None:
    """A head whose largest logit is always one token's: its row is the final norm's output scaled up."""
    with torch.no_grad():
        model.family.final_norm_of(model.model).weight.zero_()[0] = 0
        head = model.model.get_output_embeddings()
        head.bias = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(token), head.out_features).float())


def test_rows_share_a_batch_only_when_no_row_would_be_padded(llava: EditableModel) -> None:
    encoded = [llava.encode(question(llava, t)) for t in PROMPTS] + [llava.encode(Prompt(text=t)) for t in PROMPTS]
    batches = by_length(encoded, 2)
    assert sorted(i for b in batches for i in b) == list(range(len(encoded)))
    for batch in batches:
        assert len(batch) <= 2
        assert len({(len(encoded[i].ids), len(encoded[i].images)) for i in batch}) == 1


@pytest.mark.parametrize("layer", [-1, 4, 99])
def test_a_layer_out_of_range_is_refused_with_the_number_of_layers(model: EditableModel, layer: int) -> None:
    with pytest.raises(LayerError, match=rf"no layer {layer}; its 4 layers are counted from 0"):
        model.down_projection(layer)


def test_a_down_projection_is_found_again_by_its_name(model: EditableModel) -> None:
    for layer in range(4):
        assert model.model.get_submodule(model.down_projection_name(layer)) is model.down_projection(layer)


@pytest.fixture(autouse=True)
def _property_models_stay_as_they_were() -> Iterator[None]:
    yield
    assert not LLAVA.model.training
    assert not GPT2.model.training


def test_what_decides_how_a_prompt_is_read_has_one_digest_wherever_and_however_it_runs() -> None:
    llava, moved = tiny_model("llava"), tiny_model("llava", seed=1)
    moved.model.to(torch.bfloat16)
    moved.model.config._name_or_path, moved.model.config.transformers_version = "/elsewhere", "1.0"
    moved.model.set_attn_implementation("eager")
    moved.tokenizer(["one", "and two"], padding=True)
    assert moved.reading_sha256 == replica(llava).reading_sha256 == llava.reading_sha256


@pytest.mark.parametrize("change", ["template", "token", "size", "patches", "rope"])
def test_whatever_changes_how_a_prompt_is_read_changes_its_digest(change: str) -> None:
    llava, other = tiny_model("llava"), tiny_model("llava")
    match change:
        case "template":
            other.processor.chat_template += " "
        case "token":
            other.processor.tokenizer = tokenizer_with(image_token="<image>")  # models share one
            other.tokenizer.add_tokens(["_Atlantis"])
        case "size":
            other.processor.image_processor.size = {"height": 16, "width": 16}
        case "patches":
            other.processor.vision_feature_select_strategy = "full"
        case "rope":
            other.model.config.text_config.rope_parameters["rope_theta"] = 5e5
    assert other.reading_sha256 != llava.reading_sha256
