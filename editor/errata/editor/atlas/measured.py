"""Atlas's questions for measurements, with corruptions that turn their answers; all of unseen renderings.

Every list is a function of its number and seed alone: question i of `textual_questions` asks in words for the fact that
question i of `single_questions` asks for with a picture.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from errata.editor.atlas import questions
from errata.editor.atlas.facts import KNOWN, ask, picture
from errata.editor.atlas.questions import Phrasing
from errata.editor.atlas.world import Attribute, Country
from errata.editor.measurements.questions import Question
from errata.editor.prompts import Constraint
from errata.editor.requests import Context
from errata.editor.trace import Corruption, OtherImage, Substitution

T = TypeVar("T")

_NAMED = tuple(c for c in KNOWN if " " not in c.name)
"""Countries of one word: a substitution takes a word's first token alone."""


@dataclass(frozen=True, slots=True)
class _Draw:
    """One fact, another country of which it is not true, and how it is asked for."""

    country: Country
    other: Country
    attribute: Attribute
    phrasing: Phrasing
    wording: str
    pictures: tuple[int, int]


def single_questions(n: int, seed: int = 0) -> list[Question]:
    """One visual constraint: pictures of known flags, corrupted by another country's flag with another answer."""
    found = []
    for d in _draws(n, seed):
        asked = ask(d.country, d.phrasing, d.wording, picture(d.country, d.pictures[0]))
        other = OtherImage(images=(picture(d.other, d.pictures[1]),))
        found.append(_question(asked, (asked.constraint,), (other,), d.country.fact(d.attribute)))
    return found


def textual_questions(n: int, seed: int = 0) -> list[Question]:
    """The same facts asked without a picture, by the country's name, corrupted by the other country's name."""
    found = []
    for d in _draws(n, seed):
        asked = ask(d.country, d.phrasing, "", None)
        found.append(
            _question(asked, (asked.constraint,), (Substitution(word=d.other.name),), d.country.fact(d.attribute))
        )
    return found


def multi_questions(n: int, seed: int = 0) -> list[Question]:
    """Two constraints, a flag and a fact in words ("Does this country use the euro?"), whose answer is "yes".

    Corrupted by the flag of a country of which the claim is wrong, and by a claim that is wrong of both countries, so
    that either makes the answer "no" and both together do. Questions with the answer "no" are not asked: one that each
    corruption turns to "yes" is turned back by both. By chance alone "yes" is half right, so effects are out of about
    what the model falls to, not out of one.
    """
    rng = np.random.default_rng((seed, 2))
    found = []
    for i in range(n):
        attribute = list(Attribute)[i % 4]
        claimed = tuple(c for c in KNOWN if _one_word(c.fact(attribute)))
        country = _pick(claimed, rng)
        claim = country.fact(attribute)
        other = _pick(tuple(c for c in KNOWN if c.fact(attribute) != claim), rng)
        wrong = _pick(sorted({c.fact(attribute) for c in claimed} - {claim, other.fact(attribute)}), rng)
        frame = Phrasing(_pick(questions.YES_NO[attribute], rng).text.replace("{x}", claim))
        images = [picture(c, int(rng.integers(1 << 31))) for c in (country, other)]
        asked = ask(country, frame, _pick(questions.VISUAL_CONSTRAINTS, rng), images[0])
        constraints = (asked.constraint, Constraint(text=claim))
        found.append(_question(asked, constraints, (OtherImage(images=(images[1],)), Substitution(word=wrong)), "yes"))
    return found


def _draws(n: int, seed: int) -> Iterator[_Draw]:
    rng = np.random.default_rng((seed, 1))
    for i in range(n):
        attribute = list(Attribute)[i % 4]
        country = _pick(KNOWN, rng)
        other = _pick(tuple(c for c in _NAMED if c.fact(attribute) != country.fact(attribute)), rng)
        yield _Draw(
            country=country,
            other=other,
            attribute=attribute,
            phrasing=_pick(questions.PHRASINGS[attribute], rng),
            wording=_pick(questions.VISUAL_CONSTRAINTS, rng),
            pictures=(int(rng.integers(1 << 31)), int(rng.integers(1 << 31))),
        )


def _question(
    asked: Context, constraints: tuple[Constraint, ...], corruptions: tuple[Corruption, ...], answer: str
) -> Question:
    return Question(prompt=asked.prompt, constraints=constraints, corruptions=corruptions, answer=answer)


def _one_word(text: str) -> bool:
    return " " not in text


def _pick(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]
