"""Attention contributions against the definition, head by head (methods.md §3; Basu et al. 2024, §4)."""

import dataclasses
import re
from functools import cache

import numpy as np
import oracle
import pytest
import torch
from tiny import ARCHITECTURES, FAMILIES, PATCHES, picture, question, said, tiny_model, tokenizer
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig

from errata.editor.atlas.facts import trace_requests
from errata.editor.checkpoints import ATLAS, load_model
from errata.editor.errors import CancelledError, InvalidInputError
from errata.editor.measurements.attention import AttentionSettings, measure_attention
from errata.editor.measurements.contributions import contributions, output_factors
from errata.editor.measurements.findings import HeatMap, LinePlot, Overlay
from errata.editor.measurements.questions import Question
from errata.editor.model import EditableModel, Encoded
from errata.editor.prompts import Constraint, Prompt

IMAGE, LAST = "image->constraint", "constraint->last"


@cache
def eager(family: str) -> EditableModel:
    """The same weights as the fixture's, attending in the way that shows its weights."""
    model = tiny_model(family)
    model.model.set_attn_implementation("eager")
    return model


def defined(model: EditableModel, row: Encoded) -> Tensor:
    """‖A[i,j]·(x_j W_V W_O)_h‖ for every i and j, layers × heads × i × j: the vectors in full, in float64."""
    inputs: list[Tensor] = []
    attention = [oracle.block(model, "attention", i) for i in range(len(model.layers))]
    hooks = [
        block.register_forward_pre_hook(
            lambda _module, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for block in attention
    ]
    with torch.no_grad():
        out = model.model(input_ids=row.ids[None], **row.vision, use_cache=False, output_attentions=True)
    for hook in hooks:
        hook.remove()
    layers = []
    for block, x, weights in zip(attention, inputs, out.attentions, strict=True):
        values, projection = _values(block, x[0])
        moved = torch.einsum("jhv,hvd->hjd", values.double(), projection.double())
        layers.append(weights[0].double() * moved.norm(dim=-1)[:, None])
    return torch.stack(layers)


def _values(block: torch.nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Each of the four heads' values, tokens × heads × 8, and its part of W_O, heads × 8 × 32."""
    if hasattr(block, "c_attn"):
        return block.c_attn(x)[:, 64:].view(-1, 4, 8), block.c_proj.weight.view(4, 8, 32)
    shared = block.v_proj(x).view(len(x), -1, 8)
    return shared.repeat_interleave(4 // shared.shape[1], dim=1), block.o_proj.weight.T.reshape(4, 8, 32)


def family_of(model: EditableModel) -> str:
    return model.name.removeprefix("tiny-")


def asked(model: EditableModel, text: str = "What is the capital of this country?", seed: int = 0) -> Question:
    prompt = question(model, text, seed)
    return Question(prompt=prompt, constraints=(Constraint(text="this country"),), answer=said(model, prompt))


def assert_close(found: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.as_tensor(expected).double(), rtol=1e-5, atol=1e-6
    )


def test_contributions_are_the_lengths_of_what_each_head_adds(model: EditableModel) -> None:
    row = model.encode(asked(model).prompt, "Rome")
    targets = [row.prompt_length - 1, 3, len(row.ids) - 1]
    found = contributions(model, [row], [targets], output_factors(model))[0].lengths
    assert_close(found, defined(eager(family_of(model)), row)[:, :, targets])


def test_rows_of_a_batch_contribute_as_each_alone(model: EditableModel) -> None:
    rows = [model.encode(asked(model, t, s).prompt) for s, t in enumerate(("Where is Rome?", "Where is Oslo?"))]
    width = min(len(r.ids) for r in rows)
    rows = [dataclasses.replace(r, ids=r.ids[:width], prompt_length=width) for r in rows]
    factors, targets = output_factors(model), [[2, width - 1], [width - 2, 0]]
    together = contributions(model, rows, targets, factors)
    for row, ends, found in zip(rows, targets, together, strict=True):
        assert_close(found.lengths, contributions(model, [row], [ends], factors)[0].lengths)


def test_the_pass_also_tells_the_answers_log_probabilities(model: EditableModel) -> None:
    row = model.encode(asked(model).prompt, "the capital of Rome")
    found = contributions(model, [row], [[1]], output_factors(model))[0].answer
    assert len(found) > 1
    assert_close(found, oracle.answer_log_probabilities(model, row))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # PaliGemma's processor
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_answers_as_ever_while_its_attention_is_read(architecture: str) -> None:
    model = tiny_model(architecture)
    row = model.encode(question(model), "the capital of Rome")
    last = row.prompt_length - 1
    with torch.no_grad():
        logits = model.model(**model.inputs([row])).logits[0]
    found = contributions(model, [row], [[last]], output_factors(model))[0]
    plain = logits[last:-1].log_softmax(-1).gather(-1, row.answer[:, None])[:, 0]
    torch.testing.assert_close(found.answer, plain.double(), rtol=0, atol=2e-5)
    assert found.lengths.shape[0] == len(model.layers)
    assert (found.lengths[:, :, 0, last] > 0).all()
    assert (found.lengths[:, :, 0, last + 1 :] == 0).all()


def test_positions_after_the_target_contribute_nothing(model: EditableModel) -> None:
    row = model.encode(asked(model).prompt)
    found = contributions(model, [row], [[4]], output_factors(model))[0].lengths[:, :, 0]
    assert (found[:, :, :5] > 0).all()
    assert (found[:, :, 5:] == 0).all()


def test_a_failed_pass_leaves_the_attention_as_it_was(model: EditableModel) -> None:
    """The fixture checks the configuration."""
    with pytest.raises(IndexError):
        contributions(model, [model.encode(asked(model).prompt)], [[1000]], output_factors(model))


def test_a_decoder_that_sees_only_a_window_is_read_through_its_mask() -> None:
    base = tiny_model("llava")
    text = MistralConfig(
        vocab_size=len(tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=5, initializer_range=0.3,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=base.model.config.vision_config, text_config=text, image_token_id=3, vision_feature_layer=-1
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    model = dataclasses.replace(base, model=built)
    row = model.encode(asked(model).prompt)
    last = len(row.ids) - 1
    found = contributions(model, [row], [[last]], output_factors(model))[0].lengths[:, :, 0]
    assert (found[:, :, : last - 4] == 0).all()
    built.set_attn_implementation("eager")
    assert_close(found, defined(model, row)[:, :, last])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flow_sums_its_sources_over_heads_and_tokens(family: str) -> None:
    model = tiny_model(family)
    questions = [asked(model, seed=s) for s in range(3)]
    flows = (IMAGE, LAST) if family == "llava" else (LAST,)
    result = measure_attention(model, questions, AttentionSettings(flows=flows, batch_size=2))
    for n, q in enumerate(questions):
        row = model.encode(q.prompt)
        constraint = list(row.positions(*q.constraints[0].span(q.prompt.text)))
        ends = {IMAGE: (row.ids == 3).nonzero().flatten().tolist(), LAST: constraint}
        targets = {IMAGE: constraint[-1], LAST: len(row.ids) - 1}
        for flow in flows:
            expected = defined(eager(family), row)[:, :, targets[flow], ends[flow]]
            sample = result.samples(flow)[n]
            assert_close(sample.heads, expected.sum(2))
            assert_close(sample.by_token, expected.sum(1))
            assert_close(result.layers(flow)[n], expected.sum((1, 2)))


def test_the_target_of_several_constraints_is_the_first_ones_last_token(llava: EditableModel) -> None:
    text = "Is Rome the capital of this country?"
    two = tuple(Constraint(text=t) for t in ("this country", "Rome"))
    first, second = (
        measure_attention(
            llava, [Question(prompt=question(llava, text), constraints=c)], AttentionSettings(flows=(IMAGE,))
        )
        for c in (two, two[::-1])
    )
    row = llava.encode(question(llava, text))
    for result, constraint in ((first, two[0]), (second, two[1])):
        target = row.positions(*constraint.span(text))[-1]
        expected = defined(eager("llava"), row)[:, :, target, (row.ids == 3).nonzero().flatten()]
        assert_close(result.layers(IMAGE)[0], expected.sum((1, 2)))


def test_several_groups_may_be_one_source(llava: EditableModel) -> None:
    flows = ("image->last", "constraint->last", "image+constraint->last")
    result = measure_attention(llava, [asked(llava)], AttentionSettings(flows=flows))
    assert_close(result.layers(flows[2]), result.layers(flows[0]) + result.layers(flows[1]))


def test_a_text_only_question_has_no_flow_from_an_image_and_that_is_said(gpt2: EditableModel) -> None:
    result = measure_attention(gpt2, [asked(gpt2)])
    assert not result.samples(IMAGE)
    assert result.samples(LAST)
    assert result.skipped == ("image → constraint: 1 question without such tokens before the target: questions[0]",)
    assert {p.name for p in result.findings().plots} == {"layers_constraint_last", "heads_constraint_last"}
    with pytest.raises(InvalidInputError, match="image → constraint: 1 question"):
        measure_attention(gpt2, [asked(gpt2)], AttentionSettings(flows=(IMAGE,)))


def test_a_question_answered_wrongly_is_left_out_and_listed(llava: EditableModel) -> None:
    wrong = dataclasses.replace(asked(llava), answer="something it never says")
    result = measure_attention(llava, [wrong, asked(llava)])
    assert len(result.questions) == 1
    assert re.match(r"questions\[0\].*something it never says", result.skipped[0])
    with pytest.raises(InvalidInputError, match=r"no question is left to measure: questions\[0\]"):
        measure_attention(llava, [wrong])


def test_findings_show_layers_heads_patches_and_tokens(llava: EditableModel) -> None:
    result = measure_attention(llava, [asked(llava, seed=s) for s in range(5)], AttentionSettings(overlays=2, tokens=4))
    found = result.findings()
    names = [p.name for p in found.plots]
    assert len(set(names)) == len(names)
    layers = next(p for p in found.plots if p.name == "layers_image_constraint")
    assert isinstance(layers, LinePlot)
    assert_close(layers.lines[0].values, result.layers(IMAGE).mean(0))
    low, high = layers.lines[0].low, layers.lines[0].high
    assert low is not None
    assert high is not None
    assert ((low < layers.lines[0].values) & (layers.lines[0].values < high)).all()
    heads = next(p for p in found.plots if p.name == "heads_constraint_last")
    assert isinstance(heads, HeatMap)
    assert_close(heads.grids[0].values.sum(1), result.layers(LAST).mean(0))
    overlays = [p for p in found.plots if isinstance(p, Overlay)]
    assert len(overlays) == 2
    peak = result.peak(IMAGE)
    assert_close(overlays[1].patches.ravel(), result.samples(IMAGE)[1].by_token[peak])
    assert overlays[1].image.size == (24, 24)
    table = next(t for t in found.tables if t.name == "tokens_image_constraint")
    mean = np.mean([s.by_token[peak] for s in result.samples(IMAGE)], axis=0)
    most = int(mean.argmax())
    assert table.rows[0][:2] == (f"patch {most // 3}, {most % 3}", f"{mean[most]:.3f}")
    assert table.rows[0][3] == "5"
    assert found.numbers[1].value == peak
    assert found.numbers[0].value == pytest.approx(result.layers(IMAGE).mean(0).max())


def test_images_that_are_no_single_square_of_patches_get_no_overlay_and_that_is_said(llava: EditableModel) -> None:
    prompt = Prompt(text="What is the capital of this country?", images=(picture(0), picture(1)))
    two = Question(prompt=prompt, constraints=(Constraint(text="this country"),), answer=said(llava, prompt))
    result = measure_attention(llava, [two])
    assert result.samples(IMAGE)[0].by_token.shape == (4, 2 * PATCHES)
    assert result.samples(IMAGE)[0].tokens[PATCHES] == "patch 0, 0 of image 1"
    found = result.findings()
    assert not [p for p in found.plots if isinstance(p, Overlay)]
    assert found.skipped == ("overlays: 1 question without a single image of square patches; no overlay is drawn",)


def test_one_question_has_no_interval(gpt2: EditableModel) -> None:
    found = measure_attention(gpt2, [asked(gpt2)], AttentionSettings(flows=(LAST,))).findings()
    assert [(n.low, n.high) for n in found.numbers] == [(None, None)] * 2


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"flows": ()}, "flows"),
        ({"flows": (LAST, LAST)}, "flows"),
        ({"flows": ("constraint",)}, "flows"),
        ({"flows": ("image+image->last",)}, "flows"),
        ({"flows": ("picture->last",)}, "flows"),
        ({"batch_size": 0}, "batch_size"),
        ({"overlays": -1}, "overlays"),
    ],
)
def test_senseless_settings_are_refused(settings: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidInputError) as error:
        AttentionSettings(**settings)  # type: ignore[arg-type]
    assert error.value.field == field


def test_errors_name_the_question(gpt2: EditableModel) -> None:
    absent = Question(prompt=question(gpt2), constraints=(Constraint(text="that country"),))
    with pytest.raises(InvalidInputError) as error:
        measure_attention(gpt2, [asked(gpt2), absent])
    assert error.value.field == "questions[1].constraint.text"
    with pytest.raises(InvalidInputError, match="no question given"):
        measure_attention(gpt2, [])


def test_progress_is_told_and_a_cancelled_measurement_stops(gpt2: EditableModel) -> None:
    steps: list[tuple[int, int]] = []
    questions = [asked(gpt2)] * 3
    settings = AttentionSettings(batch_size=2)
    measure_attention(gpt2, questions, settings, progress=lambda done, of: steps.append((done, of)))
    assert steps == [(2, 3), (3, 3)]
    with pytest.raises(CancelledError):
        measure_attention(gpt2, questions, settings, cancelled=lambda: True)


@pytest.mark.slow
def test_atlas_carries_the_image_early_and_the_constraint_at_the_middle() -> None:
    """Basu et al. 2024, §5: early causal layers; middle layers, 16–17 of 32."""
    atlas = load_model(ATLAS)
    questions = [
        Question(prompt=r.prompt, constraints=(r.constraint,), answer=r.answer) for r in trace_requests(24, seed=2)
    ]
    result = measure_attention(atlas, questions)
    assert result.peak(IMAGE) < len(atlas.layers) / 3
    assert result.peak(LAST) in (len(atlas.layers) // 2 - 1, len(atlas.layers) // 2)
