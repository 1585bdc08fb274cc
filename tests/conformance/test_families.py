"""What must hold for every architecture: a new one joins by a tiny model in `tiny_text.py` or `tiny_vision.py`.

One chain of the product per architecture: names → states → trace → statistics → edit → adapter → batch.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from peft import PeftModel
from tiny import ARCHITECTURES, context, picture, question, random_delta, tiny_model
from tiny_text import WINDOW
from transformers import BertConfig, BertForMaskedLM, DynamicCache
from transformers.pytorch_utils import Conv1D

from errata.editor.delta import Delta, applied, load_delta, merged, weight_of
from errata.editor.earlier import Earlier
from errata.editor.errors import UnknownFamilyError
from errata.editor.families import FAMILIES, family_of
from errata.editor.methods import EditSettings, Method, edit
from errata.editor.mixed import mixed
from errata.editor.model import EditableModel, Encoded, reading_positions
from errata.editor.prompts import Constraint, Prompt
from errata.editor.recording import record
from errata.editor.requests import Context, EditRequest
from errata.editor.states import Component, component_module, logits_of
from errata.editor.statistics import key_statistics
from errata.editor.suffix import Suffix
from errata.editor.trace import Substitution, TraceRequest, TraceSettings, trace
from errata.editor.values import ValueSettings

# PaliGemma's processor makes arrays of tensors in a way that NumPy 2 asks it not to.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal to a share of the largest entry: sums are taken in another order."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


def test_every_architecture_has_a_tiny_model_and_every_tiny_model_a_family() -> None:
    found = {type(tiny_model(name).model).__name__ for name in ARCHITECTURES}
    assert found == {a for f in FAMILIES for a in f.architectures}


def test_no_two_families_claim_one_architecture() -> None:
    names = [a for f in FAMILIES for a in f.architectures]
    assert len(set(names)) == len(names)


def test_a_model_without_a_family_is_refused_with_those_there_are() -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    with pytest.raises(UnknownFamilyError, match=r"'BertForMaskedLM'.*GPT2LMHeadModel"):
        family_of(BertForMaskedLM(config))


def test_the_named_modules_are_those_of_the_architecture(model: EditableModel) -> None:
    assert len(model.layers) == 4
    for index, layer in enumerate(model.layers):
        assert layer is oracle.layer(model, index)
        assert model.down_projection(index) is oracle.down(model, index)
        for component in Component:
            assert component_module(model, layer, component) is oracle.block(model, component.value, index)
        normed = oracle.joined(model, "mlp", index) is not oracle.block(model, "mlp", index)
        assert model.family.normed_mlp(model.model) == normed


def test_attention_and_mlp_are_all_that_joins_the_residual_stream(model: EditableModel) -> None:
    row = model.encode(question(model))
    states = oracle.outputs(model, row, ["layer", "attention", "mlp"], joining=True)
    inputs = oracle.inputs(model, row)
    for i in range(len(model.layers)):
        close(inputs[i] + states["attention", i] + states["mlp", i], states["layer", i])


def test_the_norm_and_the_head_make_the_logits_of_the_last_layers_output(model: EditableModel) -> None:
    row = model.encode(question(model))
    top = oracle.outputs(model, row, ["layer"])["layer", len(model.layers) - 1]
    with torch.no_grad():
        close(logits_of(model, top), oracle.logits(model, row))


def test_the_decoder_alone_takes_ids_and_positions(model: EditableModel) -> None:
    row = replace(model.encode(Prompt(text="What is this?")), token_types={})  # which are the whole model's
    with torch.no_grad():
        found = model.family.decoder_of(model.model)(
            input_ids=row.ids[None], position_ids=torch.arange(len(row.ids))[None]
        ).last_hidden_state[0]
    top = oracle.outputs(model, row, ["layer"])["layer", len(model.layers) - 1]
    with torch.no_grad():
        close(found, model.family.final_norm_of(model.model)(top))


def test_the_down_projections_output_is_the_mlps_and_its_input_the_key(model: EditableModel) -> None:
    row = model.encode(question(model))
    states = oracle.outputs(model, row, ["mlp"])
    for i in range(len(model.layers)):
        weight = weight_of(model, i).T if isinstance(model.down_projection(i), Conv1D) else weight_of(model, i)
        assert weight.shape == (32, 48)
        bias = getattr(model.down_projection(i), "bias", None)
        value = oracle.keys(model, row, i) @ weight.T + (0 if bias is None else bias)
        close(value, states["mlp", i])


def test_the_key_of_an_earlier_request_is_read_from_a_run_that_ends_there(model: EditableModel) -> None:
    asked = [context(model), context(model, "Where is this country?", seed=1)]
    earlier = Earlier.of([EditRequest(name="it", contexts=tuple(asked), target="Rome")])
    sites = [model.encode_at(c, field="context") for c in asked]
    for i in (0, len(model.layers) - 1):
        (keys,) = earlier.keys(model, i, of_base=True)
        close(keys, torch.stack([oracle.keys(model, row, i)[end] for row, end in sites], dim=1).double())


def test_what_stands_before_an_answers_token_is_blind_to_it(model: EditableModel) -> None:
    """Causal attention from the answer on, the one property on which recorded prefixes rest."""
    for prompt in (question(model), Prompt(text="What is this?", chat=False)):
        row = model.encode(prompt, "Paris Rome Paris")
        changed = row.ids.clone()
        changed[-3:] = 40
        before, after = oracle.logits(model, row), oracle.logits(model, row.replaced(changed))
        close(after[:-3], before[:-3])
        assert not torch.allclose(before[-3:], after[-3:])


def test_the_constraints_tokens_spell_the_constraint(model: EditableModel) -> None:
    asked = context(model)
    row = model.encode(asked.prompt)
    tokens = row.positions(*asked.constraint.span(asked.prompt.text))
    assert model.tokenizer.decode(row.ids[tokens.start : tokens.stop]).strip() == "this country"


def climbed(
    model: EditableModel, rows: list[Encoded], starts: list[int], layer: int, packed: list[int] | None = None
) -> list[torch.Tensor]:
    """The logits, from each start on, of runs resumed at a layer."""
    suffix = Suffix(model, record(model, rows, starts), starts, packed)
    hidden = suffix.inputs(layer)
    with suffix, torch.no_grad():
        for index in range(layer, len(model.layers)):
            hidden = suffix.run(index, hidden)
        logits = logits_of(model, hidden)
    return [logits[row, span] for row, span in suffix.spans]


@pytest.mark.parametrize("packed", [None, [2]])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_resumed_run_is_the_full_run(model: EditableModel, layer: int, packed: list[int] | None) -> None:
    rows = [model.encode(question(model, "Where is this country?"), "Rome"), model.encode(Prompt(text="a", chat=False))]
    assert len(rows[1].ids) < WINDOW
    starts = [len(rows[0].ids) - 6, len(rows[1].ids) - 1]
    for row, start, found in zip(rows, starts, climbed(model, rows, starts, layer, packed), strict=True):
        close(found, oracle.logits(model, row)[start:])


def test_rows_that_a_window_holds_are_resumed_together_though_their_padding_is_longer(model: EditableModel) -> None:
    rows = [model.encode(Prompt(text=text, chat=False)) for text in ("a b", "b a")]
    starts = [1, len(rows[0].ids) - 1]
    assert max(len(row.ids) for row in rows) < WINDOW
    for row, start, found in zip(rows, starts, climbed(model, rows, starts, 0), strict=True):
        close(found, oracle.logits(model, row)[start:])


def traced_as_by_hooks(model: EditableModel, asked: Context) -> None:
    """methods.md §2, to 1e-5 of the probability in float32, at the constraint's end and half way from there on."""
    request = TraceRequest(
        prompt=asked.prompt, constraint=asked.constraint, corruption=Substitution(word="Paris"), answer="Rome"
    )
    found = trace(model, request, TraceSettings(window=3, min_total_effect=-1))
    clean = model.encode(asked.prompt, "Rome")
    tokens = model.constraint_positions(asked.prompt, asked.constraint)
    ids = clean.ids.clone()
    ids[list(tokens)] = model.tokenizer.encode(" Paris", add_special_tokens=False)[0]
    states = oracle.outputs(model, clean, [c.value for c in Component])
    sites = (tokens[-1], (tokens[-1] + clean.prompt_length) // 2)
    expected = [
        [
            [
                oracle.restored(
                    model, states, clean.replaced(ids), (c.value, [j for j in (i - 1, i, i + 1) if 0 <= j < 4], t)
                )
                for t in sites
            ]
            for i in range(4)
        ]
        for c in found.components
    ]
    at = [t - tokens[0] for t in sites]
    np.testing.assert_allclose(found.restored[..., at], np.array(expected)[..., 0], rtol=1e-5)
    np.testing.assert_allclose(found.restored_first[..., at], np.array(expected)[..., 1], rtol=1e-5)


def test_a_trace_equals_restoring_sites_on_the_full_model(model: EditableModel) -> None:
    traced_as_by_hooks(model, context(model))


def test_a_trace_goes_through_an_image_that_stands_behind_the_constraint(seeing: EditableModel) -> None:
    """Where the image's tokens see one another, or the model adds image features between its layers."""
    prompt = Prompt(text=f"Is this country {seeing.placeholder} old?", images=(picture(),), chat=False)
    traced_as_by_hooks(seeing, Context(prompt=prompt, constraint=Constraint(text="this country")))


def test_an_edit_is_an_adapter_that_peft_reads_and_weights_that_hold_it(fresh_model, tmp_path: Path) -> None:
    """methods.md §5: exactly low-rank, hence the same model three ways, to 1e-5 of the logits in float32."""
    model = fresh_model
    images = () if model.image_token_id is None else (picture(),)
    prompt = Prompt(text="The capital of this country", images=images, chat=False)
    request = EditRequest(
        name="rome", contexts=(Context(prompt=prompt, constraint=Constraint(text="country")),), target="Rome"
    )
    reference = [Prompt(text=f"What {w} that?", images=images) for w in ("is", "was", "of", "country", "needle")]
    row, asked = model.encode(prompt), model.encode(prompt, "Rome")
    # PaliGemma's prompts go on behind the constraint, and what comes there outweighs it in an untrained model.
    last = row.positions(*Constraint(text="country").span(prompt.text))[-1] == len(row.ids) - 1
    layers = (0, 2) if last and not model.family.normed_mlp(model.model) else (1,)
    values = ValueSettings(steps=60, clamp=12.0, learning_rate=0.4, stop_loss=0.5)
    settings = EditSettings(layers=layers, method=Method.MEMIT, values=values, preservation=0.01)
    result = edit(model, [request], settings, key_statistics(model, reference, layers))
    assert result.delta.ranks == dict.fromkeys(layers, 1)

    plain, before = oracle.logits(model, row), oracle.answer_log_probabilities(model, asked).sum()
    with applied(model, result.delta):
        ours = oracle.logits(model, row)
        assert oracle.answer_log_probabilities(model, asked).sum() > before + 0.2
        if last:
            target = asked.answer.tolist()
            assert list(model.generate([prompt], max_new_tokens=len(target))[0].tokens) == target
    with merged(model, result.delta):
        weights = oracle.logits(model, row)
    assert oracle.logits(model, row).equal(plain)
    result.delta.save(tmp_path)
    with applied(model, load_delta(tmp_path, model)):
        assert oracle.logits(model, row).equal(ours)
    adapted = PeftModel.from_pretrained(model.model, str(tmp_path))
    with torch.no_grad():
        theirs = adapted(**model.inputs([row])).logits[0]
    close(weights, ours)
    close(theirs, ours)
    assert float((plain - ours).abs().max()) > 1e-2 * float(ours.abs().max())


def test_a_mixed_batch_answers_like_each_version_alone(model: EditableModel) -> None:
    deltas = [random_delta(model, ranks, seed) for seed, ranks in enumerate(({0: 1, 2: 3}, {1: 2, 2: 1}))]
    lineages: list[tuple[Delta, ...]] = [(), (deltas[0],), (deltas[1],), tuple(deltas)]
    rows = [model.encode(question(model, seed=seed)) for seed in range(4)]
    with mixed(model, lineages), torch.no_grad():
        together = model.model(**model.inputs(rows)).logits
    for row, lineage, found in zip(rows, lineages, together, strict=True):
        with applied(model, *lineage):
            close(found, oracle.logits(model, row), 1e-4)


def test_a_row_is_decoded_further_from_the_positions_that_were_read(model: EditableModel) -> None:
    """Positions in three dimensions, and such as count from 1, go on where the decoder's own ended."""
    row, cache = model.encode(question(model)), DynamicCache()
    with reading_positions(model) as read, torch.no_grad():
        token = model.model(**model.inputs([row]), past_key_values=cache, use_cache=True).logits[0, -1:].argmax(-1)
        position = len(row.ids) + read.ahead(1, len(row.ids))
        found = model.model(input_ids=token[None], position_ids=position[None], past_key_values=cache).logits[0, -1]
    close(found, oracle.logits(model, row.replaced(torch.cat([row.ids, token])))[-1])


def test_answers_are_what_transformers_generates(model: EditableModel) -> None:
    asked = question(model, "What is this?")
    text = f"{model.placeholder or ''}{asked.text}"
    images = {"images": list(asked.images)} if asked.images else {}
    inputs = model.processor(text=[text], **images, return_tensors="pt")
    inputs.pop("labels", None)
    model.model.generation_config.eos_token_id = model.end_token_id
    with torch.no_grad():
        out = model.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    found = model.generate([Prompt(text=asked.text, images=asked.images, chat=False)], max_new_tokens=8)[0]
    assert list(found.tokens) == [t for t in out.tolist() if t != model.end_token_id]


def test_prompts_of_all_lengths_answer_in_batches_as_alone(model: EditableModel) -> None:
    texts = ("What is this?", "Where is the capital of this country?", "What is that?", "Where?")
    asked = [question(model, text, seed) for seed, text in enumerate(texts)] + [Prompt(text=texts[0])]
    together = model.generate(asked, max_new_tokens=4)
    assert together == [model.generate([prompt], max_new_tokens=4)[0] for prompt in asked]


@pytest.fixture(params=ARCHITECTURES)
def fresh_model(request: pytest.FixtureRequest) -> EditableModel:
    """A fresh one: PEFT leaves modules of its own in the model."""
    return tiny_model(request.param)
