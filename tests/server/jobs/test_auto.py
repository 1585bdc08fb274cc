from random import Random

import pytest
from house import LAYER, House, question, small_edit

from errata.editor.errors import CorruptionFailedError
from errata.editor.localization import choose_layers
from errata.editor.requests import Context, EditRequest
from errata.editor.trace import Corruption, OtherImage, Substitution
from errata.server.jobs.auto import corruptions, questions, trace_edit


def _request(context: Context, target: str = "Paris") -> EditRequest:
    return EditRequest(name=str(context.subject), contexts=(context,), target=target)


def _candidates(context: Context, *others: Context) -> list[Corruption]:
    own = _request(context)
    return list(corruptions(context, own, [own], others, Random(0)))


def test_a_question_about_a_picture_is_corrupted_by_other_pictures_first() -> None:
    others = [question("Japan"), question("France"), question("Latvia", shown=False)]
    found = _candidates(question("Estonia"), *others)
    assert [type(c) for c in found] == [OtherImage, OtherImage, Substitution]
    shown = [c.images[0] for c in found if isinstance(c, OtherImage)]
    assert all(any(image is o.prompt.images[0] for o in others[:2]) for image in shown)


def test_a_question_in_words_is_corrupted_by_what_others_name() -> None:
    others = [question("Japan"), question("France", shown=False), question("Latvia", shown=False)]
    found = _candidates(question("Estonia", shown=False), *others)
    assert {c.word for c in found if isinstance(c, Substitution)} == {"France", "Latvia"}
    assert len(found) == 2


def test_nothing_is_corrupted_by_its_own_subject() -> None:
    assert _candidates(question("Estonia"), question("Estonia"), question("Estonia", shown=False)) == []


def test_other_requests_come_before_references() -> None:
    own, other = _request(question("Estonia")), _request(question("Japan"))
    found = list(corruptions(own.contexts[0], own, [own, other], [question("France")] * 3, Random(0)))
    assert isinstance(found[0], OtherImage)
    assert found[0].images[0] is other.contexts[0].prompt.images[0]


def test_each_requests_first_question_is_traced_and_further_ones_where_these_are_few() -> None:
    few = small_edit("Estonia", "Latvia", contexts=4)
    assert [c for _, c in questions(few)] == [
        c for pair in zip(*(r.contexts[:3] for r in few), strict=True) for c in pair
    ]
    many = [_request(question("Estonia")) for _ in range(40)]
    assert [r for r, _ in questions(many)] == many[:24]


def test_a_question_in_words_finds_the_same_layer(house: House) -> None:
    requests = [_request(question(c, shown=False)) for c in ("Estonia", "Japan")]
    with house.models.get("atlas").borrow() as model:
        averaged = trace_edit(model, requests, (), progress=lambda *_: None, cancelled=lambda: False)
    assert LAYER in choose_layers(averaged).layers


def test_requests_that_nothing_can_corrupt_say_so(house: House) -> None:
    with house.models.get("atlas").borrow() as model, pytest.raises(CorruptionFailedError, match="to corrupt it with"):
        trace_edit(model, [_request(question("Estonia"))], (), progress=lambda *_: None, cancelled=lambda: False)
