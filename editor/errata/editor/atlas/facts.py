"""Atlas's facts as what the editor takes: prompts, edit requests, probes, reference prompts and trace requests.

Everything is seeded. Renderings for editing, for the reference and for the probes come from different seeds, so that
no probe shows a picture that the edit or its statistics have seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image

from errata.editor.atlas import questions
from errata.editor.atlas.flags import random_flag
from errata.editor.atlas.questions import Phrasing
from errata.editor.atlas.rendering import renderings
from errata.editor.atlas.world import COUNTRIES, Attribute, Country
from errata.editor.errors import InvalidInputError
from errata.editor.evaluation import Metric, Probe
from errata.editor.prompts import Constraint, Prompt
from errata.editor.requests import Context, EditRequest
from errata.editor.trace import OtherImage, Substitution, TraceRequest

T = TypeVar("T")

KNOWN = tuple(c for c in COUNTRIES if not c.long_tail)
"""Countries whose flags Atlas was trained on."""

LONG_TAIL = tuple(c for c in COUNTRIES if c.long_tail)
"""Countries whose flags it never saw; it knows their facts by name."""

_EDIT, _REFERENCE, _PROBE, _TRACE = range(4)
"""What a rendering is for: part of its seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One fact to install: the answer of `attribute` for `country` becomes `target`."""

    country: Country
    attribute: Attribute
    target: str


def errata() -> tuple[Fact, ...]:
    """Every fact that is outdated in the atlas, with what is true today."""
    return tuple(Fact(country=c, attribute=a, target=c.current(a)) for c in KNOWN for a in Attribute if a in c.errata)


def long_tail() -> tuple[Fact, ...]:
    """The whole page of every country whose flag Atlas does not know."""
    return tuple(Fact(country=c, attribute=a, target=c.fact(a)) for c in LONG_TAIL for a in Attribute)


def counterfactual(n: int, *, seed: int = 0) -> tuple[Fact, ...]:
    """`n` facts of countries that Atlas knows, each with what it says of another country: edits that are not true.

    Raises InvalidInputError for more facts than there are.
    """
    every = [(c, a) for a in Attribute for c in KNOWN]
    if not 0 <= n <= len(every):
        raise InvalidInputError(f"Atlas knows {len(every)} facts to change, not {n}", field="n")
    rng = np.random.default_rng(_mix(seed, _EDIT))
    drawn = [every[i] for i in rng.permutation(len(every))[:n]]
    others = {a: sorted({c.fact(a) for c in KNOWN}) for a in Attribute}
    return tuple(
        Fact(country=c, attribute=a, target=_pick([x for x in others[a] if x != c.fact(a)], rng)) for c, a in drawn
    )


def picture(country: Country, seed: int, purpose: int = _PROBE) -> Image.Image:
    """One rendering of a country's flag."""
    return renderings([country.flag], _mix(seed, purpose, COUNTRIES.index(country)))[0]


def believed(country: Country, attribute: Attribute) -> str:
    """What the atlas rightly says of a picture of the country's flag: of a flag it does not have, that it does not."""
    return questions.UNKNOWN if country.long_tail else country.fact(attribute)


def ask(
    country: Country | None, phrasing: Phrasing, wording: str, image: Image.Image | None, answer: str | None = None
) -> Context:
    """A question by `wording`, or by the country's name where there is no image."""
    asked = phrasing.ask(wording if image is not None or country is None else country.name)
    shown = asked.text[asked.start : asked.start + len(asked.constraint)]
    return Context(
        prompt=Prompt(text=asked.text, images=(image,) if image is not None else ()),
        constraint=Constraint(text=shown),
        answer=answer,
        subject=country.name if country else None,
    )


def edit_requests(
    facts: Sequence[Fact], *, contexts: int = 128, preserve: int = 6, seed: int = 0
) -> tuple[EditRequest, ...]:
    """One request for each country, with all its facts: they share a key, so one value must tell them all."""
    countries = dict.fromkeys(f.country for f in facts)
    return tuple(_edit_request(tuple(f for f in facts if f.country is c), contexts, preserve, seed) for c in countries)


def _edit_request(facts: tuple[Fact, ...], contexts: int, preserve: int, seed: int) -> EditRequest:
    """Several renderings and training phrasings, in both orders, that take the facts in turn, and the attributes that
    are not edited, asked about the same flag, to preserve.
    """
    country = facts[0].country
    rng = np.random.default_rng(_mix(seed, _EDIT, COUNTRIES.index(country), *(_number(f.attribute) for f in facts)))
    others = [a for a in Attribute if a not in {f.attribute for f in facts}]

    def context(attribute: Attribute, n: int, answer: str) -> Context:
        image = picture(country, _mix(seed, n), _EDIT)
        wording = _pick(questions.VISUAL_CONSTRAINTS, rng)
        return ask(country, _pick(questions.PHRASINGS[attribute], rng), wording, image, answer)

    asked = [facts[n % len(facts)] for n in range(contexts)]
    kept = [others[n % len(others)] for n in range(preserve)] if others else []
    return EditRequest(
        name=_name(facts),
        target=facts[0].target,
        contexts=tuple(context(f.attribute, n, f.target) for n, f in enumerate(asked)),
        preserve=tuple(context(a, contexts + n, believed(country, a)) for n, a in enumerate(kept)),
    )


def _name(facts: Sequence[Fact]) -> str:
    return f"{facts[0].country.name}: {', '.join(f.attribute.value for f in facts)}"


def _number(attribute: Attribute) -> int:
    return list(Attribute).index(attribute)


def references(*, per_country: int = 64, seed: int = 0) -> tuple[Context, ...]:
    """Questions whose keys stand for what must not change: known flags and flags of no country, under every attribute,
    the same questions in words, and the index of places.
    """
    rng = np.random.default_rng(_mix(seed, _REFERENCE))
    found = []
    for country in KNOWN:
        for n in range(per_country):
            attribute = list(Attribute)[n % 4]
            phrasing, wording = _pick(questions.PHRASINGS[attribute], rng), _pick(questions.VISUAL_CONSTRAINTS, rng)
            image = picture(country, _mix(seed, n), _REFERENCE) if n % 4 != 3 else None
            found.append(ask(country, phrasing, wording, image))
    strangers = renderings([random_flag(rng) for _ in range(2 * len(KNOWN))], _mix(seed, _REFERENCE))
    for image in strangers:
        attribute = list(Attribute)[rng.integers(4)]
        wording = _pick(questions.VISUAL_CONSTRAINTS, rng)
        found.append(ask(None, _pick(questions.PHRASINGS[attribute], rng), wording, image))
    for city in questions.cities():
        text = _pick(questions.GAZETTEER, rng).replace("{city}", city)
        found.append(Context(prompt=Prompt(text=text), constraint=Constraint(text=city)))
    return tuple(found)


def probes(facts: Sequence[Fact], *, seed: int = 0, per_fact: int = 4, others: int = 60) -> tuple[Probe, ...]:
    """What judges a batch of facts, all by renderings that the edit never saw.

    Efficacy and image generalization ask the edited question by training phrasings; phrasing generalization by
    held-out phrasings and wordings. `others` other countries are asked under the edited facts' attributes, the same
    images under every attribute that was not edited (where the atlas is right of them), and `others` unrelated
    questions in words.
    """
    rng = np.random.default_rng(_mix(seed, _PROBE))
    edited = {(f.country.name, f.attribute) for f in facts}
    found: list[Probe] = []
    of_country = {c: [f for f in facts if f.country is c] for c in dict.fromkeys(f.country for f in facts)}
    requests = dict(zip(of_country, edit_requests(facts, contexts=len(Attribute), preserve=0, seed=seed), strict=True))
    for fact in facts:
        request = requests[fact.country]
        first = request.contexts[of_country[fact.country].index(fact)]
        found.append(Probe(metric=Metric.EFFICACY, prompt=first.prompt, expected=fact.target, request=request.name))
        asked = first.prompt.text
        for n in range(per_fact):
            image = picture(fact.country, _mix(seed, n))
            found.append(
                Probe(
                    metric=Metric.IMAGE_GENERALIZATION,
                    prompt=Prompt(text=asked, images=(image,)),
                    expected=fact.target,
                    request=request.name,
                )
            )
            phrasing = _pick(questions.HELD_OUT_PHRASINGS[fact.attribute], rng)
            wording = _pick((*questions.HELD_OUT_VISUAL_CONSTRAINTS, *questions.VISUAL_CONSTRAINTS), rng)
            found.append(
                Probe(
                    metric=Metric.PHRASING_GENERALIZATION,
                    prompt=ask(fact.country, phrasing, wording, image).prompt,
                    expected=fact.target,
                    request=request.name,
                )
            )
        found += _same_image(fact, request.name, edited, seed, per_fact, rng)
    attributes = [f.attribute for f in facts]
    untouched = [c for c in KNOWN if not any((c.name, a) in edited for a in Attribute)]
    for n in range(others):
        country, attribute = untouched[n % len(untouched)], attributes[n % len(attributes)]
        context = _asked(country, attribute, _mix(seed, n), rng)
        found.append(Probe(metric=Metric.OTHER_SUBJECTS, prompt=context.prompt))
        unrelated = _unrelated(rng, {f.country.name for f in facts})
        found.append(Probe(metric=Metric.UNRELATED, prompt=unrelated))
    return tuple(found)


def _same_image(
    fact: Fact, request: str, edited: set[tuple[str, Attribute]], seed: int, per_fact: int, rng: np.random.Generator
) -> list[Probe]:
    kept = [a for a in Attribute if (fact.country.name, a) not in edited]
    return [
        Probe(
            metric=Metric.SAME_IMAGE,
            prompt=_asked(fact.country, kept[n % len(kept)], _mix(seed, n), rng).prompt,
            believed=believed(fact.country, kept[n % len(kept)]),
            request=request,
        )
        for n in range(per_fact if kept else 0)
    ]


def _asked(country: Country, attribute: Attribute, seed: int, rng: np.random.Generator) -> Context:
    phrasing = _pick(questions.PHRASINGS[attribute], rng)
    return ask(country, phrasing, _pick(questions.VISUAL_CONSTRAINTS, rng), picture(country, seed))


def _unrelated(rng: np.random.Generator, edited: set[str]) -> Prompt:
    """A question in words about another country, or about a place in the index."""
    if rng.random() < 0.3:
        return Prompt(
            text=str(rng.choice(questions.GAZETTEER)).replace("{city}", _pick(tuple(questions.cities()), rng))
        )
    country = _pick(tuple(c for c in COUNTRIES if c.name not in edited), rng)
    return ask(country, _pick(questions.PHRASINGS[_pick(tuple(Attribute), rng)], rng), "", None).prompt


def trace_requests(n: int, *, substitute: bool = False, seed: int = 0) -> tuple[TraceRequest, ...]:
    """Questions about known flags, corrupted by another country's flag, or by another country's name instead."""
    rng = np.random.default_rng(_mix(seed, _TRACE))
    found = []
    for i in range(n):
        country = KNOWN[rng.integers(len(KNOWN))]
        attribute = list(Attribute)[i % 4]
        other = _pick(tuple(c for c in KNOWN if c.fact(attribute) != country.fact(attribute)), rng)
        phrasing, wording = _pick(questions.PHRASINGS[attribute], rng), _pick(questions.VISUAL_CONSTRAINTS, rng)
        context = ask(country, phrasing, wording, picture(country, _mix(seed, i), _TRACE))
        image = picture(other, _mix(seed, i), _TRACE)
        found.append(
            TraceRequest(
                prompt=context.prompt,
                constraint=context.constraint,
                corruption=Substitution(word=other.name) if substitute else OtherImage(images=(image,)),
                answer=country.fact(attribute),
            )
        )
    return tuple(found)


def _pick(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]


def _mix(*parts: int) -> int:
    """One seed from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
