"""What must hold for every model family, whatever its architecture: a new one joins by a tiny model in `tiny.py`.

One chain of the product per family: names → states → trace → statistics → edit → adapter.
"""

from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from peft import PeftModel
from tiny import FAMILIES as TINY
from tiny import context, picture, question, tiny_model
from transformers import BertConfig, BertForMaskedLM
from transformers.pytorch_utils import Conv1D

from errata.editor.delta import applied, load_delta, merged, weight_of
from errata.editor.errors import UnknownFamilyError
from errata.editor.families import FAMILIES, family_of
from errata.editor.methods import EditSettings, Method, edit
from errata.editor.model import EditableModel
from errata.editor.prompts import Constraint, Prompt
from errata.editor.requests import Context, EditRequest
from errata.editor.states import Component, component_module
from errata.editor.statistics import key_statistics
from errata.editor.trace import Substitution, TraceRequest, TraceSettings, trace
from errata.editor.values import ValueSettings


def test_every_family_has_a_tiny_model_and_every_tiny_model_a_family() -> None:
    found = [family_of(tiny_model(name).model) for name in TINY]
    assert sorted(a for f in found for a in f.architectures) == sorted(a for f in FAMILIES for a in f.architectures)


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


def test_attention_and_mlp_are_all_that_joins_the_residual_stream(model: EditableModel) -> None:
    states = oracle.outputs(model, model.encode(question(model)), [c.value for c in Component])
    for i in range(1, len(model.layers)):
        joined = states["layer", i - 1] + states["attention", i] + states["mlp", i]
        torch.testing.assert_close(states["layer", i], joined, rtol=1e-4, atol=1e-4)


def test_the_norm_and_the_head_make_the_logits_of_the_last_layers_output(model: EditableModel) -> None:
    row = model.encode(question(model))
    top = oracle.outputs(model, row, ["layer"])["layer", len(model.layers) - 1]
    head = model.model.get_output_embeddings()
    with torch.no_grad():
        found = head(model.family.final_norm_of(model.model)(top))
    torch.testing.assert_close(found, oracle.logits(model, row), rtol=1e-4, atol=1e-4)


def test_the_decoder_alone_takes_ids_and_positions(model: EditableModel) -> None:
    row = model.encode(Prompt(text="What is this?"))
    with torch.no_grad():
        hidden = model.family.decoder_of(model.model)(
            input_ids=row.ids[None], position_ids=torch.arange(len(row.ids))[None]
        ).last_hidden_state
        found = model.model.get_output_embeddings()(hidden)[0]
    torch.testing.assert_close(found, oracle.logits(model, row), rtol=1e-4, atol=1e-4)


def test_the_down_projections_output_is_the_mlps_and_its_input_the_key(model: EditableModel) -> None:
    row = model.encode(question(model))
    states = oracle.outputs(model, row, ["mlp"])
    for i in range(len(model.layers)):
        weight = weight_of(model, i).T if isinstance(model.down_projection(i), Conv1D) else weight_of(model, i)
        assert weight.shape == (32, 48)
        bias = getattr(model.down_projection(i), "bias", None)
        value = oracle.keys(model, row, i) @ weight.T + (0 if bias is None else bias)
        torch.testing.assert_close(value, states["mlp", i], rtol=1e-4, atol=1e-4)


def test_what_stands_before_a_token_is_blind_to_it(model: EditableModel) -> None:
    """Causal attention, the one property on which recorded prefixes rest."""
    row = model.encode(question(model))
    changed = row.ids.clone()
    changed[-3:] = 40
    before, after = oracle.logits(model, row), oracle.logits(model, row.replaced(changed))
    torch.testing.assert_close(before[:-3], after[:-3], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before[-3:], after[-3:])


def test_a_trace_equals_restoring_every_site_on_the_full_model(model: EditableModel) -> None:
    """methods.md §2, to 1e-5 of the probability in float32."""
    asked = context(model)
    request = TraceRequest(
        prompt=asked.prompt, constraint=asked.constraint, corruption=Substitution(word="Paris"), answer="Rome"
    )
    found = trace(model, request, TraceSettings(window=3, min_total_effect=-1))
    clean = model.encode(asked.prompt, "Rome")
    tokens = model.constraint_positions(asked.prompt, asked.constraint)
    ids = clean.ids.clone()
    ids[list(tokens)] = model.tokenizer.encode(" Paris", add_special_tokens=False)[0]
    states = oracle.outputs(model, clean, [c.value for c in Component])
    expected = np.array(
        [
            [
                [
                    oracle.restored(
                        model, states, clean.replaced(ids), (c.value, [j for j in (i - 1, i, i + 1) if 0 <= j < 4], t)
                    )
                    for t in range(tokens[0], clean.prompt_length)
                ]
                for i in range(4)
            ]
            for c in found.components
        ]
    )
    np.testing.assert_allclose(found.restored, expected[..., 0], rtol=1e-5)
    np.testing.assert_allclose(found.restored_first, expected[..., 1], rtol=1e-5)


def test_an_edit_is_an_adapter_that_peft_reads_and_weights_that_hold_it(fresh_model, tmp_path: Path) -> None:
    """methods.md §5: exactly low-rank, hence the same model three ways, to 1e-5 of the logits in float32."""
    model = fresh_model
    images = () if model.image_token_id is None else (picture(),)
    prompt = Prompt(text="The capital of this country", images=images, chat=False)
    request = EditRequest(
        name="rome", contexts=(Context(prompt=prompt, constraint=Constraint(text="country")),), target="Rome"
    )
    reference = [Prompt(text=f"What {w} that?", images=images) for w in ("is", "was", "of", "country", "needle")]
    values = ValueSettings(steps=60, clamp=12.0, learning_rate=0.2, stop_loss=0.5)
    settings = EditSettings(layers=(0, 2), method=Method.MEMIT, values=values, preservation=0.01)
    result = edit(model, [request], settings, key_statistics(model, reference, (0, 2)))
    assert result.delta.ranks == {0: 1, 2: 1}

    row = model.encode(prompt)
    target = model.encode(prompt, "Rome").answer.tolist()
    plain = oracle.logits(model, row)
    with applied(model, result.delta):
        ours = oracle.logits(model, row)
        assert list(model.generate([prompt], max_new_tokens=len(target))[0].tokens) == target
    with merged(model, result.delta):
        weights = oracle.logits(model, row)
    assert oracle.logits(model, row).equal(plain)
    result.delta.save(tmp_path)
    with applied(model, load_delta(tmp_path, model)):
        assert oracle.logits(model, row).equal(ours)
    adapted = PeftModel.from_pretrained(model.model, str(tmp_path))
    with torch.no_grad():
        theirs = adapted(input_ids=row.ids[None], **row.vision).logits[0]
    size = float(ours.abs().max())
    assert float((weights - ours).abs().max()) <= 1e-5 * size
    assert float((theirs - ours).abs().max()) <= 1e-5 * size
    assert float((plain - ours).abs().max()) > 1e-2 * size


@pytest.fixture(params=TINY)
def fresh_model(request: pytest.FixtureRequest) -> EditableModel:
    """A fresh one: PEFT leaves modules of its own in the model."""
    return tiny_model(request.param)
