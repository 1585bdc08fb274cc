"""The optimisation of values, against the full model in a loop, one request after another.

The plain way descends the same loss with the same optimiser, a hook on the MLP, and the full model: all of a request's
rows in one batch, as the published code runs them, those with the target and one that is preserved. Of many requests it
does the first and the last, and is told for all; of many steps the first ones, its preparation counted as one step.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import shapes
import torch
from measure import Case, Numbers, Way, hooked
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from errata.editor.atlas.world import COUNTRIES
from errata.editor.model import EditableModel, Encoded
from errata.editor.prompts import Constraint, Prompt
from errata.editor.requests import Context, EditRequest
from errata.editor.states import Component, component_module
from errata.editor.values import ValueSettings, optimise_values


def cases(quick: bool) -> Iterator[Case]:
    """LLaVA's shape, then text; 25 steps, as ROME's own settings have, and Errata's own most."""
    if quick:
        sees, reads = partial(shapes.llava, 64, 4, 36), partial(shapes.llama, 64, 4)
        yield case("LLaVA", sees(), requests=2, steps=2, sampled=2, goal=20)
        yield case("LLaVA, 12 pictures", sees(), requests=1, steps=2, sampled=1, goal=20, pictures=12)
        yield case("text", reads(), requests=2, steps=2, sampled=2, goal=5)
        yield case("text, 6 contexts", reads(), requests=2, steps=2, sampled=2, goal=5, before=BEFORE)
        return
    most = ValueSettings().steps
    sees, reads = partial(shapes.llava, 384, 8), partial(shapes.llama, 512, 12)
    for requests, steps, sampled in ((1, 25, 25), (1, most, 25), (16, 25, 25), (16, most, 10), (128, 25, 10)):
        yield case("LLaVA", sees(), requests, steps, sampled=sampled, goal=20)
    yield case("LLaVA, 12 pictures", sees(), 1, 25, sampled=4, goal=20, pictures=12)
    for requests, steps in ((1, 25), (1, most), (16, 25), (128, 25)):
        yield case("text", reads(), requests, steps, sampled=min(steps, 25), goal=5)
    for requests in (1, 16):
        yield case("text, 6 contexts", reads(), requests, 25, sampled=25, goal=5, before=BEFORE)


BEFORE = (
    "",
    "It has been a long day, and now I ask. ",
    "Of all the things that one could want to know: ",
    "Somebody wrote a letter and put this into it. ",
    "The book lay open on the table at this page. ",
    "You will be asked many questions; here is the first. ",
)
"""What stands before a prompt in each of its contexts: as many, and about as long, as in MEMIT's published code."""


def case(
    kind: str,
    model: EditableModel,
    requests: int,
    steps: int,
    sampled: int,
    goal: float,
    before: Sequence[str] = BEFORE[:1],
    pictures: int = 1,
) -> Case:
    """So many requests, and the plain way on `sampled` steps of the first and the last one."""
    batch = [_request(model, n, before, pictures) for n in range(requests)]
    some = batch[:1] if requests == 1 else [batch[0], batch[-1]]
    layer = len(model.layers) // 4
    # The loss never reaches 0, so that every request takes every step.
    settings = ValueSettings(steps=steps, stop_loss=0.0)
    answers = [a.text for a in model.generate([r.preserve[0].prompt for r in some])]
    width, layers = model.model.config.get_text_config().hidden_size, len(model.layers)
    tokens = len(model.encode(batch[0].contexts[0].prompt, batch[0].target).ids)
    done = 1.0 if sampled == steps else (sampled + 2) / (steps + 2)
    return Case(
        name=f"values of {requests} request{'s' * (requests > 1)}, {kind}, {steps} steps",
        about=f"{layers} layers of {width}, the edit at layer {layer}; {tokens} tokens a prompt",
        ways=[
            Way(name="Errata", run=partial(_ours, model, batch, layer, settings)),
            Way(
                name="the full model in a loop",
                run=partial(_loop, model, some, layer, settings, sampled, answers),
                share=done * len(some) / requests,
                of_ours=partial(_first_steps, sampled),
                goal=goal,
            ),
        ],
        tolerance=1e-3,
        rounds=5 if requests * steps < 400 else 3 if requests * steps <= 400 else 1,
    )


def _request(model: EditableModel, n: int, before: Sequence[str], pictures: int = 1) -> EditRequest:
    """Another picture each, or another country where the model sees none; a context a beginning and a picture."""
    images: list[tuple[Image.Image, ...]] = [()]
    spans = ("this country", "this flag")
    if model.image_token_id is None:
        names = [c.name for c in COUNTRIES]
        spans = (names[n % len(names)],) * 2
    else:
        images = [(shapes.picture(model, n * pictures + i),) for i in range(pictures)]
    texts = (f"What is the capital of {spans[0]} and what do they pay with?", f"On which continent is {spans[1]}?")
    asked = [
        Context(prompt=Prompt(text=b + texts[0], images=i, chat=False), constraint=Constraint(text=spans[0]))
        for b in before
        for i in images
    ]
    kept = Context(prompt=Prompt(text=texts[1], images=images[0], chat=False), constraint=Constraint(text=spans[1]))
    return EditRequest(name=str(n), contexts=tuple(asked), target="Rome", preserve=(kept,))


def _ours(model: EditableModel, requests: Sequence[EditRequest], layer: int, settings: ValueSettings) -> Numbers:
    """The target losses of the first and of the last request, step by step."""
    values = optimise_values(model, requests, layer, settings)
    return np.array([v.losses for v in (values[:1] if len(values) == 1 else [values[0], values[-1]])])


def _first_steps(sampled: int, ours: Numbers) -> Numbers:
    return ours[:, : sampled + 1]


def _loop(
    model: EditableModel,
    requests: Sequence[EditRequest],
    layer: int,
    settings: ValueSettings,
    steps: int,
    answers: Sequence[str],
) -> Numbers:
    """The target losses of each request, one after another."""
    return np.array(
        [_descent(model, r, layer, settings, steps, answer) for r, answer in zip(requests, answers, strict=True)]
    )


def _descent(
    model: EditableModel, request: EditRequest, layer: int, settings: ValueSettings, steps: int, answer: str
) -> list[float]:
    """The target loss at each step, by Adam on δ with the full model (the loss is that of module `values`)."""
    asked = [model.encode_at(c, request.target, field="contexts") for c in request.contexts]
    kept = [model.encode_at(c, answer, field="preserve") for c in request.preserve if answer]
    plain = _Plain(model, [*asked, *kept], layer)
    with torch.no_grad(), hooked(model.layers[layer - 1], plain.hear):
        before = [log.clone() for log in plain.log_probabilities(None)]
    start = plain.put_out[: len(asked)].mean(0)
    norms = (plain.put_out[: len(asked)].norm(dim=-1), plain.joined[: len(asked)].norm(dim=-1))
    scale = max(float(n.mean()) for n in norms)
    delta = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=settings.learning_rate / len(delta) ** 0.5)
    losses = []
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < settings.steps):
            log = plain.log_probabilities(start + delta * scale)
        target = torch.stack([-x.gather(-1, r.answer[:, None]).sum() for x, (r, _) in zip(log, asked, strict=False)])
        losses.append(float(target.detach().mean()))
        if step == settings.steps:
            break
        loss = target.mean() + settings.decay * delta.square().sum()
        for n in range(len(asked), len(before)):
            loss = loss + settings.kl_weight * (before[n].exp() * (before[n] - log[n])).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            delta.mul_((settings.clamp / delta.norm().clamp(min=1e-12)).clamp(max=1.0))
    return losses


class _Plain:
    """A request's rows in one batch, padded on the right, with a value in place of an MLP's output at each site."""

    def __init__(self, model: EditableModel, rows: Sequence[tuple[Encoded, int]], layer: int) -> None:
        self._model, self._rows = model, [row for row, _ in rows]
        self._at = torch.arange(len(rows)), torch.tensor([site for _, site in rows])
        self._mlp = component_module(model, model.layers[layer], Component.MLP)
        ids = pad_sequence([row.ids[:-1] for row in self._rows], batch_first=True)
        self._inputs = model.inputs([row.replaced(i) for row, i in zip(self._rows, ids, strict=True)])
        self._firsts = [row.prompt_length - 1 for row in self._rows]
        self._tail = ids.shape[1] - min(self._firsts)
        self.put_out = self.joined = torch.empty(0)

    def hear(self, output: Tensor) -> Tensor:
        """Keeps what the layer below put out at the sites."""
        self.joined = output[self._at].clone()
        return output

    def log_probabilities(self, value: Tensor | None) -> list[Tensor]:
        """Of each row's answer's tokens over the vocabulary."""

        def put(output: Tensor) -> Tensor:
            if value is None:
                self.put_out = output[self._at].clone()
                return output
            return output.index_put(self._at, value)

        with hooked(self._mlp, put):
            logits = self._model.model(**self._inputs, use_cache=False, logits_to_keep=self._tail).logits
        since = [first - min(self._firsts) for first in self._firsts]
        return [
            logits[n, s : s + len(row.answer)].float().log_softmax(-1)
            for n, (s, row) in enumerate(zip(since, self._rows, strict=True))
        ]
