"""The causal trace of one question about a picture, against the full model at every site.

(a) three full rows a site, clean, corrupted and restored, as the published code runs them; (b) the clean states
recorded once and one full row a site, with a hook. Both are timed on sites spread over layers, components and tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np
import shapes
import torch
from measure import Case, Numbers, Way, hooked
from torch import Tensor

from errata.editor.model import EditableModel, Encoded
from errata.editor.prompts import Constraint, Prompt
from errata.editor.states import Component, component_module
from errata.editor.trace import Substitution, TraceRequest, TraceSettings, trace

Site = tuple[int, int, int]
"""Component, layer, and token after the constraint's first one."""

COMPONENTS = (Component.MLP, Component.ATTENTION, Component.LAYER)
QUESTION = "What is the capital of this country and on which continent does it lie?"


def cases(quick: bool) -> Iterator[Case]:
    """LLaVA's shape, 12 and 32 layers."""
    if quick:
        yield case(shapes.llava(64, 2, 36), sites=3)
        return
    for width, layers in ((512, 12), (384, 32)):
        yield case(shapes.llava(width, layers), sites=4)


def growth(quick: bool) -> Iterator[Case]:
    """One axis at a time: layers, tokens of the image before the question, tokens that are traced."""
    width, few, image = (64, 2, 36) if quick else (256, 12, 576)
    for layers in (2, 4) if quick else (8, 16, 24, 32):
        yield _on("layers", layers, case(shapes.llava(width, layers, image), sites=2))
    for side in (4, 6) if quick else (6, 12, 24, 36):
        yield _on("tokens of the image", side**2, case(shapes.llava(width, few, side**2), sites=2))
    for repeats in (1, 2) if quick else (1, 2, 4, 8):
        asked, model = QUESTION + " Answer in one word." * (repeats - 1), shapes.llava(width, few, image)
        yield _on("tokens traced", len(traced(model, asked)), case(model, sites=2, asked=asked))


def _on(axis: str, size: int, measured: Case) -> Case:
    return replace(measured, name=f"growth: {size:,} {axis}", axis=axis, size=size)


def case(model: EditableModel, sites: int, asked: str = QUESTION) -> Case:
    """One question, and the plain ways on so many sites."""
    request = TraceRequest(
        prompt=Prompt(text=asked, images=(shapes.picture(model, 0),), chat=False),
        constraint=Constraint(text="this country"),
        corruption=Substitution(word="Paris"),
        answer="Rome",
    )
    # An untrained model believes nothing, so that no total effect is too small.
    settings = TraceSettings(components=COMPONENTS, min_total_effect=-1.0)
    clean = model.encode(request.prompt, request.answer)
    tokens = traced(model, asked)
    ids = clean.ids.clone()
    span = clean.positions(*request.constraint.span(asked))
    ids[span.start : span.stop] = model.tokenizer(" Paris", add_special_tokens=False)["input_ids"][0]
    corrupted = clean.replaced(ids)
    shape = (len(COMPONENTS), len(model.layers), len(tokens))
    flat = np.linspace(0, np.prod(shape) - 1, sites + 2, dtype=int)[1:-1]
    chosen = [(int(c), int(i), int(t)) for c, i, t in zip(*np.unravel_index(flat, shape), strict=True)]
    ours, states = partial(_ours, model, request, settings), clean_states(model, clean, tokens.start, chosen)
    three = partial(three_rows, model, clean, corrupted, tokens.start, chosen)
    one = partial(one_row, model, states, corrupted, tokens.start, chosen)
    share, picked = sites / int(np.prod(shape)), partial(_picked, chosen)
    width, images = model.model.config.get_text_config().hidden_size, len(clean.images[0])
    return Case(
        name=f"causal trace, {shape[1]} layers of {width}, {images} + {len(clean.ids) - images} tokens",
        about=f"{np.prod(shape):,} sites of one question: {shape[2]} tokens × {shape[1]} layers × 3 components",
        ways=[
            Way(name="Errata", run=ours),
            Way(name="three full rows a site", run=three, share=share, of_ours=picked, goal=100),
            Way(name="one full row a site", run=one, share=share, of_ours=picked, goal=25),
        ],
    )


def traced(model: EditableModel, asked: str) -> range:
    """The tokens of the sites: from the constraint's first to the prompt's last."""
    row = model.encode(Prompt(text=asked, images=(shapes.picture(model, 0),), chat=False))
    return range(row.positions(*Constraint(text="this country").span(asked)).start, row.prompt_length)


def _ours(model: EditableModel, request: TraceRequest, settings: TraceSettings) -> Numbers:
    return trace(model, request, settings).restored


def _picked(chosen: Sequence[Site], ours: Numbers) -> Numbers:
    return np.array([ours[site] for site in chosen])


def three_rows(model: EditableModel, clean: Encoded, corrupted: Encoded, start: int, sites: Sequence[Site]) -> Numbers:
    """Clean, corrupted and restored in one batch a site: the third row takes the first one's state."""
    found = []
    for component, layer, token in sites:

        def restore(output: Tensor, at: int = start + token) -> Tensor:
            output = output.clone()
            output[2, at] = output[0, at]
            return output

        module = component_module(model, model.layers[layer], COMPONENTS[component])
        with hooked(module, restore):
            found.append(_answer_probabilities(model, [clean, corrupted, corrupted])[2])
    return np.array(found)


def one_row(
    model: EditableModel, states: dict[Site, Tensor], corrupted: Encoded, start: int, sites: Sequence[Site]
) -> Numbers:
    """The corrupted row alone for each site, with the clean state put back by a hook."""
    found = []
    for component, layer, token in sites:

        def restore(output: Tensor, at: int = start + token, state: Tensor = states[component, layer, token]) -> Tensor:
            output = output.clone()
            output[:, at] = state
            return output

        with hooked(component_module(model, model.layers[layer], COMPONENTS[component]), restore):
            found += _answer_probabilities(model, [corrupted])
    return np.array(found)


def clean_states(model: EditableModel, clean: Encoded, start: int, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """The clean run's states at the sites. One run serves all of them, so that it is not timed."""
    states: dict[Site, Tensor] = {}
    with ExitStack() as hooks:
        for site in sites:
            component, layer, token = site

            def keep(output: Tensor, at: Site = site, token: int = start + token) -> Tensor:
                states[at] = output[0, token].clone()
                return output

            hooks.enter_context(hooked(component_module(model, model.layers[layer], COMPONENTS[component]), keep))
        _answer_probabilities(model, [clean])
    return states


def _answer_probabilities(model: EditableModel, rows: Sequence[Encoded]) -> list[float]:
    """p(whole answer) of each row, from the full model."""
    length, answer = rows[0].prompt_length, rows[0].answer
    with torch.no_grad():
        inputs = model.inputs([r.replaced(r.ids[:-1]) for r in rows])
        logits = model.model(**inputs, use_cache=False, logits_to_keep=len(answer)).logits
    assert inputs["input_ids"].shape[1] == length + len(answer) - 1
    chosen = logits.float().log_softmax(-1).gather(-1, answer.expand(len(rows), -1)[..., None])
    probabilities: list[float] = chosen[..., 0].double().sum(-1).exp().tolist()
    return probabilities
