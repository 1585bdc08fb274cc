"""Prompts, constraints and edit requests as the caller gives them, before any model sees them (methods.md §1)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata.editor.errors import ConstraintNotFoundError, InvalidInputError, PromptError, TargetError
from errata.editor.prompts import Constraint, Prompt
from errata.editor.requests import Context, EditRequest, check_batch

ASKED = Context(prompt=Prompt(text="What is the capital of this country?"), constraint=Constraint(text="this country"))
ABSENT = Context(prompt=ASKED.prompt, constraint=Constraint(text="this contry"))


@given(before=st.text(), needle=st.text(min_size=1).filter(str.strip), after=st.text())
def test_every_occurrence_of_a_constraint_is_where_the_prompt_says_it(before: str, needle: str, after: str) -> None:
    prompt = before + needle + after
    starts = [i for i in range(len(prompt)) if prompt.startswith(needle, i)]
    for n, start in enumerate(starts):
        assert Constraint(text=needle, occurrence=n).span(prompt) == (start, start + len(needle))
    with pytest.raises(ConstraintNotFoundError):
        Constraint(text=needle, occurrence=len(starts)).span(prompt)


def test_a_constraint_that_occurs_once_needs_no_occurrence() -> None:
    assert Constraint(text="b").span("abc") == (1, 2)


def test_a_repeated_constraint_asks_which_one_is_meant() -> None:
    with pytest.raises(ConstraintNotFoundError, match=r"occurs 2 times .* occurrence 0 … 1") as caught:
        Constraint(text="this").span("Is this this?")
    assert caught.value.field == "constraint.occurrence"


@pytest.mark.parametrize("occurrence", [-1, 2])
def test_an_occurrence_that_is_not_there_is_refused_with_the_number_there_are(occurrence: int) -> None:
    with pytest.raises(ConstraintNotFoundError, match=r"holds it 2 time\(s\), counted from 0"):
        Constraint(text="this", occurrence=occurrence).span("Is this this?")


def test_a_misspelt_constraint_says_what_was_asked_and_what_to_do() -> None:
    with pytest.raises(ConstraintNotFoundError) as caught:
        ABSENT.constraint.span(ABSENT.prompt.text)
    assert str(caught.value) == (
        "constraint.text: constraint 'this contry' does not occur in the prompt "
        "'What is the capital of this country?'; copy it from the prompt"
    )


def test_a_constraint_in_the_wrong_case_is_answered_with_the_right_one() -> None:
    with pytest.raises(ConstraintNotFoundError, match="did you mean 'this country'"):
        Constraint(text="This Country").span("the capital of this country")


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_a_blank_constraint_is_never_found(text: str) -> None:
    with pytest.raises(ConstraintNotFoundError, match="copy it from the prompt"):
        Constraint(text=text).span("a b \n\t")


def test_a_precomposed_letter_is_not_its_combining_spelling() -> None:
    with pytest.raises(ConstraintNotFoundError):
        Constraint(text="Mal\u00e9").span("Is Male\u0301 a capital?")


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_an_empty_prompt_is_refused(text: str) -> None:
    with pytest.raises(PromptError, match="the prompt is empty") as caught:
        Prompt(text=text)
    assert caught.value.field == "prompt.text"


def test_a_request_without_contexts_is_refused() -> None:
    with pytest.raises(PromptError, match="at least one context"):
        EditRequest(name="a", contexts=(), target="Rome")


@pytest.mark.parametrize("target", ["", "   "])
def test_a_request_without_a_target_is_refused(target: str) -> None:
    with pytest.raises(TargetError, match="empty target") as caught:
        EditRequest(name="a", contexts=(ASKED,), target=target)
    assert caught.value.field == "target"


def test_a_request_names_the_context_whose_constraint_is_missing() -> None:
    with pytest.raises(ConstraintNotFoundError) as caught:
        EditRequest(name="a", contexts=(ASKED, ABSENT), target="Rome")
    assert caught.value.field == "contexts[1].constraint.text"
    with pytest.raises(ConstraintNotFoundError) as caught:
        EditRequest(name="a", contexts=(ASKED,), preserve=(ABSENT,), target="Rome")
    assert caught.value.field == "preserve[0].constraint.text"


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="no edit request given"):
        check_batch(())


def test_a_batch_with_one_name_twice_is_refused() -> None:
    one = EditRequest(name="a", contexts=(ASKED,), target="Rome")
    with pytest.raises(InvalidInputError, match="each its own name") as caught:
        check_batch((one, EditRequest(name="b", contexts=(ASKED,), target="Rome"), one))
    assert caught.value.field == "requests[2].name"
