"""The causal trace by noise on GPT-2 small's shape, against one full batch of all draws a site, with a hook."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import cast

import numpy as np
import shapes
import torch
from measure import Case, Numbers, Way, hooked
from torch import Tensor, nn

from errata.editor.measurements.noise import NoiseSettings, constraint_noise, measure_noise
from errata.editor.measurements.questions import Question
from errata.editor.model import EditableModel, Encoded
from errata.editor.prompts import Constraint, Prompt
from errata.editor.states import Component, component_module

Site = tuple[int, int, int]
"""Component, layer, and token after the constraint's first one."""

COMPONENTS = (Component.MLP, Component.ATTENTION, Component.LAYER)


def cases(quick: bool) -> Iterator[Case]:
    """Nine tokens from the constraint on."""
    model = shapes.gpt2(64, 2, 5000) if quick else shapes.gpt2()
    yield case(
        model, "Estonia is the capital of this country", "Estonia", sites=2 if quick else 6, draws=3 if quick else 10
    )


def case(model: EditableModel, text: str, subject: str, sites: int, draws: int) -> Case:
    """One question, whose own answer is traced, and the plain way on so many sites."""
    prompt, constraint = Prompt(text=text, chat=False), Constraint(text=subject)
    answer = next(w for w in re.findall(r"\w+", model.generate([prompt])[0].text))
    settings = NoiseSettings(draws=draws, components=COMPONENTS, min_total_effect=-1.0)
    question = Question(prompt=prompt, constraints=(constraint,), answer=answer)
    clean = model.encode(prompt, answer)
    span = clean.positions(*constraint.span(text))
    embeddings = cast(nn.Embedding, model.model.get_input_embeddings())
    with torch.no_grad():
        deviation = float(embeddings(clean.ids[span.start : span.stop]).double().std())
    noise = constraint_noise(settings, deviation, len(span), embeddings.embedding_dim)
    shape = (len(COMPONENTS), len(model.layers), clean.prompt_length - span.start)
    flat = np.linspace(0, np.prod(shape) - 1, sites, dtype=int)
    chosen = [(int(c), int(i), int(t)) for c, i, t in zip(*np.unravel_index(flat, shape), strict=True)]
    states = _clean_states(model, clean, span.start, chosen)
    return Case(
        name=f"trace by noise, {shape[1]} layers of {noise.shape[-1]}",
        about=f"{shape[2]} tokens × {shape[1]} layers × 3 components × {draws} draws",
        ways=[
            Way(name="Errata", run=partial(_ours, model, question, settings)),
            Way(
                name="one full batch a site",
                run=partial(_one_batch, model, clean, span, noise, states),
                share=sites / int(np.prod(shape)),
                of_ours=partial(_picked, chosen),
                goal=4,
            ),
        ],
        rounds=3,
    )


def _ours(model: EditableModel, question: Question, settings: NoiseSettings) -> Numbers:
    return measure_noise(model, [question], settings).traces[0].restored


def _picked(chosen: Sequence[Site], ours: Numbers) -> Numbers:
    return np.stack([ours[:, c, i, t] for c, i, t in chosen])


def _clean_states(model: EditableModel, clean: Encoded, start: int, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """The clean run's states at the sites, which are not timed."""
    states = {}
    for component, layer, token in sites:

        def keep(output: Tensor, at: Site = (component, layer, token)) -> Tensor:
            states[at] = output[0, start + at[2]].clone()
            return output

        with hooked(component_module(model, model.layers[layer], COMPONENTS[component]), keep):
            _answer_probabilities(model, clean, 1)
    return states


def _one_batch(model: EditableModel, clean: Encoded, span: range, noise: Tensor, states: dict[Site, Tensor]) -> Numbers:
    """All draws of a site in one batch of the full model."""

    def corrupt(output: Tensor) -> Tensor:
        output = output.clone()
        output[:, span.start : span.stop] += noise
        return output

    found = []
    for (component, layer, token), state in states.items():

        def restore(output: Tensor, at: int = span.start + token, state: Tensor = state) -> Tensor:
            output = output.clone()
            output[:, at] = state
            return output

        module = component_module(model, model.layers[layer], COMPONENTS[component])
        with hooked(model.model.get_input_embeddings(), corrupt), hooked(module, restore):
            found.append(_answer_probabilities(model, clean, len(noise)))
    return np.array(found)


def _answer_probabilities(model: EditableModel, row: Encoded, rows: int) -> list[float]:
    """p(whole answer) in each of so many equal rows."""
    with torch.no_grad():
        inputs = model.inputs([row.replaced(row.ids[:-1])] * rows)
        logits = model.model(**inputs, use_cache=False, logits_to_keep=len(row.answer)).logits
    chosen = logits.float().log_softmax(-1).gather(-1, row.answer.expand(rows, -1)[..., None])
    probabilities: list[float] = chosen[..., 0].double().sum(-1).exp().tolist()
    return probabilities
