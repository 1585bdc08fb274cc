"""The arithmetic of large models counts what is really multiplied, and its page says what it prints."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

ROOT = Path(__file__).parents[1]
# The folders of tests are no packages; `tiny` is imported by name.
sys.path.append(str(ROOT / "tests" / "editor"))

from tiny import tiny_model  # noqa: E402

from errata.editor.model import EditableModel  # noqa: E402
from errata.editor.prompts import Constraint, Prompt  # noqa: E402
from errata.editor.requests import Context, EditRequest  # noqa: E402
from errata.editor.states import Component  # noqa: E402
from errata.editor.trace import Substitution, TraceRequest, TraceSettings, trace  # noqa: E402
from errata.editor.values import ValueSettings, optimise_values  # noqa: E402

ASKED = Prompt(text="In words alone, what is the capital of this country, and where does it lie?")
WHERE = Constraint(text="this country")
ANSWER = "the capital of this country"
FEW = (Component.MLP, Component.LAYER)


@pytest.fixture
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("arithmetic")


@pytest.fixture
def llama() -> EditableModel:
    """Of 4 layers, and with half as many heads of keys as of queries."""
    model = tiny_model("llama")
    model.model.set_attn_implementation("eager")  # torch does not count its fused attention on a CPU
    return model


def shape_of(arithmetic: ModuleType, model: EditableModel) -> Any:
    config = model.model.config
    return arithmetic.Shape(
        name="tiny",
        width=config.hidden_size,
        inner=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocabulary=config.vocab_size,
    )


def question_of(arithmetic: ModuleType, model: EditableModel) -> Any:
    row = model.encode(ASKED, ANSWER)
    span = row.positions(*WHERE.span(ASKED.text))
    traced = row.prompt_length - span.start
    return arithmetic.Question(before=span.start, traced=traced, answer=len(row.answer), constraint=len(span))


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def test_a_traces_products_are_those_that_torch_counts(arithmetic: ModuleType, llama: EditableModel) -> None:
    shape, question = shape_of(arithmetic, llama), question_of(arithmetic, llama)
    request = TraceRequest(prompt=ASKED, constraint=WHERE, corruption=Substitution(word="capital"), answer=ANSWER)
    real = counted(lambda: trace(llama, request, TraceSettings(components=FEW, min_total_effect=-1.0)))
    assert arithmetic.trace_operations(shape, question, len(FEW)) == real
    assert question.traced > 5
    assert question.before > 3


def test_a_descents_products_are_those_that_torch_counts(arithmetic: ModuleType, llama: EditableModel) -> None:
    shape, question = shape_of(arithmetic, llama), question_of(arithmetic, llama)
    request = EditRequest(name="fact", target=ANSWER, contexts=(Context(prompt=ASKED, constraint=WHERE),))

    def products(steps: int, layer: int) -> int:
        settings = ValueSettings(steps=steps, stop_loss=0.0)
        return counted(lambda: optimise_values(llama, [request], layer, settings))

    for layer in (0, 2):
        a_step = (products(3, layer) - products(1, layer)) / 2
        assert arithmetic.step_operations(shape, question, layer) == a_step


def test_the_shapes_have_the_parameters_of_the_models_that_they_are_of(arithmetic: ModuleType) -> None:
    tower = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    for shape in arithmetic.SHAPES:
        config = LlamaConfig(
            hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocabulary,
        )  # fmt: skip
        with torch.device("meta"):
            model = (
                LlavaForConditionalGeneration(LlavaConfig(vision_config=tower, text_config=config))
                if shape.image_tokens
                else LlamaForCausalLM(config)
            )
        told = shape.linear_parameters + shape.other_parameters
        assert told == pytest.approx(sum(p.numel() for p in model.parameters()), rel=1e-3)


def test_the_pages_tables_are_what_the_command_prints() -> None:
    command = [sys.executable, "benchmarks/arithmetic.py"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs" / "large-models.md").read_text(encoding="utf-8")
    tables = [block for block in printed.split("\n\n") if block.startswith("|")]
    assert len(tables) == 5
    for made in tables:
        assert made.strip() in page
