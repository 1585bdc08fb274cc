"""Atlas's questions for measurements: what they ask, and that their corruptions turn the answer."""

import re

import pytest

from errata.editor.atlas.measured import multi_questions, single_questions, textual_questions
from errata.editor.atlas.world import COUNTRIES, Attribute
from errata.editor.measurements.questions import Question
from errata.editor.trace import OtherImage, Substitution

N = 40


@pytest.fixture(scope="module")
def multi() -> list[Question]:
    return multi_questions(N)


def test_every_constraint_stands_once_in_its_question(multi: list[Question]) -> None:
    for question in (*multi, *single_questions(N), *textual_questions(N)):
        for constraint in question.constraints:
            start, end = constraint.span(question.prompt.text)
            assert question.prompt.text[start:end] == constraint.text


def test_questions_of_two_constraints_show_a_flag_and_name_a_fact(multi: list[Question]) -> None:
    facts = {c.fact(a) for c in COUNTRIES for a in Attribute}
    for question in multi:
        assert len(question.prompt.images) == 1
        assert question.answer == "yes"
        shown, claimed = question.corruptions
        assert isinstance(shown, OtherImage)
        assert isinstance(claimed, Substitution)
        assert question.constraints[1].text in facts
        assert claimed.word in facts - {question.constraints[1].text}
        assert " " not in claimed.word + question.constraints[1].text


def test_the_same_facts_are_asked_with_a_picture_and_in_words() -> None:
    shown, words = single_questions(N), textual_questions(N)
    assert [q.answer for q in shown] == [q.answer for q in words]
    for a, b in zip(shown, words, strict=True):
        assert (len(a.prompt.images), len(b.prompt.images)) == (1, 0)
        phrasings = [re.escape(q.constraints[0].text) for q in (a, b)]
        assert re.sub(phrasings[0], "_", a.prompt.text) == re.sub(phrasings[1], "_", b.prompt.text)


def test_a_seed_gives_the_same_questions_and_another_seed_others() -> None:
    def said(seed: int) -> list[tuple[str, bytes]]:
        return [(q.prompt.text, q.prompt.images[0].tobytes()) for q in multi_questions(4, seed)]

    assert said(1) == said(1)
    assert said(1) != said(2)


def test_fewer_questions_are_the_first_of_more() -> None:
    assert [q.prompt.text for q in single_questions(4)] == [q.prompt.text for q in single_questions(8)[:4]]
