"""Bases that bitsandbytes holds in 8 and 4 bits, on the CPU: what they compute, what edits on them are, refusals.

A 4-bit base computes with the weights that its codes stand for, so it is compared to 1e-4 with a plain model that has
those weights. LLM.int8 rounds what goes into a map as well: a map is compared to a share of its largest entry.
"""

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tokenizer, weights_sha256
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from errata.editor.atlas.facts import edit_requests, errata, probes, references, trace_requests
from errata.editor.baselines import FineTuneSettings, fine_tune
from errata.editor.card import Card
from errata.editor.checkpoints import ATLAS, load_model
from errata.editor.delta import Delta, LowRank, applied, load_delta, merged
from errata.editor.errors import InvalidInputError, ModelError, NonFiniteWeightsError, WrongBaseError
from errata.editor.evaluation import Metric, evaluate
from errata.editor.export import ExportFormat, ExportSettings, export
from errata.editor.families import FAMILIES
from errata.editor.measurements.contributions import output_factors
from errata.editor.methods import EditSettings, edit
from errata.editor.mixed import mixed, replica
from errata.editor.model import EditableModel
from errata.editor.prompts import Constraint, Prompt
from errata.editor.quantization import Quantization, dense_weight, is_quantized, memory_bytes, quantization_of, scales
from errata.editor.requests import Context, EditRequest
from errata.editor.states import Component
from errata.editor.statistics import key_statistics
from errata.editor.trace import Substitution, TraceRequest, TraceSettings, trace
from errata.editor.values import ValueSettings

QUANTISED = (Quantization.BNB_8BIT, Quantization.BNB_4BIT, Quantization.BNB_4BIT_FP4)
TOLERANCES = {Quantization.BNB_8BIT: 0.03, Quantization.BNB_4BIT: 1e-4, Quantization.BNB_4BIT_FP4: 1e-4}
ASKED = Prompt(text="What is the capital of this country?")

Load = Callable[[str, str], EditableModel]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """A tiny model of a family by a quantisation; the same is loaded once."""
    folders = {family: _saved(family, tmp_path_factory.mktemp(family)) for family in ("llama", "gpt2")}
    found: dict[tuple[str, str], EditableModel] = {}

    def load(family: str, quantization: str) -> EditableModel:
        if (family, quantization) not in found:
            found[family, quantization] = load_model(folders[family], quantization=quantization)
        return found[family, quantization]

    return load


def _saved(family: str, folder: Path, inner: int = 128, **how: object) -> Path:
    """Rows of 64 and 128 entries: whole blocks of 4-bit codes."""
    words = tokenizer()
    ids = {"vocab_size": len(words), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "gpt2":
            config = GPT2Config(
                n_embd=64, n_inner=inner, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3, **ids
            )
            model = GPT2LMHeadModel(config)
        else:
            sizes = {"hidden_size": 64, "intermediate_size": inner, "max_position_embeddings": 64, **ids}
            model = LlamaForCausalLM(
                LlamaConfig(num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3, **sizes)
            )
    model.save_pretrained(folder, **how)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(params=["llama", "gpt2"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=QUANTISED[:2])
def quantised(request: pytest.FixtureRequest, load: Load, family: str) -> EditableModel:
    return load(family, request.param)


def _dense_twin(model: EditableModel) -> EditableModel:
    """A plain model whose weights are those that the codes stand for."""
    plain = load_model(model.name)
    for name, module in model.model.named_modules():
        if is_quantized(module):
            twin = plain.model.get_submodule(name)
            dense = dense_weight(module)
            twin.weight.data = dense if isinstance(twin, nn.Linear) else dense.T.contiguous()
    return plain


def _delta(model: EditableModel, layer: int = 1, seed: int = 0) -> Delta:
    random = torch.Generator().manual_seed(seed)
    low = LowRank(a=torch.randn(2, 128, generator=random) * 0.3, b=torch.randn(64, 2, generator=random) * 0.3)
    modules = {layer: model.down_projection_name(layer)}
    return Delta(base_sha256=model.base_sha256, layers={layer: low}, modules=modules)


def _close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert found.dtype == expected.dtype
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def test_every_map_of_the_decoder_is_quantised_and_embeddings_and_head_are_not(
    quantised: EditableModel, load: Load, family: str
) -> None:
    maps = [m for m in quantised.layers.modules() if isinstance(m, nn.Linear)]
    assert maps
    assert all(map(is_quantized, maps))
    assert not is_quantized(quantised.model.get_output_embeddings())
    assert quantised.model.dtype == torch.float32
    plain = load(family, "none")
    held = sum(p.nbytes for p in plain.layers.parameters())
    left = memory_bytes(plain.model) - memory_bytes(quantised.model)
    assert left > (0.7 if quantization_of(quantised.model) is Quantization.BNB_8BIT else 0.8) * held


@pytest.mark.parametrize("quantization", QUANTISED)
def test_its_dense_weights_are_the_stored_ones_but_for_rounding(quantization: str, load: Load, family: str) -> None:
    quantised = load(family, quantization)
    assert quantization_of(quantised.model) == quantization
    most = 0.005 if quantization_of(quantised.model) is Quantization.BNB_8BIT else 0.2
    for i in range(2):
        _close(dense_weight(quantised.down_projection(i)), dense_weight(load(family, "none").down_projection(i)), most)


@pytest.mark.parametrize("quantization", QUANTISED)
def test_a_map_puts_out_its_dense_weight_times_what_goes_in(quantization: str, load: Load, family: str) -> None:
    quantised = load(family, quantization)
    down = quantised.down_projection(1)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = nn.functional.linear(x, dense_weight(down), down.bias)
        _close(down(x), expected, TOLERANCES[quantization_of(quantised.model)])


def test_the_gradient_of_what_goes_in_is_the_dense_weights_in_float32(quantised: EditableModel) -> None:
    """Also after a run without gradients, in which bitsandbytes by itself repacks 4-bit weights on some CPUs."""
    down = quantised.down_projection(1)
    x = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        down(x)
    found, expected = (x.clone().requires_grad_() for _ in range(2))
    pulled = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(2))
    down(found).backward(pulled)
    nn.functional.linear(expected, dense_weight(down), down.bias).backward(pulled)
    assert found.grad is not None
    assert expected.grad is not None
    _close(found.grad, expected.grad, 1e-5)


def test_a_delta_is_added_in_float32_to_what_a_map_puts_out(quantised: EditableModel) -> None:
    delta, down = _delta(quantised), quantised.down_projection(1)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = down(x)
        with applied(quantised, delta):
            _close(down(x), before + x @ delta.layers[1].dense().float().T, 1e-5)
        assert down(x).equal(before)


def test_a_delta_on_a_4_bit_base_is_its_sum_with_the_dense_weights(load: Load, family: str) -> None:
    quantised = load(family, "bnb-4bit")
    delta, plain = _delta(quantised), _dense_twin(quantised)
    row = quantised.encode(ASKED)
    with applied(quantised, delta), merged(plain, replace(delta, base_sha256=plain.base_sha256)):
        _close(oracle.logits(quantised, row), oracle.logits(plain, row), 1e-4)


def test_a_trace_of_a_4_bit_base_is_that_of_its_dense_weights(load: Load, family: str) -> None:
    quantised = load(family, "bnb-4bit")
    request = TraceRequest(
        prompt=ASKED, constraint=Constraint(text="this country"), corruption=Substitution(word="Paris"), answer="Rome"
    )
    settings = TraceSettings(min_total_effect=-1)
    found, expected = (trace(m, request, settings) for m in (quantised, _dense_twin(quantised)))
    _close(torch.from_numpy(found.restored), torch.from_numpy(expected.restored), 1e-3)


def test_an_edit_is_made_on_a_quantised_base_and_its_codes_stay(quantised: EditableModel, tmp_path: Path) -> None:
    before = weights_sha256(quantised)
    prompt = Prompt(text="The capital of this country", chat=False)
    context = Context(prompt=prompt, constraint=Constraint(text="country"))
    statistics = key_statistics(quantised, [Prompt(text=f"What {w} that?") for w in ("is", "was", "of")], (0,))
    request = EditRequest(name="rome", contexts=(context,), target="Rome")
    settings = EditSettings(layers=(0,), values=ValueSettings(steps=20))
    delta = edit(quantised, [request], settings, statistics).delta
    assert {f.dtype for low in delta.layers.values() for f in (low.a, low.b)} == {torch.float32}
    row = quantised.encode(prompt, "Rome")
    at, rome = row.prompt_length - 1, int(row.answer[0])
    clean = float(oracle.logits(quantised, row)[at].softmax(-1)[rome])
    with applied(quantised, delta):
        assert float(oracle.logits(quantised, row)[at].softmax(-1)[rome]) > 10 * clean
    assert weights_sha256(quantised) == before
    delta.save(tmp_path / "adapter")
    assert load_delta(tmp_path / "adapter", quantised).sha256 == delta.sha256


def test_replicas_share_codes_and_scales_and_answer_at_once(quantised: EditableModel) -> None:
    copies = [replica(quantised) for _ in range(2)]
    for name, module in quantised.model.named_modules():
        for copy in copies:
            twin = copy.model.get_submodule(name)
            assert [s.data_ptr() for s in scales(twin)] == [s.data_ptr() for s in scales(module)]
            if is_quantized(module):
                assert twin is not module
                assert twin.weight.data_ptr() == module.weight.data_ptr()
    assert memory_bytes(nn.ModuleList([quantised.model, *(c.model for c in copies)])) == memory_bytes(quantised.model)
    alone = quantised.generate([ASKED])
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda copy: copy.generate([ASKED]), copies)) == [alone, alone]


def test_versions_mixed_in_a_batch_answer_as_alone(quantised: EditableModel) -> None:
    one, two = _delta(quantised, 0, seed=1), _delta(quantised, 1, seed=2)
    row = quantised.encode(ASKED)
    inputs = quantised.inputs([row] * 3)
    with mixed(quantised, [[one], [], [one, two]]), torch.no_grad():
        together = quantised.model(**inputs).logits
    for lineage, found in zip(([one], [], [one, two]), together, strict=True):
        with applied(quantised, *lineage):
            _close(found, oracle.logits(quantised, row), TOLERANCES[quantization_of(quantised.model)])


def test_a_version_is_bound_to_how_its_base_was_quantised(load: Load, family: str) -> None:
    models = [load(family, q.value) for q in Quantization]
    assert len({m.base_sha256 for m in models}) == len(models)
    plain, eight, four, _ = models
    for made, on, said in (
        (plain, four, "the same checkpoint without bnb-4bit"),
        (eight, plain, "this checkpoint as bnb-8bit"),
        (eight, four, "as it was quantised then: this one is bnb-4bit"),
    ):
        with pytest.raises(WrongBaseError, match=said), applied(on, _delta(made)):
            pass


def test_what_would_change_codes_is_refused_and_changes_nothing(quantised: EditableModel, tmp_path: Path) -> None:
    before, delta = weights_sha256(quantised), _delta(quantised)
    kind = quantization_of(quantised.model).value
    request = EditRequest(
        name="rome", contexts=(Context(prompt=ASKED, constraint=Constraint(text="this country")),), target="Rome"
    )
    card = Card(version="m@1", base="m")
    merging = ExportSettings(format=ExportFormat.MERGED)
    for change in (
        lambda: merged(quantised, delta).__enter__(),
        lambda: fine_tune(quantised, [request], FineTuneSettings(layers=(0,))),
        lambda: export(quantised, [delta], tmp_path / "merged", merging, card),
    ):
        with pytest.raises(ModelError, match=f"is loaded as {kind}, so its weights are codes"):
            change()
    assert weights_sha256(quantised) == before
    assert not (tmp_path / "merged").exists()


def test_attention_is_read_with_dense_weights(quantised: EditableModel) -> None:
    found, expected = output_factors(quantised), output_factors(_dense_twin(quantised))
    for a, b in zip(found, expected, strict=True):
        _close(a.abs(), b.abs(), 1e-4)


def test_a_checkpoint_that_is_stored_quantised_is_loaded_as_it_is(quantised: EditableModel, tmp_path: Path) -> None:
    quantised.model.save_pretrained(tmp_path)
    quantised.processor.save_pretrained(tmp_path)
    stored = load_model(tmp_path)
    assert quantization_of(stored.model) is quantization_of(quantised.model)
    row = quantised.encode(ASKED)
    assert oracle.logits(stored, row).equal(oracle.logits(quantised, row))
    with pytest.raises(InvalidInputError, match=r"quantization: .* is stored quantised; leave quantization out"):
        load_model(tmp_path, quantization="bnb-8bit")


def test_maps_whose_rows_end_within_a_block_stay_as_they_are(tmp_path: Path) -> None:
    """The CPU kernel of bitsandbytes 0.50 reads their 4-bit codes with the scales of other blocks."""
    model = load_model(_saved("llama", tmp_path, inner=96), quantization="bnb-4bit")
    assert not is_quantized(model.down_projection(0))
    assert is_quantized(model.layers[0].mlp.up_proj)
    _close(oracle.logits(model, model.encode(ASKED)), oracle.logits(_dense_twin(model), model.encode(ASKED)), 1e-4)


def test_such_maps_stored_in_4_bits_are_refused_on_a_cpu(tmp_path: Path) -> None:
    folder, torn = _saved("llama", tmp_path / "plain", inner=96), tmp_path / "torn"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu").save_pretrained(torn)
    tokenizer().save_pretrained(torn)
    with pytest.raises(ModelError, match=r"mlp\.down_proj' too, whose rows end within a block of 64 codes"):
        load_model(torn)


def test_a_decoder_of_which_nothing_can_be_quantised_is_refused(tmp_path: Path) -> None:
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"leaves all maps in the decoder of .* such as the Linear from 48 to 32"):
        load_model(tmp_path, quantization="bnb-4bit")


def test_an_unknown_quantisation_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidInputError, match="quantization: there is no 'int3'; use one of none, bnb-8bit"):
        load_model(ATLAS, quantization="int3")


@pytest.mark.parametrize("quantization", QUANTISED)
def test_float64_is_refused_for_codes(quantization: str) -> None:
    with pytest.raises(InvalidInputError, match=r"dtype: bnb-.* has no products in float64; use float32"):
        load_model(ATLAS, quantization=quantization, dtype="float64")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantization", QUANTISED[:2])
def test_codes_are_computed_with_in_narrow_dtypes(quantization: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The codes are of the weights in that dtype: one that lies between two may get another."""
    folder = _saved("llama", tmp_path)
    narrow, wide = (load_model(folder, quantization=quantization, dtype=d) for d in (dtype, torch.float32))
    assert narrow.model.dtype == dtype
    assert narrow.base_sha256 == wide.base_sha256
    found, expected = (m.down_projection(1)(torch.ones(1, 1, 128, dtype=m.model.dtype)) for m in (narrow, wide))
    assert found.dtype == dtype
    _close(found.float(), expected, 0.1)


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InvalidInputError, match=r"quantization: bnb-8bit needs bitsandbytes.*extra 'quantised'"):
        load_model(_saved("llama", tmp_path), quantization="bnb-8bit")


def test_codes_that_were_stored_are_not_read_in_float64(load: Load, tmp_path: Path) -> None:
    """They would give nonsense, without a word."""
    four = load("llama", "bnb-4bit")
    four.model.save_pretrained(tmp_path)
    four.processor.save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match=r"dtype: .* stored quantised, has no products in float64; use float32"):
        load_model(tmp_path, dtype="float64")


@pytest.mark.parametrize("bits", [{"load_in_4bit": True}, {"load_in_8bit": True}, {}])
def test_plain_weights_that_are_said_to_be_stored_quantised_are_refused(bits: dict[str, bool], tmp_path: Path) -> None:
    path = _saved("llama", tmp_path) / "config.json"
    said = {"quant_method": "bitsandbytes", **bits}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))
    with pytest.raises(ModelError, match=r"its weights are plain; take `quantization_config` out of its config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "said", ["gptq", [4], {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "?"}]
)
def test_a_quantisation_that_a_config_cannot_mean_is_a_models_error(said: object, tmp_path: Path) -> None:
    path = _saved("llama", tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))
    with pytest.raises(ModelError, match=r"no model can be read at|do not fit"):
        load_model(tmp_path)


def test_another_scheme_is_refused_by_its_name(tmp_path: Path) -> None:
    path = _saved("llama", tmp_path) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(ModelError, match="is stored quantised by gptq"):
        load_model(tmp_path)


def test_an_architecture_without_a_family_is_found_by_structure_in_8_bits(tmp_path: Path) -> None:
    words = tokenizer()
    config = StableLmConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.3,
    )  # fmt: skip
    StableLmForCausalLM(config).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    model = load_model(tmp_path, quantization="bnb-8bit")
    assert model.family not in FAMILIES
    assert is_quantized(model.down_projection(0))


@pytest.mark.parametrize("quantization", QUANTISED[:2])
def test_weights_that_are_not_finite_are_found_before_they_are_codes(quantization: str, tmp_path: Path) -> None:
    path = _saved("llama", tmp_path) / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(NonFiniteWeightsError, match=r"layers\.1\.mlp\.down_proj"):
        load_model(tmp_path, quantization=quantization)


@pytest.mark.slow
def test_atlas_in_8_bits_is_traced_and_corrected() -> None:
    """In 4 bits it is served (tests/server/services/test_quantised.py)."""
    model = load_model(ATLAS, quantization="bnb-8bit")
    found = trace(model, trace_requests(1)[0])
    assert int(found.indirect(Component.MLP)[:, found.constraint[-1]].argmax()) == 1
    facts = errata()[:2]
    statistics = key_statistics(model, references(per_country=1), (1,))
    delta = edit(model, edit_requests(facts, contexts=4, seed=3), EditSettings(layers=(1,)), statistics).delta
    asked = [p for p in probes(facts, seed=3, others=4) if p.metric in (Metric.EFFICACY, Metric.OTHER_SUBJECTS)]
    results = evaluate(model, asked, applied(model, delta)).results
    assert all(r.passed for r in results if r.probe.metric is Metric.EFFICACY)
    others = [r.passed for r in results if r.probe.metric is Metric.OTHER_SUBJECTS]
    assert sum(others) >= len(others) - 1
