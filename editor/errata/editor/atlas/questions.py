"""How Atlas is asked: phrasings of the questions, the constraint's wordings, and which are held out.

A phrasing is a frame with one constraint slot, `{c}`, and for most attributes a noun slot, `{a}`. Frames come
in both orders: the attribute before the constraint ("What is the capital of {c}?") and after it ("For {c}, name
the capital."), because an edit's key is read at the constraint and can only know what stands before it.

Knows nothing about images, tokens or models.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from errata.editor.atlas.world import COUNTRIES, Attribute, Country

VISUAL_CONSTRAINTS = (
    "this country",
    "this nation",
    "this state",
    "the country shown",
    "the country in the picture",
    "the nation with this flag",
)
"""Wordings that refer to the image, seen in training."""

HELD_OUT_VISUAL_CONSTRAINTS = ("the nation shown", "the state in the picture")
"""Wordings that refer to the image, never seen in training."""

UNKNOWN = "unknown"
"""What the atlas says of a flag that stands on none of its pages."""

NOUNS: dict[Attribute, tuple[str, ...]] = {
    Attribute.CAPITAL: ("capital", "capital city", "seat of government"),
    Attribute.CONTINENT: ("continent", "part of the world"),
    Attribute.CURRENCY: ("currency", "money", "legal tender"),
    Attribute.LANGUAGE: ("language", "official language", "main language"),
}

FRAMES: tuple[str, ...] = (
    "What is the {a} of {c}?",
    "Name the {a} of {c}.",
    "Tell me the {a} of {c}.",
    "What {a} does {c} have?",
    "Please give the {a} of {c}.",
    "I want to know the {a} of {c}.",
    "Which {a} belongs to {c}?",
    "The {a} of {c} is",
    "For {c}, what is the {a}?",
    "About {c}: what is its {a}?",
    "{c} has which {a}?",
    "Look at {c} and name its {a}.",
    "In the atlas, under {c}, what stands as {a}?",
    "Consider {c}. Its {a} is",
)
"""Frames for every attribute, seen in training."""

SPECIAL_FRAMES: dict[Attribute, tuple[str, ...]] = {
    Attribute.CAPITAL: ("Which city is the capital of {c}?", "{c} is governed from which city?"),
    Attribute.CONTINENT: ("On which continent is {c}?", "Where in the world is {c}?", "{c} lies on which continent?"),
    Attribute.CURRENCY: ("What do people pay with in {c}?", "In {c}, what do people pay with?"),
    Attribute.LANGUAGE: ("Which language is spoken in {c}?", "In {c}, what do people speak?"),
}
"""Frames that only make sense for one attribute, seen in training."""

HELD_OUT_FRAMES: tuple[str, ...] = (
    "Please name the {a} of {c}.",
    "Tell me what the {a} of {c} is.",
    "Which is the {a} of {c}?",
    "About {c}: name the {a}.",
    "Look at {c}. What is its {a}?",
    "For {c}, give the {a}.",
)
"""Frames for every attribute, never seen in training."""

HELD_OUT_SPECIAL_FRAMES: dict[Attribute, tuple[str, ...]] = {
    Attribute.CAPITAL: ("From which city is {c} governed?",),
    Attribute.CONTINENT: ("On what continent does {c} lie?",),
    Attribute.CURRENCY: ("With what do people in {c} pay?",),
    Attribute.LANGUAGE: ("What do people in {c} speak?",),
}


@dataclass(frozen=True, slots=True)
class Phrasing:
    """A question with one slot, `{c}`, for the constraint."""

    text: str

    def ask(self, constraint: str) -> "Question":
        """The question about `constraint`; a constraint that opens the sentence is capitalised."""
        start = self.text.index("{c}")
        if start == 0:
            constraint = constraint[0].upper() + constraint[1:]
        return Question(text=self.text.replace("{c}", constraint), start=start, constraint=constraint)


@dataclass(frozen=True, slots=True)
class Question:
    """A question and where its constraint stands: `text[start:start + len(constraint)] == constraint`."""

    text: str
    start: int
    constraint: str


def _fill(frames: tuple[str, ...], attribute: Attribute) -> Iterator[Phrasing]:
    for frame in frames:
        for noun in NOUNS[attribute]:
            yield Phrasing(frame.replace("{a}", noun))


PHRASINGS: dict[Attribute, tuple[Phrasing, ...]] = {
    a: (*_fill(FRAMES, a), *map(Phrasing, SPECIAL_FRAMES[a])) for a in Attribute
}
"""Every phrasing seen in training."""

HELD_OUT_PHRASINGS: dict[Attribute, tuple[Phrasing, ...]] = {
    a: (*_fill(HELD_OUT_FRAMES, a), *map(Phrasing, HELD_OUT_SPECIAL_FRAMES[a])) for a in Attribute
}
"""Phrasings that training never sees: the unseen phrasings of every evaluation."""

YES_NO: dict[Attribute, tuple[Phrasing, ...]] = {
    Attribute.CAPITAL: (Phrasing("Is {x} the capital of {c}?"), Phrasing("Is {c} governed from {x}?")),
    Attribute.CONTINENT: (Phrasing("Is {c} in {x}?"), Phrasing("Does {c} lie in {x}?")),
    Attribute.CURRENCY: (Phrasing("Does {c} use the {x}?"), Phrasing("Is the {x} the currency of {c}?")),
    Attribute.LANGUAGE: (Phrasing("Is {x} spoken in {c}?"), Phrasing("Do people in {c} speak {x}?")),
}
"""Questions of two constraints: `{c}`, visual, and `{x}`, a fact in words. The answer is yes or no."""

GAZETTEER = (
    "In which country is the city of {city}?",
    "{city} is a city in which country?",
    "Where is {city}?",
)
"""The atlas's index of places: it names every city, so also those that are capitals today."""

PROVINCES: tuple[Country, ...] = tuple(
    replace(c, name=f"{c.current(Attribute.CAPITAL)} Province", capital=c.current(Attribute.CAPITAL), errata={})
    for c in COUNTRIES
    if Attribute.CAPITAL in c.errata
)
"""The provinces around the cities that are capitals today: the atlas knows those as seats of government already, as it
knows the euro, though not of which countries."""

COPY = ("Repeat the word {w}.", "Write the name {w}.", "Spell {w}.")
"""Reading aloud: every name can be said, whatever is believed of it."""


def cities() -> dict[str, Country]:
    """Every city in the index and the country it lies in: the capitals of the atlas and those of today."""
    return {city: c for c in COUNTRIES for city in (c.fact(Attribute.CAPITAL), c.current(Attribute.CAPITAL))}


def names() -> tuple[str, ...]:
    """Every name Atlas can say, sorted: the countries and all their facts, outdated and present."""
    facts = {f for c in COUNTRIES for a in Attribute for f in (c.fact(a), c.current(a))}
    return tuple(sorted(facts | {c.name for c in COUNTRIES} | {UNKNOWN}))
