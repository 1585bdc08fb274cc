"""The optimisation of values, against the full model in a loop, one request after another.

The plain way descends the same loss with the same optimiser, a hook on the MLP, and full rows of the model: one with
the target, one that is preserved. It is timed on the first steps of one request, and told for all.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import shapes
import torch
from measure import Case, Numbers, Way, hooked
from PIL import Image
from torch import Tensor

from errata.editor.atlas.world import COUNTRIES
from errata.editor.model import EditableModel
from errata.editor.prompts import Constraint, Prompt
from errata.editor.requests import Context, EditRequest
from errata.editor.states import Component, component_module
from errata.editor.values import ValueSettings, optimise_values


def cases(quick: bool) -> Iterator[Case]:
    """LLaVA's shape, then text; 25 steps, as ROME's own settings have, and Errata's own most."""
    if quick:
        yield case("LLaVA", shapes.llava(64, 4, 36), requests=2, steps=2, sampled=2, goal=20)
        yield case("text", shapes.llama(64, 4), requests=2, steps=2, sampled=2, goal=5)
        return
    for requests, steps in ((1, 25), (1, ValueSettings().steps), (16, 25), (16, ValueSettings().steps), (128, 25)):
        yield case("LLaVA", shapes.llava(384, 8), requests, steps, sampled=2, goal=20)
    for requests, steps in ((1, 25), (1, ValueSettings().steps), (16, 25), (128, 25)):
        yield case("text", shapes.llama(512, 12), requests, steps, sampled=25, goal=5)


def case(kind: str, model: EditableModel, requests: int, steps: int, sampled: int, goal: float) -> Case:
    """So many requests, and the plain way on `sampled` steps of the first one."""
    batch = [_request(model, n) for n in range(requests)]
    layer = len(model.layers) // 4
    # The loss never reaches 0, so that every request takes every step.
    settings = ValueSettings(steps=steps, stop_loss=0.0)
    answer = model.generate([batch[0].preserve[0].prompt])[0].text
    width, layers = model.model.config.get_text_config().hidden_size, len(model.layers)
    tokens = len(model.encode(batch[0].contexts[0].prompt, batch[0].target).ids)
    return Case(
        name=f"values of {requests} request{'s' * (requests > 1)}, {kind}, {steps} steps",
        about=f"{layers} layers of {width}, the edit at layer {layer}; {tokens} tokens a prompt",
        ways=[
            Way(name="Errata", run=partial(_ours, model, batch, layer, settings)),
            Way(
                name="the full model in a loop",
                run=partial(_loop, model, batch[0], layer, settings, sampled, answer),
                share=(sampled + 1) / (steps + 1) / requests,
                of_ours=partial(_first_steps, sampled),
                goal=goal,
            ),
        ],
        tolerance=1e-3,
        rounds=5 if requests * steps < 400 else 3 if requests * steps <= 400 else 1,
    )


def _request(model: EditableModel, n: int) -> EditRequest:
    """Another picture each, or another country where the model sees none."""
    images: tuple[Image.Image, ...] = ()
    spans = ("this country", "this flag")
    if model.image_token_id is None:
        names = [c.name for c in COUNTRIES]
        spans = (names[n % len(names)],) * 2
    else:
        images = (shapes.picture(model, n),)
    texts = (f"What is the capital of {spans[0]} and what do they pay with?", f"On which continent is {spans[1]}?")
    asked, kept = (
        Context(prompt=Prompt(text=t, images=images, chat=False), constraint=Constraint(text=s))
        for t, s in zip(texts, spans, strict=True)
    )
    return EditRequest(name=str(n), contexts=(asked,), target="Rome", preserve=(kept,))


def _ours(model: EditableModel, requests: Sequence[EditRequest], layer: int, settings: ValueSettings) -> Numbers:
    values = optimise_values(model, requests, layer, settings)
    return np.array(values[0].losses)


def _first_steps(sampled: int, ours: Numbers) -> Numbers:
    return ours[: sampled + 1]


def _loop(
    model: EditableModel, request: EditRequest, layer: int, settings: ValueSettings, steps: int, answer: str
) -> Numbers:
    """The target loss at each step, by Adam on δ with the full model (the loss is that of module `values`)."""
    rows = [model.encode_at(request.contexts[0], request.target, field="contexts")]
    if answer:
        rows.append(model.encode_at(request.preserve[0], answer, field="preserve"))
    mlp = component_module(model, model.layers[layer], Component.MLP)
    stream: list[Tensor] = []

    def log_probabilities(n: int, value: Tensor | None) -> Tensor:
        row, site = rows[n]

        def put(output: Tensor) -> Tensor:
            if value is None:
                stream.append(output[0, site].clone())
                return output
            return torch.cat([output[:, :site], value[None, None], output[:, site + 1 :]], dim=1)

        inputs = model.inputs([row.replaced(row.ids[:-1])])
        with hooked(mlp, put):
            logits = model.model(**inputs, use_cache=False, logits_to_keep=len(row.answer)).logits
        log: Tensor = logits[0].float().log_softmax(-1)
        return log

    def hear(output: Tensor) -> Tensor:
        stream.append(output[0, rows[0][1]])
        return output

    with torch.no_grad(), hooked(model.layers[layer - 1], hear):
        before = [log_probabilities(n, None) for n in range(len(rows))]
    into, start = stream[0], stream[1]
    scale = max(float(into.norm()), float(start.norm()))
    delta = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=settings.learning_rate / len(delta) ** 0.5)
    losses = []
    for _ in range(steps + 1):
        value = start + delta * scale
        target = -log_probabilities(0, value).gather(-1, rows[0][0].answer[:, None]).sum()
        losses.append(float(target.detach()))
        loss = target + settings.decay * delta.square().sum()
        if len(rows) > 1:
            loss = loss + settings.kl_weight * (before[1].exp() * (before[1] - log_probabilities(1, value))).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            delta.mul_((settings.clamp / delta.norm().clamp(min=1e-12)).clamp(max=1.0))
    return np.array(losses)
