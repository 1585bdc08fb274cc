"""Loading checkpoint folders, and a small trained model from end to end."""

import json
import shutil
from pathlib import Path

import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import picture, tiny_model
from transformers import BertConfig

from errata.editor.checkpoints import hash_files, hash_tensors, load_model
from errata.editor.delta import applied
from errata.editor.errors import (
    CorruptionFailedError,
    ModelError,
    NonFiniteWeightsError,
    UnknownFamilyError,
    UnsafeCheckpointError,
)
from errata.editor.methods import EditSettings, Method, edit
from errata.editor.model import EditableModel
from errata.editor.prompts import Constraint, Prompt
from errata.editor.requests import Context, EditRequest
from errata.editor.trace import Substitution, TraceRequest, TraceSettings, trace
from errata.editor.values import ValueSettings

ASKED = "What is the capital of this country?"


def saved(model: EditableModel, folder: Path, **how: object) -> Path:
    model.model.save_pretrained(folder, **how)
    model.processor.save_pretrained(folder)
    return folder


def test_a_saved_checkpoint_is_loaded_and_answers_alike(model: EditableModel, tmp_path: Path) -> None:
    found = load_model(saved(model, tmp_path))
    prompt = Prompt(text=ASKED, images=() if model.image_token_id is None else (picture(),))
    assert found.generate([prompt]) == model.generate([prompt])
    assert oracle.logits(found, found.encode(prompt)).equal(oracle.logits(model, model.encode(prompt)))
    assert type(found.family) is type(model.family)
    assert found.name == str(tmp_path)
    assert not found.model.training
    assert not any(p.requires_grad for p in found.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_checkpoint_has_one_hash_in_every_dtype_and_however_it_is_sharded(
    model: EditableModel, tmp_path: Path, dtype: torch.dtype
) -> None:
    whole = load_model(saved(model, tmp_path / "whole"), dtype=dtype)
    sharded = load_model(saved(model, tmp_path / "sharded", max_shard_size="30KB"), dtype=dtype)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert whole.base_sha256 == sharded.base_sha256 == hash_files([tmp_path / "whole" / "model.safetensors"])
    assert {p.dtype for p in whole.model.parameters()} == {dtype}
    assert oracle.logits(whole, whole.encode(_prompt(whole))).equal(
        oracle.logits(sharded, sharded.encode(_prompt(sharded)))
    )


def _prompt(model: EditableModel) -> Prompt:
    return Prompt(text=ASKED)


def test_a_hash_tells_names_dtypes_shapes_and_values_apart() -> None:
    x = torch.arange(6.0)
    hashes = [
        hash_tensors([("a", x)]),
        hash_tensors([("b", x)]),
        hash_tensors([("a", x.half())]),
        hash_tensors([("a", x.view(2, 3))]),
        hash_tensors([("a", x.view(torch.int32))]),
        hash_tensors([("a", x + 1e-6)]),
        hash_tensors([("a", -x)]),
        hash_tensors([("a", x), ("b", x)]),
        hash_tensors([]),
    ]
    assert len(set(hashes)) == len(hashes)
    assert hash_tensors([("b", x), ("a", x)]) == hash_tensors([("a", x), ("b", x.clone())])
    assert hash_tensors([("a", x.view(2, 3).T.contiguous())]) == hash_tensors([("a", x.view(2, 3).T)])


def test_a_hash_in_memory_is_the_hash_of_the_file(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3, dtype=torch.bfloat16), "s": torch.tensor(2.0), "e": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert hash_files([tmp_path / "x.safetensors"]) == hash_tensors(tensors.items())


@pytest.fixture
def folder(llama: EditableModel, tmp_path: Path) -> Path:
    return saved(llama, tmp_path / "checkpoint")


def test_a_pickled_checkpoint_is_refused_without_being_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(UnsafeCheckpointError, match=r"pickled weights \(pytorch_model.bin\).*save_pretrained"):
        load_model(folder)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_checkpoints_own_code_is_neither_run_nor_asked_about(
    folder: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass C: pass\n")
    maps = {"AutoConfig": "evil.C", "AutoTokenizer": ["evil.C", None]}
    changed = json.loads((folder / file).read_text()) | {"auto_map": maps}
    changed |= {"model_type": "zzz"} if file == "config.json" else {"tokenizer_class": "Zzz"}
    (folder / file).write_text(json.dumps(changed))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ModelError):
        load_model(folder)
    assert not (folder / "ran").exists()


def test_safetensors_are_taken_where_pickled_weights_lie_beside_them(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert len(load_model(folder).layers) == 4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(folder: Path, bad: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = bad
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteWeightsError, match=r"model\.layers\.2\.mlp\.up_proj\.weight holds NaN or infinity"):
        load_model(folder)


def test_weights_that_overflow_in_half_precision_are_refused_there_only(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert load_model(folder).base_sha256 == load_model(folder, dtype=torch.bfloat16).base_sha256
    with pytest.raises(NonFiniteWeightsError, match="overflowed in a narrower dtype"):
        load_model(folder, dtype=torch.float16)


def test_an_architecture_without_a_family_is_refused_with_those_there_are(tmp_path: Path) -> None:
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(tmp_path)
    with pytest.raises(UnknownFamilyError, match=r"'BertForMaskedLM'.*LlavaForConditionalGeneration.*Llama"):
        load_model(tmp_path)


def _without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _with_a_broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _with_cut_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])


def _with_empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def _without_tokenizer(folder: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()


def _without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _with_a_tensor_of_another_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"] = torch.ones(3, 3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _gone(folder: Path) -> None:
    shutil.rmtree(folder)


def _without_a_shard(folder: Path) -> None:
    saved(tiny_model("llama"), folder, max_shard_size="30KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    next(folder.glob("model-00002*.safetensors")).unlink()


def _with_a_broken_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{")


@pytest.mark.parametrize(
    "damage",
    [
        _gone,
        _without_config,
        _with_a_broken_config,
        _without_weights,
        _with_cut_weights,
        _with_empty_weights,
        _without_tokenizer,
        _without_a_tensor,
        _with_a_tensor_of_another_shape,
        _without_a_shard,
        _with_a_broken_index,
    ],
)
def test_a_damaged_checkpoint_is_a_model_error_that_names_it(folder: Path, damage) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=str(folder)):
        load_model(folder)


def test_a_name_that_is_neither_a_folder_nor_cached_is_refused() -> None:
    with pytest.raises(ModelError, match="no model can be read at 'nobody/nothing'"):
        load_model("nobody/nothing")


def test_a_chat_template_is_loaded_with_its_processor(llava: EditableModel, tmp_path: Path) -> None:
    found = load_model(saved(llava, tmp_path))
    prompt = Prompt(text=ASKED, images=(picture(),))
    assert found.encode(prompt).ids.equal(llava.encode(prompt).ids)
    assert found.encode(prompt).vision["pixel_values"].equal(llava.encode(prompt).vision["pixel_values"])


STORIES = Path(__file__).parents[3] / "shared" / "models" / "stories260K"
"""A trained Llama of 260 K parameters (MIT); it lies beside the repository, not in it."""


@pytest.fixture(scope="module")
def stories() -> EditableModel:
    if not (STORIES / "config.json").exists():
        pytest.skip(f"the trained checkpoint stories260K is not at {STORIES}: it is data outside of the repository")
    return load_model(STORIES)


def test_a_trained_checkpoint_generates_its_language(stories: EditableModel) -> None:
    answer = stories.generate([Prompt(text="Once upon a time, there was a little")], max_new_tokens=12)[0]
    assert "girl" in answer.text or "boy" in answer.text
    assert stories.generate([Prompt(text="Once upon a time, there was a little")], max_new_tokens=12)[0] == answer


def test_a_trained_checkpoint_is_traced_to_the_name_it_repeats(stories: EditableModel) -> None:
    asked = TraceRequest(
        prompt=Prompt(text="Once upon a time, there was a little girl named Lily. She was very happy. One day,"),
        constraint=Constraint(text="Lily"),
        corruption=Substitution(word="Tom"),
        answer="Lily",
    )
    settings = TraceSettings(min_total_effect=0.02)
    found = trace(stories, asked, settings)
    assert found.total_effect > 0.02
    assert float(found.restored[:, :, list(found.constraint)].max()) > found.corrupted.whole + 0.2 * found.total_effect
    with pytest.raises(CorruptionFailedError):
        trace(
            stories,
            TraceRequest(
                prompt=asked.prompt,
                constraint=Constraint(text="upon"),
                corruption=Substitution(word="on"),
                answer="Lily",
            ),
            TraceSettings(min_total_effect=0.9),
        )


def test_a_trained_checkpoint_is_edited_and_left_as_it_was(stories: EditableModel) -> None:
    context = Context(prompt=Prompt(text="The cat sat on the"), constraint=Constraint(text="cat"))
    request = EditRequest(name="dog", contexts=(context,), target="dog")
    settings = EditSettings(
        layers=(1,),
        method=Method.MULTEDIT,
        values=ValueSettings(clamp=12.0, steps=80, learning_rate=0.2, stop_loss=0.1),
    )
    before = hash_tensors(stories.model.state_dict().items())
    plain = stories.generate([context.prompt])[0]
    result = edit(stories, [request], settings)
    assert result.unconverged == ()
    with applied(stories, result.delta):
        assert stories.generate([context.prompt])[0].text.startswith("dog")
    assert hash_tensors(stories.model.state_dict().items()) == before
    assert stories.generate([context.prompt])[0] == plain
    assert not plain.text.startswith("dog")
