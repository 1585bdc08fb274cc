"""What is edited in Almanac's world, and the probes that judge it.

The people are divided once: those whose facts are edited, those on whom settings are chosen, those whose facts are
traced, and bystanders, of whom nothing is ever edited or told. Key statistics are of names that nobody has. A seed
draws the order, the relation that is edited of each person, and the new answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from almanac_world import ANSWERS, HELD_OUT, PHRASINGS, PORTRAITS, Person, Relation, people, portrait, strangers

from errata.editor.evaluation import Metric, Probe
from errata.editor.prompts import Constraint, Prompt
from errata.editor.requests import Context, EditRequest

TRIED, TRACED, BYSTANDERS = 100, 75, 75
"""People for choosing settings, for the causal trace, and for judging what must stay."""

STRANGERS = 1500
"""Names for the key statistics."""

EDITED_WITH = (0, 3, 4)
"""The phrasings of a request: the name at the beginning, in a question, and at the end. Each gives another key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One fact, and what it is to become."""

    person: Person
    relation: Relation
    target: str

    @property
    def name(self) -> str:
        """What its request and its probes are called by."""
        return f"{self.person.name}: {self.relation}"


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The people, divided."""

    edited: Sequence[Person]
    tried: Sequence[Person]
    traced: Sequence[Person]
    bystanders: Sequence[Person]


def divided(everyone: Sequence[Person] | None = None) -> World:
    """The same division every time; a smaller world has fewer of each."""
    everyone = people() if everyone is None else everyone
    share = len(everyone) / len(people())
    drawn = [everyone[i] for i in np.random.default_rng(17).permutation(len(everyone))]
    parts = []
    for size in (TRIED, TRACED, BYSTANDERS):
        n = max(2, round(size * share))
        parts.append(drawn[:n])
        drawn = drawn[n:]
    return World(tried=parts[0], traced=parts[1], bystanders=parts[2], edited=drawn)


def changes(those: Sequence[Person], seed: int) -> list[Change]:
    """One change of each person, in an order of the seed's, to another answer out of the closed set."""
    rng = np.random.default_rng([seed, 5])
    found = []
    for i in rng.permutation(len(those)).tolist():
        relation = tuple(Relation)[rng.integers(len(Relation))]
        others = [a for a in ANSWERS[relation] if a != those[i].facts[relation]]
        found.append(Change(person=those[i], relation=relation, target=str(rng.choice(others))))
    return found


def context(name: str, frame: str, answer: str | None = None) -> Context:
    """A phrasing about somebody."""
    prompt = Prompt(text=frame.format(name))
    return Context(prompt=prompt, constraint=Constraint(text=name), answer=answer, subject=name)


def request(change: Change) -> EditRequest:
    """The edit of one fact, which preserves what else is known of the person."""
    person = change.person
    others = [r for r in Relation if r is not change.relation]
    return EditRequest(
        name=change.name,
        contexts=tuple(context(person.name, PHRASINGS[change.relation][i]) for i in EDITED_WITH),
        target=change.target,
        preserve=tuple(context(person.name, PHRASINGS[r][0], person.facts[r]) for r in others),
    )


def references(everyone: Sequence[Person], number: int = STRANGERS) -> list[Context]:
    """What the key statistics are taken of: strangers, with the name at the beginning, in questions and at the end."""
    frames = [PHRASINGS[r][i] for r, i in zip((*Relation, Relation.TOWN), (0, *EDITED_WITH), strict=True)]
    return [context(name, frame) for name in strangers(number, everyone) for frame in frames]


def probes(done: Sequence[Change], world: World, portraits: int = 100) -> list[Probe]:
    """Of all that was edited, and of the bystanders.

    Portability: the portrait of an edited person tells the new fact and the old others; of so many, evenly spread.
    """
    found = []
    for change in done:
        person, frames = change.person, HELD_OUT[change.relation]
        asked = [(Metric.EFFICACY, PHRASINGS[change.relation][0])]
        asked += [(Metric.PHRASING_GENERALIZATION, f) for f in frames[:2]]
        found += [
            Probe(metric=m, prompt=Prompt(text=f.format(person.name)), expected=change.target, request=change.name)
            for m, f in asked
        ]
        found += [_stays(Metric.SAME_IMAGE, person, r, 0, change.name) for r in Relation if r is not change.relation]
    for change in done[:: max(1, len(done) // portraits)]:
        told = portrait({**change.person.facts, change.relation: change.target})
        prompt = Prompt(text=PORTRAITS[0].format(change.person.name))
        found.append(Probe(metric=Metric.PORTABILITY, prompt=prompt, expected=told, request=change.name))
    found += [_stays(Metric.OTHER_SUBJECTS, p, r, 0) for p in world.bystanders for r in Relation]
    return found


def _stays(metric: Metric, person: Person, relation: Relation, phrasing: int, request: str | None = None) -> Probe:
    """A fact that was right before and must be right after."""
    answer = person.facts[relation]
    prompt = Prompt(text=HELD_OUT[relation][phrasing].format(person.name))
    return Probe(metric=metric, prompt=prompt, expected=answer, believed=answer, request=request)


def texts(world: World) -> list[Prompt]:
    """What drift and fluency are measured on: portraits of bystanders, and questions about them."""
    portraits = [Prompt(text=PORTRAITS[0].format(p.name)) for p in world.bystanders]
    questions = [Prompt(text=PHRASINGS[r][0].format(p.name)) for p in world.bystanders for r in Relation]
    return portraits + questions
