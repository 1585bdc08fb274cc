"""How the rows of values' descents are packed and batched (module `value_rows`)."""

from collections.abc import Sequence

import pytest
from tiny import question, tiny_model

from errata.editor.memory import Memory
from errata.editor.model import EditableModel
from errata.editor.prompts import Constraint, Prompt
from errata.editor.requests import Context, EditRequest
from errata.editor.value_rows import Pack, RecordedRow, batches_of, graph_bytes, packs_of, recorded_rows

LONG = "Of all the countries whose flag I know, " * 6
"""A beginning that is worth a trunk."""


def asked(model: EditableModel, texts: Sequence[str], seeds: Sequence[int]) -> EditRequest:
    """A context a text and a picture."""
    contexts = tuple(
        Context(prompt=Prompt(text=text, images=q.images, chat=False), constraint=Constraint(text="country"))
        for text, q in ((text, question(model, text, seed)) for seed in seeds for text in texts)
    )
    return EditRequest(name=str(seeds), contexts=contexts, target="Rome")


def recorded(model: EditableModel, requests: Sequence[EditRequest]) -> list[RecordedRow]:
    return recorded_rows(model, requests, 1, 100, Memory.of(model.device), lambda: None)


def sizes(packs: Sequence[Pack]) -> list[int]:
    return sorted(len(pack) for pack in packs)


def test_rows_of_one_picture_stand_in_one_row(llava: EditableModel) -> None:
    texts = [f"{LONG}what is {word} country?" for word in ("this", "that", "a")]
    rows = recorded(llava, [asked(llava, texts, [seed]) for seed in (0, 1)])
    packs = packs_of(rows)
    assert sizes(packs) == [3, 3]
    assert all(len({id(r.row.trunk) for r in pack}) == 1 for pack in packs)
    assert [sizes(batch) for batch in batches_of(packs, 100)] == [[3, 3]]


def test_contexts_with_other_pictures_stand_alone(llava: EditableModel) -> None:
    rows = recorded(llava, [asked(llava, ["what is this country?"], range(12))])
    assert min(r.own for r in rows) > 12
    assert sizes(packs_of(rows)) == [1] * 12


def test_few_short_rows_are_packed_and_many_are_not(llama: EditableModel) -> None:
    few = recorded(llama, [asked(llama, ["this country?", "where is the country that I see?"], [0])])
    assert sizes(packs_of(few)) == [2]
    many = recorded(llama, [asked(llama, [f"{'so ' * (n % 5)}this country?" for n in range(80)], [0])])
    assert sizes(packs_of(many)) == [1] * 80


def test_a_pack_of_a_trunk_is_cut_where_it_is_longer_than_that(llava: EditableModel) -> None:
    texts = [f"{LONG}{'so ' * (n % 7)}what is this country?" for n in range(60)]
    rows = recorded(llava, [asked(llava, texts, [0])])
    packs = packs_of(rows)
    assert len(packs) > 1
    assert all(sum(r.own for r in pack) <= rows[0].recording.offset for pack in packs)


def test_a_batch_is_of_rows_of_about_one_length_and_no_more_than_the_limit(llava: EditableModel) -> None:
    many = [f"{LONG}{'so ' * n}what is this country?" for n in range(6)]
    rows = recorded(llava, [asked(llava, many, [0]), *(asked(llava, many[:2], [n]) for n in range(1, 6))])
    batches = list(batches_of(packs_of(rows), 4))
    assert sorted(r.row.site for b in batches for pack in b for r in pack) == sorted(r.row.site for r in rows)
    for batch in batches:
        widths = [sum(r.tokens for r in pack) for pack in batch]
        assert sum(map(len, batch)) <= 4
        assert max(widths) <= 1.5 * min(widths)


# Its processor makes arrays of tensors in a way that NumPy 2 asks it not to.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_rows_of_a_model_that_sees_ahead_are_as_long_as_what_is_run() -> None:
    model = tiny_model("paligemma2")
    rows = recorded(model, [asked(model, ["what is this country?"], [0, 1])])
    assert all(r.tokens == r.recording.length for r in rows)


def test_what_a_row_takes_does_not_grow_with_the_requests(llama: EditableModel) -> None:
    def bytes_of(n: int) -> int:
        rows = recorded(llama, [asked(llama, ["what is this country?"], [i]) for i in range(n)])
        return graph_bytes(llama, packs_of(rows), 1)

    assert bytes_of(160) == bytes_of(80)
