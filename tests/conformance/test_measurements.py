"""The measurements on every architecture, each against the full model with plain hooks (methods.md §2 to §5).

Their own tests, on three families, say more of each.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import oracle
import pytest
import torch
from tiny import picture, question, random_delta, said, tiny_model
from torch import Tensor
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from errata.editor.measurements.attention import AttentionSettings, measure_attention
from errata.editor.measurements.contributions import contributions, output_factors
from errata.editor.measurements.knockout import KnockoutSettings, measure_knockout
from errata.editor.measurements.lens import measure_lens
from errata.editor.measurements.noise import NoiseSettings, constraint_noise, measure_noise
from errata.editor.measurements.positions import grid
from errata.editor.measurements.questions import Question
from errata.editor.measurements.readout import ReadoutSettings, measure_readout
from errata.editor.model import EditableModel, Encoded
from errata.editor.prompts import Constraint, Prompt
from errata.editor.states import Component

# PaliGemma's processor makes arrays of tensors in a way that NumPy 2 asks it not to.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TOP = 3
"""The last of the tiny models' layers."""


def asked(model: EditableModel) -> Question:
    """An untrained model knows no answer, so what it says is measured."""
    prompt = question(model)
    return Question(prompt=prompt, constraints=(Constraint(text="this country"),), answer=said(model, prompt))


@contextmanager
def eager(model: EditableModel) -> Iterator[None]:
    """While open, the decoder, and no tower beside it, attends in the way that takes masks and shows weights."""
    config = model.family.decoder_of(model.model).config
    before = config._attn_implementation
    config._attn_implementation = {"": "eager"}
    try:
        yield
    finally:
        config._attn_implementation = {"": before}


def masked(model: EditableModel, row: Encoded, layer: int, target: int, sources: list[int]) -> Tensor:
    """Log p of the answer's tokens, of the full model with its own mask set to −∞ in one layer."""

    def mask(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = inspect.signature(module.forward).bind(*args, **kwargs)
        changed = call.arguments["attention_mask"].clone()
        changed[..., target, sources] = torch.finfo(changed.dtype).min
        call.arguments["attention_mask"] = changed
        return call.args, call.kwargs

    with ExitStack() as stack:
        stack.enter_context(eager(model))
        stack.callback(oracle.layer(model, layer).register_forward_pre_hook(mask, with_kwargs=True).remove)
        return oracle.answer_log_probabilities(model, row)


def test_a_knockout_equals_masks_on_the_full_model(model: EditableModel) -> None:
    one = asked(model)
    found = measure_knockout(model, [one], KnockoutSettings(pairs=("constraint->last",), window=1))
    row = model.encode(one.prompt, found.answers[0])
    constraint = list(row.positions(*one.constraints[0].span(one.prompt.text)))
    clean = oracle.answer_log_probabilities(model, row)
    assert found.clean_first[0] == pytest.approx(float(clean[0].exp()), rel=2e-5)
    for layer in range(TOP + 1):
        expected = masked(model, row, layer, row.prompt_length - 1, constraint)
        assert found.blocked_first[0, 0, layer] == pytest.approx(float(expected[0].exp()), rel=2e-5)
        assert found.blocked[0, 0, layer] == pytest.approx(float(expected.sum().exp()), rel=1e-4)
    assert abs(found.change()).max() > 1e-3


def weighed(model: EditableModel, row: Encoded) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of each layer, on the full model: the attention's weights, its values, and what its output map is given."""
    weights: list[Tensor] = []
    joined: list[Tensor] = []
    cache = DynamicCache()
    with eager(model), ExitStack() as stack, torch.no_grad():
        for index, layer in enumerate(model.layers):
            output = layer.get_submodule(model.family.attention_output)
            handles = (
                oracle.block(model, "attention", index).register_forward_hook(
                    lambda _m, _a, out: weights.append(out[1])
                ),
                output.register_forward_pre_hook(lambda _m, args: joined.append(args[0])),
            )
            for handle in handles:
                stack.callback(handle.remove)
        model.model(**model.inputs([row]), past_key_values=cache, use_cache=True)
    return [w[0] for w in weights], [layer.values[0] for layer in cache.layers], [j.reshape(-1, 32) for j in joined]


def test_contributions_are_the_lengths_of_what_makes_the_attentions_output(model: EditableModel) -> None:
    """The heads' vectors add up to what the model's own output map is given; their lengths through it are measured."""
    row = model.encode(question(model), "Rome")
    last = row.prompt_length - 1
    found = contributions(model, [row], [[last]], output_factors(model))[0].lengths[:, :, 0]
    for index, (weights, values, joined) in enumerate(zip(*weighed(model, row), strict=True)):
        of_head = weights[:, last, :, None] * values.repeat_interleave(len(weights) // len(values), dim=0)
        torch.testing.assert_close(of_head.sum(1).flatten(), joined[last], rtol=1e-4, atol=1e-5)
        output = oracle.layer(model, index).get_submodule(model.family.attention_output)
        into = output.weight if isinstance(output, Conv1D) else output.weight.T
        vectors = of_head @ into.unflatten(0, (len(weights), -1))
        torch.testing.assert_close(found[index], vectors.norm(dim=-1), rtol=1e-4, atol=1e-6)


def test_a_trace_by_noise_equals_noise_and_restored_states_on_the_full_model(model: EditableModel) -> None:
    one = asked(model)
    settings = NoiseSettings(draws=1, components=(Component.MLP,), min_total_effect=-1)
    found = measure_noise(model, [one], settings)
    traced = found.traces[0].averaged
    row = model.encode(one.prompt, traced.answer)
    span = row.positions(*one.constraints[0].span(one.prompt.text))
    clean = oracle.outputs(model, row, ["mlp"])
    embeddings = model.model.get_input_embeddings()
    noise = constraint_noise(settings, found.deviation, len(span), embeddings.embedding_dim)[0]

    def noised(output: Tensor) -> Tensor:
        return output.index_add(1, torch.tensor(span), noise[None])

    for layer, token in ((1, span[-1]), (TOP, row.prompt_length - 1)):
        put = oracle.put(token, clean["mlp", layer][token])
        changes = [(embeddings, noised), (oracle.block(model, "mlp", layer), put)]
        expected = oracle.answer_log_probabilities(model, row, changes)
        assert traced.restored_first[0, layer, token - span[0]] == pytest.approx(float(expected[0].exp()), rel=2e-5)
    corrupted = oracle.answer_log_probabilities(model, row, [(embeddings, noised)])
    assert traced.corrupted.first == pytest.approx(float(corrupted[0].exp()), rel=2e-5)
    assert traced.corrupted.first != pytest.approx(traced.clean.first, rel=1e-3)


def test_the_lens_reads_each_layer_as_if_it_were_the_last(model: EditableModel) -> None:
    one = asked(model)
    found = measure_lens(model, [one])
    row = model.encode(one.prompt, found.answers[0])
    states, last = oracle.outputs(model, row, ["layer"]), row.prompt_length - 1
    for layer in range(TOP + 1):
        put = oracle.put(last, states["layer", layer][last])
        p = oracle.logits(model, row, [(oracle.layer(model, TOP), put)])[last].double().softmax(-1)
        assert found.answer[0, layer] == pytest.approx(float(p[row.answer[0]]), rel=2e-5)
        assert found.top[0, layer] == pytest.approx(float(p.max()), rel=2e-5)


def test_the_read_out_is_of_what_joins_the_residual_stream(model: EditableModel) -> None:
    """Through a norm, where the MLP's output passes one: its scale changes no rank."""
    one, delta = asked(model), random_delta(model, {1: 2})
    found = measure_readout(model, [one], ReadoutSettings(layers=(1,), tokens=3), delta=delta)
    row, site = model.encode(one.prompt), model.constraint_positions(one.prompt, one.constraints[0])[-1]
    logits = (
        model.model.get_output_embeddings().weight.double()
        @ oracle.outputs(model, row, ["mlp"], joining=True)["mlp", 1][site].double()
    )
    token = int(model.encode(one.prompt, one.answer).answer[0])
    assert found.ranks[0, 0, 0] == float((logits > logits[token]).sum() + 1)
    read = found.facts[0].layers[0]
    assert read.before.tokens == tuple(model.tokenizer.decode([t]) for t in logits.topk(3).indices.tolist())
    assert read.written is not None
    assert read.written.logits != pytest.approx(read.before.logits)


def test_frames_whose_tokens_add_up_to_a_square_are_no_square_of_patches() -> None:
    """Nine tokens of each of four frames: an overlay of six by six would show patches where they are not."""
    model = tiny_model("internvl")
    model.processor.image_processor.max_patches = 3
    prompt = Prompt(text="Which city of this country is old?", images=(picture().resize((72, 24)),))
    row = model.encode(prompt)
    assert (len(row.images[0]), grid(row, 0)) == (36, None)
    asked = Question(prompt=prompt, constraints=(Constraint(text="this country"),), answer=said(model, prompt))
    found = measure_attention(model, [asked], AttentionSettings(flows=("image->constraint",)))
    assert found.questions[0].side is None
    assert found.samples("image->constraint")[0].tokens[:2] == ("image token 0", "image token 1")
