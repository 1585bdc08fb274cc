"""Exports: folders that PEFT, transformers and Errata load, and that answer like the version they hold."""

import json
from dataclasses import fields
from pathlib import Path

import oracle
import pytest
import torch
import transformers
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import question, random_delta, tiny_model, weights_sha256
from transformers import AutoProcessor, AutoTokenizer

from errata.editor.atlas.facts import edit_requests, errata
from errata.editor.atlas.world import Attribute
from errata.editor.card import Card, CardScore, CardVersion
from errata.editor.checkpoints import load_model
from errata.editor.delta import Delta, LowRank, applied, load_delta
from errata.editor.errors import CancelledError, InvalidInputError, ModelError, RankTooLargeError, WrongBaseError
from errata.editor.export import (
    RANKS,
    Export,
    ExportFormat,
    ExportSettings,
    composed,
    export,
    uniform,
)
from errata.editor.methods import EditSettings, Method, edit
from errata.editor.model import EditableModel
from errata.editor.values import ValueSettings

VERSION = "models/tiny/versions/2"
CARD = Card(version=VERSION, base="tiny")
ADAPTERS = [ExportFormat.ADAPTER, ExportFormat.UNIFORM_ADAPTER]
MERGED = ExportSettings(format=ExportFormat.MERGED)
ASKED = ("What is this country?", "Where are we?")


def lineage(model: EditableModel) -> list[Delta]:
    """Two edits that share layers."""
    return [random_delta(model, {0: 1, 2: 3, 3: 2}, seed=1), random_delta(model, {2: 2, 3: 1}, seed=2)]


def logits(model: EditableModel) -> torch.Tensor:
    return torch.stack([oracle.logits(model, model.encode(question(model, asked)))[-1] for asked in ASKED])


def texts(model: EditableModel) -> list[str]:
    return [answer.text for answer in model.generate([question(model, asked) for asked in ASKED], max_new_tokens=6)]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.fixture(params=["llava", "llama", "gpt2"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> EditableModel:
    """A fresh model, loaded from a folder of its own."""
    return load_model(save(tiny_model(request.param), tmp_path / "base"))


@pytest.fixture
def llama_saved(tmp_path: Path) -> EditableModel:
    return load_model(save(tiny_model("llama"), tmp_path / "base"))


def save(model: EditableModel, folder: Path, **how: object) -> Path:
    model.model.save_pretrained(folder, **how)
    model.processor.save_pretrained(folder)
    return folder


def with_peft(model: EditableModel, folder: Path) -> EditableModel:
    wrapped = PeftModel.from_pretrained(model.model, str(folder))
    same = {f.name: getattr(model, f.name) for f in fields(model)}
    return EditableModel(**{**same, "model": wrapped.get_base_model()})


@pytest.mark.parametrize("format", ADAPTERS)
def test_an_exported_adapter_loads_with_plain_peft_and_answers_like_the_version(
    saved: EditableModel, format: ExportFormat, tmp_path: Path
) -> None:
    deltas, before = lineage(saved), logits(saved)
    with applied(saved, *deltas):
        expected, said = logits(saved), texts(saved)
    export(saved, deltas, tmp_path / "out", ExportSettings(format=format), CARD)
    loaded = with_peft(saved, tmp_path / "out")
    close(logits(loaded), expected)
    assert texts(loaded) == said
    assert float((expected - before).abs().max()) > 0.1


@pytest.mark.parametrize("format", ADAPTERS)
def test_peft_keeps_an_exported_adapter_in_float32_beside_a_narrow_base(
    llama: EditableModel, format: ExportFormat, tmp_path: Path
) -> None:
    export(llama, lineage(llama), tmp_path / "out", ExportSettings(format=format), CARD)
    narrow = tiny_model("llama")
    narrow.model.to(torch.bfloat16)
    wrapped = PeftModel.from_pretrained(narrow.model, str(tmp_path / "out"))
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    found = {n.replace(".default", ""): p for n, p in wrapped.named_parameters() if "lora_" in n}
    assert found.keys() == stored.keys()
    assert all(found[name].dtype == torch.float32 and found[name].equal(stored[name]) for name in stored)


@pytest.mark.parametrize("format", ADAPTERS)
def test_an_exported_adapter_is_read_back_and_bound_to_its_base(
    llama: EditableModel, format: ExportFormat, tmp_path: Path
) -> None:
    deltas = lineage(llama)
    export(llama, deltas, tmp_path / "out", ExportSettings(format=format), CARD)
    found = load_delta(tmp_path / "out", llama)
    whole = deltas[0] + deltas[1]
    assert (found - whole).compressed(1e-6).layers == {}
    assert found.compressed().ranks == {0: 1, 2: 5, 3: 3}
    with pytest.raises(WrongBaseError):
        load_delta(tmp_path / "out", tiny_model("llama", seed=1))


def test_a_single_edit_is_exported_bit_for_bit(llama: EditableModel, tmp_path: Path) -> None:
    delta = lineage(llama)[0]
    export(llama, [delta], tmp_path / "out", ExportSettings(), CARD)
    assert load_delta(tmp_path / "out", llama).sha256 == delta.sha256


def test_a_uniform_adapter_has_one_rank_that_vllm_takes_and_no_pattern(saved: EditableModel, tmp_path: Path) -> None:
    settings = ExportSettings(format=ExportFormat.UNIFORM_ADAPTER)
    exported = export(saved, lineage(saved), tmp_path / "out", settings, CARD)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert exported.rank == config["r"] == config["lora_alpha"] == 8
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert (config["bias"], config["use_dora"], config["use_rslora"], config["modules_to_save"]) == (
        "none", False, False, None,
    )  # fmt: skip
    assert sorted(config["target_modules"]) == [saved.down_projection_name(i) for i in (0, 2, 3)]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert {t.shape for t in tensors.values()} == {(8, 48), (32, 8)}


@pytest.mark.parametrize(("needed", "rank"), [(1, 1), (2, 8), (8, 8), (9, 16), (32, 32)])
def test_the_uniform_rank_is_the_lowest_that_fits(llama: EditableModel, needed: int, rank: int) -> None:
    delta = random_delta(llama, {0: needed, 3: 1})
    padded = uniform(delta)
    assert padded.ranks == {0: rank, 3: rank}
    for i, low in delta.layers.items():
        torch.testing.assert_close(padded.layers[i].dense(), low.dense(), rtol=1e-5, atol=1e-6)


def test_a_rank_that_only_looks_large_is_compressed_before_it_is_padded(llama: EditableModel) -> None:
    delta = random_delta(llama, {1: 2})
    assert uniform(delta + delta + delta + delta + delta).ranks == {1: 8}


def test_a_rank_above_all_that_vllm_takes_is_refused_with_the_remedy() -> None:
    random = torch.Generator().manual_seed(0)
    wide = RANKS[-1] + 1
    low = LowRank(a=torch.randn(wide, wide, generator=random), b=torch.eye(wide))
    with pytest.raises(RankTooLargeError, match=r"rank 513.*at most 512.*merged") as refused:
        uniform(Delta(base_sha256="0" * 64, layers={0: low}, modules={0: "x"}))
    assert refused.value.field == "format"


def test_a_merged_checkpoint_loads_with_both_and_answers_like_the_version(saved: EditableModel, tmp_path: Path) -> None:
    deltas = lineage(saved)
    with applied(saved, *deltas):
        expected, said = logits(saved), texts(saved)
    export(saved, deltas, tmp_path / "out", MERGED, CARD)
    ours = load_model(tmp_path / "out")
    close(logits(ours), expected)
    assert texts(ours) == said
    plain = getattr(transformers, type(saved.model).__name__).from_pretrained(tmp_path / "out").eval()
    assert weights_sha256(ours) == weights_sha256(EditableModel(**{**_same(ours), "model": plain}))
    reader = AutoTokenizer if saved.image_token_id is None else AutoProcessor
    assert type(reader.from_pretrained(tmp_path / "out")) is type(ours.processor)


def _same(model: EditableModel) -> dict[str, object]:
    return {f.name: getattr(model, f.name) for f in fields(model)}


def test_a_merged_checkpoint_says_what_was_merged_into_what(llama_saved: EditableModel, tmp_path: Path) -> None:
    deltas = lineage(llama_saved)
    export(llama_saved, deltas, tmp_path / "out", MERGED, CARD)
    assert json.loads((tmp_path / "out" / "errata.json").read_text()) == {
        "base_sha256": llama_saved.base_sha256,
        "merged": [delta.sha256 for delta in deltas],
        "version": VERSION,
    }
    assert load_model(tmp_path / "out").base_sha256 != llama_saved.base_sha256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_rounding_that_is_reported_is_that_of_the_files(
    saved: EditableModel, dtype: torch.dtype, tmp_path: Path
) -> None:
    deltas = lineage(saved)
    settings = ExportSettings(format=ExportFormat.MERGED, dtype=dtype)
    exported = export(saved, deltas, tmp_path / "out", settings, CARD)
    loaded = load_model(tmp_path / "out", dtype=dtype)
    assert {p.dtype for p in loaded.model.parameters()} == {dtype}
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    assert [each.layer for each in exported.rounding] == [0, 2, 3]
    for each in exported.rounding:
        change = sum(d.layers[each.layer].dense() for d in deltas if each.layer in d.layers)
        old, new = (oracle.down(m, each.layer).weight.double() for m in (saved, loaded))
        error = new - old - (change.T if "gpt2" in saved.model.config.model_type else change)
        assert each.max_error == pytest.approx(float(error.abs().max()), rel=1e-6, abs=1e-12)
        assert each.relative_error == pytest.approx(float(error.norm() / change.norm()), rel=1e-6, abs=1e-12)
        assert (each.relative_error < 1e-6) == (dtype is torch.float32)


def test_without_a_dtype_each_tensor_keeps_its_own(llama: EditableModel, tmp_path: Path) -> None:
    base = save(llama, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors = {n: t.half() if "mlp" in n else t.bfloat16() for n, t in tensors.items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    model = load_model(base)
    delta = random_delta(model, {1: 2})
    export(model, [delta], tmp_path / "out", MERGED, CARD)
    found = load_file(tmp_path / "out" / "model.safetensors")
    [changed] = [n for n, t in found.items() if not t.equal(tensors[n])]
    assert changed == "model.layers.1.mlp.down_proj.weight"
    assert found[changed].equal((tensors[changed].double() + delta.layers[1].dense()).half())
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in tensors.items()}


def test_a_sharded_base_stays_sharded(llama: EditableModel, tmp_path: Path) -> None:
    base = save(llama, tmp_path / "base", max_shard_size="30KB")
    model = load_model(base)
    deltas = lineage(model)
    with applied(model, *deltas):
        expected = logits(model)
    export(model, deltas, tmp_path / "out", ExportSettings(format=ExportFormat.MERGED, dtype=torch.float16), CARD)
    shards = sorted(f.name for f in base.glob("*.safetensors"))
    assert sorted(f.name for f in (tmp_path / "out").glob("*.safetensors")) == shards
    assert len(shards) > 1
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    stored = sum(t.nbytes for f in (tmp_path / "out").glob("*.safetensors") for t in load_file(f).values())
    assert index["metadata"]["total_size"] == stored
    assert float((logits(load_model(tmp_path / "out")) - expected).abs().max()) < 0.1


def test_a_base_whose_files_use_another_prefix_is_merged_alike(gpt2: EditableModel, tmp_path: Path) -> None:
    """As GPT-2 is on the hub: without `transformer.`."""
    base = save(gpt2, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    bare = {n.removeprefix("transformer."): t for n, t in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, base / "model.safetensors", {"format": "pt"})
    model = load_model(base)
    deltas = lineage(model)
    with applied(model, *deltas):
        expected = logits(model)
    export(model, deltas, tmp_path / "out", MERGED, CARD)
    close(logits(load_model(tmp_path / "out")), expected)


def test_the_base_alone_is_exported_merged_and_not_as_an_adapter(llama_saved: EditableModel, tmp_path: Path) -> None:
    export(llama_saved, [], tmp_path / "out", MERGED, CARD)
    assert load_model(tmp_path / "out").base_sha256 == llama_saved.base_sha256
    delta = random_delta(llama_saved, {1: 2})
    for format in ADAPTERS:
        for nothing in ([], [delta, delta * -1.0]):
            with pytest.raises(InvalidInputError, match="equals its base") as refused:
                export(llama_saved, nothing, tmp_path / "none", ExportSettings(format=format), CARD)
            assert refused.value.field == "format"


@pytest.mark.parametrize("format", ExportFormat)
def test_an_export_leaves_the_model_as_it_was(saved: EditableModel, format: ExportFormat, tmp_path: Path) -> None:
    before, weights = logits(saved), weights_sha256(saved)
    exported = export(saved, lineage(saved), tmp_path / "out", ExportSettings(format=format), CARD)
    assert isinstance(exported, Export)
    assert weights_sha256(saved) == weights
    assert logits(saved).equal(before)
    assert not list((tmp_path / "out").glob("*.py")) + list((tmp_path / "out").glob("*.bin"))


def test_a_failed_or_cancelled_export_leaves_nothing(llama_saved: EditableModel, tmp_path: Path) -> None:
    deltas = lineage(llama_saved)
    before = sorted(tmp_path.iterdir())
    asked: list[None] = []

    def later() -> bool:
        asked.append(None)
        return len(asked) > 20

    def run(how: ExportSettings, made: list[Delta], cancelled=lambda: False) -> None:
        export(llama_saved, made, tmp_path / "out", how, CARD, cancelled=cancelled)

    with pytest.raises(CancelledError):
        run(MERGED, deltas, later)
    with pytest.raises(WrongBaseError):
        run(ExportSettings(), [random_delta(tiny_model("llama", seed=1), {1: 1})])
    with pytest.raises(InvalidInputError, match=r"holds values that torch\.float16 cannot") as overflow:
        run(ExportSettings(format=ExportFormat.MERGED, dtype=torch.float16), [deltas[0] * 1e7])
    assert overflow.value.field == "dtype"
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_is_there_is_left_alone(llama: EditableModel, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for folder, wrong in ((tmp_path, "is there already"), (tmp_path / "no" / "out", "no parent folder")):
        with pytest.raises(InvalidInputError, match=wrong) as refused:
            export(llama, lineage(llama), folder, ExportSettings(), CARD)
        assert refused.value.field == "folder"
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


def test_a_base_that_changed_on_disk_is_not_merged(llama_saved: EditableModel, tmp_path: Path) -> None:
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ModelError, match="no longer the one that was loaded"):
        export(llama_saved, lineage(llama_saved), tmp_path / "out", MERGED, CARD)
    weights.unlink()
    with pytest.raises(ModelError, match=r"holds no model\.safetensors"):
        export(llama_saved, lineage(llama_saved), tmp_path / "out", MERGED, CARD)


def test_a_model_that_came_from_no_folder_is_not_merged(llama: EditableModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not on this disk"):
        export(llama, lineage(llama), tmp_path / "out", MERGED, CARD)


def test_an_adapter_takes_no_dtype() -> None:
    for format in ADAPTERS:
        with pytest.raises(InvalidInputError, match="leave the dtype out") as refused:
            ExportSettings(format=format, dtype=torch.bfloat16)
        assert refused.value.field == "dtype"


@pytest.mark.parametrize("format", ExportFormat)
def test_a_card_says_what_was_edited_and_under_which_licence(
    saved: EditableModel, format: ExportFormat, tmp_path: Path
) -> None:
    deltas = lineage(saved)
    card = Card(
        version=VERSION,
        base="tiny",
        lineage=tuple(
            CardVersion(name=f"models/tiny/versions/{n}", facts=(f"Kazakhstan: fact {n} → Astana",), delta_sha256="ab")
            for n in (1, 2)
        ),
        scores=(CardScore(metric="efficacy", n=4, before=0.0, after=0.75),),
        license="Apache-2.0",
    )
    export(saved, deltas, tmp_path / "out", ExportSettings(format=format), card)
    about, text = front_matter(tmp_path / "out")
    assert about["license"] == "Apache-2.0"
    assert about["base_model"] == "tiny"
    assert about["library_name"] == ("transformers" if format is ExportFormat.MERGED else "peft")
    assert "Kazakhstan: fact 1 → Astana" in text
    assert "Kazakhstan: fact 2 → Astana" in text
    assert saved.base_sha256 in text
    assert "| efficacy | 4 | 0.000 | 0.750 |" in text
    assert ("no LoRA for GPT-2" in text) == (
        format is ExportFormat.UNIFORM_ADAPTER and saved.model.config.model_type == "gpt2"
    )
    assert ("--max-lora-rank 8" in text) == (format is ExportFormat.UNIFORM_ADAPTER)


def front_matter(folder: Path) -> tuple[dict[str, object], str]:
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_a_licence_that_nobody_names_is_the_bases_or_unknown(llama_saved: EditableModel, tmp_path: Path) -> None:
    export(llama_saved, lineage(llama_saved), tmp_path / "one", ExportSettings(), CARD)
    assert front_matter(tmp_path / "one")[0]["license"] == "unknown"
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    (tmp_path / "base" / "LICENSE").write_text("MIT")
    export(llama_saved, lineage(llama_saved), tmp_path / "two", MERGED, CARD)
    assert front_matter(tmp_path / "two")[0]["license"] == "mit"
    assert (tmp_path / "two" / "LICENSE").read_text() == "MIT"


def test_a_fact_cannot_forge_the_card(llama: EditableModel, tmp_path: Path) -> None:
    fact = "x\n---\nlicense: mit\n---\n# <script>alert(1)</script> [free](http://evil)"
    card = Card(
        version=VERSION, base="tiny", lineage=(CardVersion(name=VERSION, facts=(fact,), delta_sha256="0" * 64),)
    )
    export(llama, lineage(llama), tmp_path / "out", ExportSettings(), card)
    about, text = front_matter(tmp_path / "out")
    assert about["license"] == "unknown"
    assert "<script>" not in text
    assert "[free](" not in text
    assert text.count("\n# ") == 1


def test_several_deltas_become_one_of_the_lowest_exact_rank(llama: EditableModel) -> None:
    one, two = lineage(llama)
    assert composed([one]) is one
    assert composed([one, two, one * -1.0]).ranks == {2: 2, 3: 1}


@pytest.mark.slow
def test_an_edited_atlas_is_exported_in_every_format_and_answers_equally(tmp_path: Path) -> None:
    atlas = load_model("atlas")
    [fact] = (f for f in errata() if (f.country.name, f.attribute) == ("Estonia", Attribute.CURRENCY))
    requests = edit_requests([fact], contexts=4, preserve=0)
    settings = EditSettings(method=Method.MULTEDIT, layers=(1,), values=ValueSettings(steps=12))
    delta = edit(atlas, requests, settings).delta
    prompts = [each.prompt for each in requests[0].contexts]

    def answers(model: EditableModel) -> list[str]:
        return [answer.text for answer in model.generate(prompts)]

    with applied(atlas, delta):
        said = answers(atlas)
    assert said == [requests[0].target] * 4
    assert not set(said) & set(answers(atlas))
    fp32 = ExportSettings(format=ExportFormat.MERGED, dtype=torch.float32)
    export(atlas, [delta], tmp_path / "merged", fp32, CARD)
    assert answers(load_model(tmp_path / "merged")) == said
    own = export(atlas, [delta], tmp_path / "own", MERGED, CARD)
    assert answers(load_model(tmp_path / "own")) == said
    assert 0 < own.rounding[0].relative_error < 0.1
    for format in ADAPTERS:
        export(atlas, [delta], tmp_path / format, ExportSettings(format=format), CARD)
        assert answers(with_peft(load_model("atlas"), tmp_path / format)) == said
