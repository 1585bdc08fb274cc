"""A prompt that is longer than the model's context is refused with the numbers, whichever way it is given.

On absolute positions (GPT-2), which end there, and on rotary ones (Llama), which would go on to nonsense.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
from tiny import question

from errata.editor.baselines import FineTuneSettings, fine_tune
from errata.editor.delta import empty_delta
from errata.editor.errors import PromptError
from errata.editor.evaluation import Metric, Probe, evaluate, next_token_logits
from errata.editor.measurements.attention import measure_attention
from errata.editor.measurements.constraints import measure_constraints
from errata.editor.measurements.failure import measure_failure
from errata.editor.measurements.knockout import KnockoutSettings, measure_knockout
from errata.editor.measurements.lens import measure_lens
from errata.editor.measurements.noise import measure_noise
from errata.editor.measurements.questions import Question
from errata.editor.measurements.readout import measure_readout
from errata.editor.measurements.sweep import SweepRequest, measure_sweep
from errata.editor.measurements.swept import SweepSettings
from errata.editor.measurements.windows import measure_windows
from errata.editor.methods import EditSettings, Method, edit
from errata.editor.model import EditableModel
from errata.editor.prompts import Constraint, Prompt
from errata.editor.requests import Context, EditRequest
from errata.editor.states import Component
from errata.editor.statistics import key_statistics
from errata.editor.trace import Substitution, TraceRequest, TraceSettings, average, trace
from errata.editor.values import optimise_values

CONSTRAINT = Constraint(text="this country")
SETTINGS = EditSettings(layers=(1,), method=Method.MULTEDIT)
SAID = r'the prompt "q+…" has 300 tokens, those of images included; the context of \'tiny-\w+\' holds 256'


def long(model: EditableModel) -> Prompt:
    text = " this country"
    others = len(model.encode(Prompt(text="q" + text, chat=False)).ids) - 1
    return Prompt(text="q" * (300 - others) + text, chat=False)


def context(model: EditableModel) -> Context:
    return Context(prompt=long(model), constraint=CONSTRAINT)


def request(model: EditableModel, *, preserve: bool = False) -> EditRequest:
    short = Context(prompt=question(model), constraint=CONSTRAINT)
    contexts, kept = ((short,), (context(model),)) if preserve else ((context(model),), ())
    return EditRequest(name="rome", contexts=contexts, target="Rome", preserve=kept)


def probe(model: EditableModel) -> Probe:
    return Probe(metric=Metric.EFFICACY, prompt=long(model), expected="Rome")


def asked(model: EditableModel) -> list[Question]:
    wrong = Substitution(word="Paris")
    return [Question(prompt=long(model), constraints=(CONSTRAINT,), corruptions=(wrong,), answer="Rome")]


def traced(model: EditableModel, prompt: Prompt) -> Any:
    corrupted = Substitution(word="Paris")
    wanted = TraceRequest(prompt=prompt, constraint=CONSTRAINT, corruption=corrupted, answer="Rome")
    return trace(model, wanted, TraceSettings(components=(Component.MLP,), min_total_effect=-1))


def swept(model: EditableModel) -> object:
    found = average([traced(model, question(model))])
    wanted = SweepRequest(request=request(model), probes=(probe(model),))
    return measure_sweep(model, [wanted], SweepSettings(layers=(1,), method=Method.MULTEDIT), trace=found)


ENTRIES: Mapping[str, Callable[[EditableModel], object]] = {
    "encode": lambda m: m.encode(long(m)),
    "encode with an answer": lambda m: m.encode(long(m), "Rome"),
    "generate": lambda m: m.generate([question(m), long(m)]),
    "constraint": lambda m: m.constraint_positions(long(m), CONSTRAINT),
    "trace": lambda m: traced(m, long(m)),
    "edit": lambda m: edit(m, [request(m)], SETTINGS),
    "edit, preserved": lambda m: edit(m, [request(m, preserve=True)], SETTINGS),
    "values": lambda m: optimise_values(m, [request(m)], 1),
    "fine-tuning": lambda m: fine_tune(m, [request(m)], FineTuneSettings(layers=(1,))),
    "statistics": lambda m: key_statistics(m, [question(m), long(m)], (1,)),
    "statistics at constraints": lambda m: key_statistics(m, [context(m)], (1,)),
    "evaluate": lambda m: evaluate(m, [probe(m)], nullcontext()),
    "evaluate, reference": lambda m: evaluate(m, [], nullcontext(), reference=[long(m)]),
    "next token": lambda m: next_token_logits(m, [long(m)]),
    "attention": lambda m: measure_attention(m, asked(m)),
    "constraints": lambda m: measure_constraints(m, asked(m)),
    "failure": lambda m: measure_failure(m, asked(m)),
    "knockout": lambda m: measure_knockout(m, asked(m), KnockoutSettings(pairs=("constraint->last",))),
    "lens": lambda m: measure_lens(m, asked(m)),
    "noise": lambda m: measure_noise(m, asked(m)),
    "readout": lambda m: measure_readout(m, asked(m), delta=empty_delta(m)),
    "windows": lambda m: measure_windows(m, asked(m)),
    "sweep": swept,
}


@pytest.fixture(params=["gpt2", "llama"])
def text_model(request: pytest.FixtureRequest) -> EditableModel:
    found: EditableModel = request.getfixturevalue(request.param)
    return found


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_prompt_longer_than_the_context_is_refused_with_the_numbers(text_model: EditableModel, entry: str) -> None:
    with pytest.raises(PromptError, match=SAID) as refused:
        ENTRIES[entry](text_model)
    assert refused.value.field.endswith("prompt.text")
