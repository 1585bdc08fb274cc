"""What Almanac knows, and where it keeps it: the causal trace by noise says which layer to edit."""

from collections.abc import Sequence

import numpy as np
from almanac_edits import World
from almanac_world import HELD_OUT, PHRASINGS, PORTRAITS, Person, Relation, portrait

from errata.editor.localization import choose_layers
from errata.editor.measurements.noise import NoiseSettings, measure_noise
from errata.editor.measurements.questions import Question
from errata.editor.model import EditableModel, same_answer
from errata.editor.prompts import Constraint, Prompt
from errata.editor.states import Component

Figures = dict[str, float | int | list[int] | list[float]]


def known(model: EditableModel, everyone: Sequence[Person]) -> Figures:
    """Shares of facts that are told right, by generation."""
    plain = [(PHRASINGS[r][0], p, p.facts[r]) for p in everyone for r in Relation]
    unseen = [(f, p, p.facts[r]) for p in everyone for r in Relation for f in HELD_OUT[r][:2]]
    portraits = [(PORTRAITS[0], p, portrait(p.facts)) for p in everyone]
    found: Figures = {}
    for name, asked in (("trained phrasing", plain), ("unseen phrasings", unseen), ("portraits", portraits)):
        answers = model.generate([Prompt(text=f.format(p.name)) for f, p, _ in asked], max_new_tokens=16)
        found[name] = float(np.mean([same_answer(a.text, e) for a, (_, _, e) in zip(answers, asked, strict=True)]))
        found[f"{name}, n"] = len(asked)
    return found


def traced(model: EditableModel, world: World, most: int = 60) -> Figures:
    """What restoring one MLP at the subject's last token restores of the total effect, by layer; the layers of AUTO.

    Of people who are never edited.
    """
    questions = [
        Question(
            prompt=Prompt(text=PHRASINGS[r][0].format(p.name)),
            constraints=(Constraint(text=p.name),),
            answer=p.facts[r],
        )
        for p in world.traced
        for r in Relation
    ][:most]
    averaged = measure_noise(model, questions, NoiseSettings(min_total_effect=-1.0)).average
    last = averaged.roles.index("constraint last")
    chosen = choose_layers(averaged)
    shares = {c.value: averaged.aie(c)[:, last] / averaged.total_effect for c in Component}
    return {
        "traced": len(averaged.traces),
        "total effect": averaged.total_effect,
        "layers": list(chosen.layers),
        **{f"{name} restores": [float(s) for s in share] for name, share in shares.items()},
    }
