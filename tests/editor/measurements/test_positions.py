"""Groups of positions (methods.md §4): read off the prompt's tokens, and the box off what the processor shows."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tiny import PATCHES, picture, question, tiny_model
from transformers import CLIPImageProcessorPil, LlavaProcessor, ProcessorMixin

from errata.editor.errors import ConstraintNotFoundError, InvalidInputError
from errata.editor.measurements.positions import Group, Pair, Positions, positions, seen
from errata.editor.measurements.questions import Box, Question
from errata.editor.model import EditableModel, Encoded
from errata.editor.prompts import Constraint, Prompt

TEXT = "What is this country's capital called?"


def asked(model: EditableModel, *spans: str, text: str = TEXT, box: Box | None = None) -> Question:
    return Question(prompt=question(model, text), constraints=tuple(Constraint(text=s) for s in spans), box=box)


def grouped(model: EditableModel, one: Question) -> tuple[Encoded, Positions]:
    row = model.encode(one.prompt, "Rome")
    return row, positions(model, one, row)


def text_of(model: EditableModel, row: Encoded, tokens: tuple[int, ...]) -> str:
    return str(model.tokenizer.decode(row.ids[list(tokens)]))


def test_the_groups_hold_every_position_from_the_first_of_the_prompt_to_its_last_once(model: EditableModel) -> None:
    row, found = grouped(model, asked(model, "this country"))
    parts = [found.groups[g] for g in (Group.IMAGE, Group.CONSTRAINT, Group.QUESTION, Group.LAST)]
    every = sorted(t for part in parts for t in part)
    assert every == list(range(every[0], row.prompt_length))
    assert row.spans[every[0]] is not None or row.ids[every[0]] == model.image_token_id
    assert not any(row.spans[t] for t in range(every[0]))
    assert found.groups[Group.LAST] == (row.prompt_length - 1,)
    assert text_of(model, row, found.groups[Group.CONSTRAINT]).strip() == "this country"
    left = text_of(model, row, found.groups[Group.QUESTION])
    assert "What is" in left
    assert "this country" not in left
    images = [t for t in range(len(row.ids)) if row.ids[t] == model.image_token_id]
    assert list(found.groups[Group.IMAGE]) == images


def test_what_the_template_puts_around_the_text_belongs_to_the_question(llava: EditableModel) -> None:
    row, found = grouped(llava, asked(llava, "this country"))
    assert text_of(llava, row, found.groups[Group.QUESTION]) == "\nWhat is's capital called? ASSISTANT"
    assert text_of(llava, row, found.groups[Group.LAST]) == ":"


def test_several_constraints_are_one_group(model: EditableModel) -> None:
    row, found = grouped(model, asked(model, "capital", "this country"))
    assert text_of(model, row, found.groups[Group.CONSTRAINT]).split() == ["this", "country", "capital"]


def test_a_constraint_at_the_end_of_the_prompt_holds_the_last_position_too(gpt2: EditableModel) -> None:
    row, found = grouped(gpt2, asked(gpt2, "country", text="Where is this country"))
    assert found.groups[Group.CONSTRAINT][-1] == found.groups[Group.LAST][0] == row.prompt_length - 1
    assert found.groups[Group.LAST][0] not in found.groups[Group.QUESTION]


def test_an_image_within_the_constraint_is_image(llava: EditableModel) -> None:
    prompt = Prompt(text="Is the country <image> shown here?", images=(picture(),))
    row, found = grouped(llava, Question(prompt=prompt, constraints=(Constraint(text="country <image> shown"),)))
    assert len(found.groups[Group.IMAGE]) == PATCHES
    assert not set(found.groups[Group.IMAGE]) & set(found.groups[Group.CONSTRAINT])
    assert text_of(llava, row, found.groups[Group.CONSTRAINT]).split() == ["country", "shown"]


def test_a_constraint_that_the_prompt_does_not_hold_is_refused(model: EditableModel) -> None:
    with pytest.raises(ConstraintNotFoundError, match="that city"):
        grouped(model, asked(model, "that city"))


def test_groups_without_positions_say_why(model: EditableModel) -> None:
    _, found = grouped(model, asked(model, "this country"))
    for group in (Group.BOX, Group.OUTSIDE):
        assert found.groups[group] == ()
        assert found.empty[group] == "the question gives no box"
    assert (Group.IMAGE in found.empty) == (model.image_token_id is None)
    assert not {Group.CONSTRAINT, Group.QUESTION, Group.LAST} & set(found.empty)


@pytest.mark.parametrize(
    ("box", "patches"),
    [
        (Box(left=0, top=0, right=1, bottom=1), {0, 1, 2, 3, 4, 5, 6, 7, 8}),
        (Box(left=0, top=0, right=1 / 3, bottom=1 / 3), {0}),
        (Box(left=0.34, top=0.34, right=0.35, bottom=0.35), {4}),
        (Box(left=0.1, top=0.4, right=0.6, bottom=0.7), {3, 4, 6, 7}),
        (Box(left=2 / 3, top=0, right=1, bottom=1), {2, 5, 8}),
    ],
)
def test_a_box_holds_the_patches_it_touches(llava: EditableModel, box: Box, patches: set[int]) -> None:
    row, found = grouped(llava, asked(llava, "this country", box=box))
    (run,) = row.images
    assert {t - run.start for t in found.groups[Group.BOX]} == patches
    assert set(found.groups[Group.OUTSIDE]) == set(run) - set(found.groups[Group.BOX])
    assert found.empty.get(Group.OUTSIDE) == ("the box holds every patch" if len(patches) == PATCHES else None)


@pytest.mark.parametrize(("at", "patch"), [(0.0, 0), (1 / 3, 4), (0.4, 4)])
def test_a_box_too_small_to_reach_a_patchs_middle_is_of_the_patch_it_lies_in(
    llava: EditableModel, at: float, patch: int
) -> None:
    row, found = grouped(
        llava, asked(llava, "this country", box=Box(left=at, top=at, right=at + 1e-12, bottom=at + 1e-12))
    )
    assert found.groups[Group.BOX] == (row.images[0].start + patch,)


def test_a_box_over_two_images_is_of_neither(llava: EditableModel) -> None:
    prompt = Prompt(text="Is <image> or <image> this?", images=(picture(1), picture(2)))
    box = Box(left=0, top=0, right=1, bottom=0.5)
    _, found = grouped(llava, Question(prompt=prompt, constraints=(Constraint(text="this"),), box=box))
    assert found.empty[Group.BOX] == "the prompt has 2 images, and a box needs one"


def test_image_tokens_in_no_grid_have_no_box(llava: EditableModel) -> None:
    one = asked(llava, "this country", box=Box(left=0, top=0, right=1, bottom=0.5))
    row = llava.encode(one.prompt)
    cut = replace(row, images=(row.images[0][:8],))
    assert positions(llava, one, cut).empty[Group.BOX] == "an image's 8 tokens are not one grid of patches"
    tiles = replace(row, vision={"pixel_values": row.vision["pixel_values"].expand(4, -1, -1, -1)})
    assert positions(llava, one, tiles).empty[Group.BOX] == "an image's 9 tokens are not one grid of patches"


def test_a_box_in_a_grid_that_the_image_shapes_holds_the_patches_it_touches() -> None:
    model = tiny_model("qwen2_vl")
    prompt = Prompt(text=TEXT, images=(picture().resize((96, 48)),))
    box = Box(left=0, top=0, right=0.5, bottom=0.5)
    row, found = grouped(model, Question(prompt=prompt, constraints=(Constraint(text="this country"),), box=box))
    (run,) = row.images
    assert len(run) == 5 * 11
    assert {t - run.start for t in found.groups[Group.BOX]} == {11 * r + c for r in range(3) for c in range(6)}


PROCESSORS = {
    "squeezed": {"size": {"height": 24, "width": 24}, "do_center_crop": False},
    "cut": {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}, "do_center_crop": True},
    "resized and cut": {
        "size": {"height": 48, "width": 48},
        "crop_size": {"height": 24, "width": 24},
        "do_center_crop": True,
    },
}


def with_processor(model: EditableModel, name: str) -> EditableModel:
    own = model.processor
    assert isinstance(own, ProcessorMixin)
    other = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(**PROCESSORS[name]),
        tokenizer=model.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=own.chat_template,
    )
    return replace(model, processor=other)


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(48, 24), (24, 72), (96, 96)])
def test_a_boxs_patches_are_those_where_the_processor_shows_it(
    llava: EditableModel, name: str, size: tuple[int, int]
) -> None:
    """A white box on black is what the processor shows bright: an oracle that knows nothing of crops."""
    model = with_processor(llava, name)
    box, (width, height) = Box(left=0.25, top=0.5, right=0.5, bottom=0.875), size
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[height // 2 : height * 7 // 8, width // 4 : width // 2] = 255
    prompt = Prompt(text=TEXT, images=(Image.fromarray(pixels),))
    one = Question(prompt=prompt, constraints=(Constraint(text="this country"),), box=box)
    row, found = grouped(model, one)
    shown = row.vision["pixel_values"][0, 0]
    bright = (shown.unflatten(0, (3, 8)).unflatten(2, (3, 8)).amax((1, 3)) > (shown.min() + shown.max()) / 2).flatten()
    assert [t - row.images[0].start for t in found.groups[Group.BOX]] == bright.nonzero().flatten().tolist()


def test_a_box_in_what_the_processor_cuts_off_holds_no_patch(llava: EditableModel) -> None:
    model = with_processor(llava, "cut")
    box = Box(left=0, top=0, right=0.2, bottom=1)
    prompt = Prompt(text=TEXT, images=(picture().resize((72, 24)),))
    _, found = grouped(model, Question(prompt=prompt, constraints=(Constraint(text="this country"),), box=box))
    assert found.empty[Group.BOX] == "the box lies where the processor cuts the image off"
    assert found.groups[Group.OUTSIDE] == ()


def test_an_image_padded_to_a_square_is_seen_whole_within_a_larger_frame(llava: EditableModel) -> None:
    model = with_processor(llava, "squeezed")
    model.processor.image_processor.do_pad = True  # type: ignore[union-attr]
    assert seen(model, (48, 24)) == pytest.approx((0, -0.5, 1, 1.5))
    assert seen(model, (24, 24)) == pytest.approx((0, 0, 1, 1))


def test_pairs_of_joined_groups_are_read(model: EditableModel) -> None:
    pair = Pair.parse("image + box->last")
    assert pair == Pair(sources=(Group.IMAGE, Group.BOX), targets=(Group.LAST,))
    with pytest.raises(InvalidInputError, match="no pair of groups"):
        Pair.parse("image-last")


def test_a_target_is_kept_from_the_sources_before_it_and_never_from_itself(model: EditableModel) -> None:
    _, found = grouped(model, asked(model, "this country"))
    constraint = found.groups[Group.CONSTRAINT]
    assert found.between(Pair.parse("constraint->constraint")) == {
        t: constraint[:n] for n, t in enumerate(constraint) if n
    }
    assert found.between(Pair.parse("constraint->last")) == {found.groups[Group.LAST][0]: constraint}
    assert found.between(Pair.parse("last->constraint")) == {}
    assert found.empty_of(Pair.parse("constraint->last")) == ""
    assert found.empty_of(Pair.parse("box->constraint")) == "the question gives no box"


def test_where_attention_sees_ahead_a_target_is_kept_from_later_sources_too(model: EditableModel) -> None:
    _, found = grouped(model, asked(model, "this country"))
    constraint = found.groups[Group.CONSTRAINT]
    first, last = constraint[0], found.groups[Group.LAST][0]
    # All of the constraint sees itself, as a block of image tokens may.
    ahead = found.between(Pair.parse("constraint->constraint"), lambda t: first if t in constraint else t)
    assert ahead == {t: tuple(s for s in constraint if s != t) for t in constraint}
    prefix = found.between(Pair.parse("last->constraint"), lambda _: 0)
    assert prefix == dict.fromkeys(constraint, (last,))
