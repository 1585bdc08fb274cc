"""An evaluation on Atlas: probes of the parent and of the child, against one question after another."""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from measure import Case, Numbers, Way

from errata.editor.atlas.facts import Fact, errata, long_tail, probes
from errata.editor.checkpoints import ATLAS, load_model
from errata.editor.delta import Delta, LowRank, applied
from errata.editor.evaluation import Probe, evaluate
from errata.editor.model import EditableModel, same_answer

TOKENS = 16
"""The most that an answer may have."""


def cases(quick: bool) -> Iterator[Case]:
    """A thousand probes of all of Atlas's errata and some of its long tail."""
    model = load_model(ATLAS)
    facts: Sequence[Fact] = (*errata(), *long_tail())
    asked = probes(facts[:2] if quick else facts, per_fact=1 if quick else 4, others=2 if quick else 250)
    # `believed` leaves probes out of the result; here all are asked, so that the plain way knows which they are.
    asked = tuple(Probe(metric=p.metric, prompt=p.prompt, expected=p.expected) for p in asked)[: 12 if quick else 1000]
    yield case(model, asked, every=3 if quick else 25)


def case(model: EditableModel, asked: Sequence[Probe], every: int) -> Case:
    """All probes, and the plain way on every n-th of them."""
    delta, sample = random_delta(model), asked[::every]
    images = len({p.prompt.images[0].tobytes() for p in asked if p.prompt.images})
    return Case(
        name=f"evaluation of {len(asked):,} probes",
        about=f"Atlas, before and after an edit, generated and teacher-forced; {images:,} pictures",
        ways=[
            Way(name="Errata", run=partial(_ours, model, asked, delta)),
            Way(
                name="one probe at a time",
                run=partial(_one_by_one, model, sample, delta),
                share=len(sample) / len(asked),
                of_ours=partial(_sampled, every),
            ),
        ],
        rounds=3,
    )


def random_delta(model: EditableModel) -> Delta:
    """An edit of one layer that changes some answers and not others."""
    random = torch.Generator().manual_seed(0)
    d, m = model.model.config.text_config.hidden_size, model.model.config.text_config.intermediate_size
    low = LowRank(a=torch.randn(4, m, generator=random) * 0.05, b=torch.randn(d, 4, generator=random) * 0.1)
    return Delta(base_sha256=model.base_sha256, layers={1: low}, modules={1: model.down_projection_name(1)})


def _ours(model: EditableModel, asked: Sequence[Probe], delta: Delta) -> Numbers:
    found = evaluate(model, asked, applied(model, delta), max_new_tokens=TOKENS)
    return np.array([[r.passed_before, r.passed, r.forced_before, r.forced] for r in found.results], dtype=np.float64)


def _sampled(every: int, ours: Numbers) -> Numbers:
    return ours[::every]


def _one_by_one(model: EditableModel, asked: Sequence[Probe], delta: Delta) -> Numbers:
    """Each probe alone, the same four figures."""
    found = []
    for probe in asked:
        before = model.generate([probe.prompt], max_new_tokens=TOKENS)[0].text
        expected = probe.expected if probe.expected is not None else before
        forced = [_teacher_forced(model, probe, expected)]
        with applied(model, delta):
            after = model.generate([probe.prompt], max_new_tokens=TOKENS)[0].text
            forced.append(_teacher_forced(model, probe, expected))
        found.append([same_answer(before, expected), same_answer(after, expected), *forced])
    return np.array(found, dtype=np.float64)


def _teacher_forced(model: EditableModel, probe: Probe, expected: str) -> float:
    row = model.encode(probe.prompt, expected)
    with torch.inference_mode():
        guesses = model.model(**model.inputs([row]), use_cache=False).logits[0].argmax(-1)
    return float((guesses[row.prompt_length - 1 : -1] == row.answer).float().mean())
