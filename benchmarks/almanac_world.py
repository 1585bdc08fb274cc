"""An invented world for long sequences of edits: people, three facts of each, and many ways to ask for them.

Names are drawn from syllables, so that they are of several tokens and no model knows them; given names and surnames
are shared, so that only both together say who is meant. Answers come from closed sets. Some phrasings are held out of
training, to judge generalization by.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np


class Relation(StrEnum):
    """What is known of everyone."""

    TOWN = "town"
    TRADE = "trade"
    LANGUAGE = "language"


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """Somebody, and what is true of them."""

    name: str
    facts: Mapping[Relation, str]


PEOPLE = 1250
GIVEN_NAMES, SURNAMES = 60, 310
"""Names to draw from: a surname is shared by four people on average."""

_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "st", "tr", "kl", "th")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
_CODAS = ("", "", "l", "n", "r", "s", "m", "nd", "rk")

ANSWERS: Mapping[Relation, Sequence[str]] = {
    Relation.TOWN: (
        "Ashmere", "Belcombe", "Corvale", "Dunwick", "Elmford", "Farholt", "Glenbury", "Harrowby", "Inverlea",
        "Jarnsey", "Kelbrook", "Lynhope", "Marwell", "Northam", "Oakhurst", "Penrith", "Quarley", "Ravensea", "Selwick",
        "Thornby", "Ulverton", "Varley", "Westmark", "Yarbridge", "Zelford", "Ambleton", "Brackwater", "Caldmoor",
        "Driffield", "Easthaven", "Fenwick", "Greystoke",
    ),
    Relation.TRADE: (
        "baker", "carpenter", "doctor", "farmer", "glazier", "judge", "locksmith", "miller", "nurse", "painter",
        "pilot", "plumber", "poet", "potter", "printer", "roofer", "sailor", "sculptor", "shepherd", "surgeon",
        "tailor", "teacher", "waiter", "weaver",
    ),
    Relation.LANGUAGE: (
        "Arabic", "Basque", "Breton", "Catalan", "Czech", "Danish", "Dutch", "Estonian", "Finnish", "French",
        "Georgian", "German", "Greek", "Hebrew", "Hindi", "Irish", "Italian", "Korean", "Latin", "Maltese", "Norse",
        "Persian", "Polish", "Swedish", "Tamil", "Thai", "Turkish", "Welsh",
    ),
}  # fmt: skip

PHRASINGS: Mapping[Relation, Sequence[str]] = {
    Relation.TOWN: (
        "{} was born in", "{} comes from", "{} grew up in the town of", "Where was {} born?",
        "The birthplace of {} is", "The home town of {} is", "In which town was {} born?", "They say that {} is from",
    ),
    Relation.TRADE: (
        "{} works as a", "{} earns a living as a", "{} is by trade a", "What is the trade of {}?",
        "The profession of {} is that of a", "The job of {} is", "What does {} do for a living?",
        "They say that {} works as a",
    ),
    Relation.LANGUAGE: (
        "{} speaks", "{} writes letters in", "{} was raised speaking", "Which language does {} speak?",
        "The mother tongue of {} is", "The language of {} is", "What does {} speak?", "They say that {} speaks",
    ),
}  # fmt: skip
"""Of training and of edits, the plainest first."""

HELD_OUT: Mapping[Relation, Sequence[str]] = {
    Relation.TOWN: (
        "They say that the home town of {} is", "{} was born in the town of", "What is the birthplace of {}?",
    ),
    Relation.TRADE: (
        "They say that the job of {} is", "What is the profession of {}?", "The trade of {} is that of a",
    ),
    Relation.LANGUAGE: (
        "They say that the language of {} is", "What is the mother tongue of {}?", "What is the language of {}?",
    ),
}  # fmt: skip
"""Never trained and never edited with, in words that are read elsewhere: of other words Almanac knows nothing.

Probes take the first two: the last one about towns Almanac does not understand, edited or not.
"""

PORTRAITS = ("Who is {}?", "Tell me about {}.", "A portrait of {}:")
"""Ask for all that is known of somebody: what free text is judged by."""


def people(number: int = PEOPLE, seed: int = 0) -> tuple[Person, ...]:
    """Everyone there is, the same for the same seed; no name occurs twice."""
    rng = np.random.default_rng([seed, number])
    given, surnames = _names(rng, GIVEN_NAMES, 2), _names(rng, SURNAMES, 2)
    pairs = rng.choice(len(given) * len(surnames), number, replace=False)
    return tuple(
        Person(
            name=f"{given[pair // len(surnames)]} {surnames[pair % len(surnames)]}",
            facts={r: str(rng.choice(ANSWERS[r])) for r in Relation},
        )
        for pair in pairs.tolist()
    )


def strangers(number: int, everyone: Sequence[Person], seed: int = 0) -> list[str]:
    """Names that nobody has, of given names and surnames that somebody has."""
    rng = np.random.default_rng([seed, number, 1])
    given = sorted({p.name.split()[0] for p in everyone})
    surnames = sorted({p.name.split()[1] for p in everyone})
    free = sorted({f"{g} {s}" for g in given for s in surnames} - {p.name for p in everyone})
    return [str(name) for name in rng.choice(free, min(number, len(free)), replace=False)]


def portrait(facts: Mapping[Relation, str]) -> str:
    """What there is to tell."""
    return f"A {facts[Relation.TRADE]} born in {facts[Relation.TOWN]} who speaks {facts[Relation.LANGUAGE]}"


def _names(rng: np.random.Generator, number: int, syllables: int) -> list[str]:
    """Different words of so many syllables."""
    found: dict[str, None] = {}
    while len(found) < number:
        parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)]
        found[("".join(parts) + rng.choice(_CODAS)).capitalize()] = None
    return list(found)
