"""Architectures that no family names: taken where their structure is unambiguous and a run agrees, else refused."""

import json
import os
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import logits
from tiny import ARCHITECTURES, context, picture, random_delta, tiny_model
from tiny_text import sizes
from tiny_tokenizer import tokenizer
from tiny_vision import NEED_TORCHVISION, VISION
from transformers import LlavaConfig, LlavaForConditionalGeneration

from errata.editor.checkpoints import load_model
from errata.editor.delta import applied
from errata.editor.errors import ModelError, UnknownFamilyError
from errata.editor.families import FAMILIES, family_of
from errata.editor.families.structure import family_by_structure
from errata.editor.mixed import mixed
from errata.editor.prompts import Prompt
from errata.editor.trace import Substitution, TraceRequest, TraceSettings, trace
from errata.editor.unfamiliar import check_unfamiliar

# PaliGemma's processor makes arrays of tensors in a way that NumPy 2 asks it not to.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

_STORIES = Path(os.environ.get("ERRATA_STORIES", Path(__file__).parents[3] / "shared" / "models" / "stories260K"))


def saved(folder: Path, architecture: str, config: str, **settings: Any) -> Path:
    """A folder with a tiny model of an architecture, and its tokenizer."""
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(getattr(transformers, config)(**{**sizes(), **settings}))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [n for n in ARCHITECTURES if not n.startswith(("phi3", "phi4"))])
def test_structure_shows_of_a_known_architecture_what_its_family_says(name: str) -> None:
    """But for Phi-3 and Phi-4, whose attention defines its output map first."""
    model = tiny_model(name)
    found = family_by_structure(model.model)
    # A processor's habits and the norms' places are no structure.
    unseen = {"architectures", "mlp_norm", "answer_token_type"}
    for part in (f.name for f in fields(found) if f.name not in unseen):
        assert getattr(found, part) == getattr(model.family, part)


@pytest.mark.parametrize(
    ("architecture", "config", "settings"),
    [
        ("StableLmForCausalLM", "StableLmConfig", {}),
        ("Starcoder2ForCausalLM", "Starcoder2Config", {"sliding_window": 5}),
        ("CodeGenForCausalLM", "CodeGenConfig", {"n_layer": 4, "n_embd": 32, "n_head": 4, "rotary_dim": 4}),
        ("SmolLM3ForCausalLM", "SmolLM3Config", {}),
        ("OlmoForCausalLM", "OlmoConfig", {}),
        ("FalconForCausalLM", "FalconConfig", {"ffn_hidden_size": 48}),
    ],
)
def test_an_unknown_architecture_is_found_by_its_structure(
    tmp_path: Path, architecture: str, config: str, settings: dict[str, Any]
) -> None:
    model = load_model(saved(tmp_path, architecture, config, **settings))
    assert model.family not in FAMILIES
    asked = context(model)
    request = TraceRequest(
        prompt=asked.prompt, constraint=asked.constraint, corruption=Substitution(word="Paris"), answer="Rome"
    )
    found = trace(model, request, TraceSettings(min_total_effect=-1))
    assert found.restored.shape[1] == 4
    row = model.encode(Prompt(text="What is this?"))
    width = model.down_projection(1).get_parameter("weight").shape[1]
    delta = random_delta(model, {1: 2}, inner=width)
    with applied(model, delta):
        alone = logits(model, row)
    with mixed(model, [(), (delta,)]), torch.no_grad():
        together = model.model(**model.inputs([row, row])).logits
    torch.testing.assert_close(together[1], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together[0], alone)


@pytest.mark.parametrize(
    ("architecture", "config", "settings", "reason"),
    [
        ("MixtralForCausalLM", "MixtralConfig", {}, r"layer 0 is a mixture of experts \(mlp.experts\)"),
        ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {"num_experts": 4}, "layer 0 is a mixture of experts"),
        ("BloomForCausalLM", "BloomConfig", {"n_layer": 4}, "2 candidates for the norm between"),
        ("MambaForCausalLM", "MambaConfig", {}, "its layers have 0 attentions"),
        ("GraniteForCausalLM", "GraniteConfig", {"residual_multiplier": 0.5}, "add something else than attention"),
        ("CohereForCausalLM", "CohereConfig", {}, "its head makes other logits"),
        ("Olmo2ForCausalLM", "Olmo2Config", {}, "add something else than attention"),
        ("Glm4ForCausalLM", "Glm4Config", {"head_dim": 8}, "add something else than attention"),
        ("DiffLlamaForCausalLM", "DiffLlamaConfig", {}, "a run started in the middle gives other logits"),
        (
            "OPTForCausalLM",
            "OPTConfig",
            {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
            "model.decoder has 0 candidates for the norm between",
        ),
    ],
)
def test_what_structure_or_a_run_contradicts_is_refused_with_what_was_found(
    tmp_path: Path, architecture: str, config: str, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnknownFamilyError, match=f"{architecture}.*{reason}"):
        load_model(saved(tmp_path, architecture, config, **settings))


def gpt_neo(folder: Path, window: int) -> Path:
    """Every other layer has a window, in a mask of its own."""
    named = {**sizes(), "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]}
    for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        del named[name]
    torch.manual_seed(0)
    transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**named, window_size=window)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("window", [5, 128])
def test_layers_that_mask_by_a_window_of_their_own_are_refused(tmp_path: Path, window: int) -> None:
    """Also where it is wider than any run that is tried."""
    with pytest.raises(UnknownFamilyError, match=r"layer 1 of GPTNeo.*window of its own \(attn\.attention\.bias\)"):
        load_model(gpt_neo(tmp_path, window))


def test_runs_in_one_row_show_a_window_that_no_buffer_does(tmp_path: Path) -> None:
    model = load_model(gpt_neo(tmp_path, 256))  # as long as its context: plain causal attention
    for layer in (1, 3):
        attention = model.layers[layer].get_submodule("attn.attention")
        mask = attention.get_buffer("bias")
        attention.register_buffer("bias", (mask ^ mask.tril(-5))[:, :, :-1])  # no square
    with pytest.raises(UnknownFamilyError, match="runs that share a row give other logits"):
        check_unfamiliar(model)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
@pytest.mark.parametrize(
    ("name", "processor", "images"),
    [
        ("qwen2_vl", "Qwen2VLProcessor", "Qwen2VLImageProcessor"),
        ("phi4_multimodal", "Phi4MultimodalProcessor", "Phi4MultimodalImageProcessor"),
    ],
)
def test_a_processor_whose_package_is_not_installed_is_refused_with_its_name(
    tmp_path: Path, name: str, processor: str, images: str
) -> None:
    model = tiny_model(name)
    model.model.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    settings = {"processor_class": processor, "image_processor_type": images}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"(?s)(needs a package|could be imported).*[Tt]orchvision"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", [name for name in VISION if find_spec("torchvision") or name not in NEED_TORCHVISION])
def test_a_model_that_sees_is_loaded_with_its_processor(tmp_path: Path, name: str) -> None:
    """An image is the same pixels whether or not torchvision is installed."""
    model = tiny_model(name)
    model.model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    found, asked = load_model(tmp_path), Prompt(text="What is this?", images=(picture().resize((37, 29)),))
    assert found.family is model.family
    ours, theirs = (m.encode(asked).vision for m in (found, model))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert found.generate([asked], max_new_tokens=4) == model.generate([asked], max_new_tokens=4)


@pytest.mark.parametrize("name", ["pipeline", "AutoModel", "LlamaConfig", "NoSuchModel"])
def test_an_architecture_that_is_no_model_of_transformers_is_refused(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path, "LlamaForCausalLM", "LlamaConfig")
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": [name]}))
    with pytest.raises(UnknownFamilyError, match=f"{name}.*transformers has no model of that name"):
        load_model(folder)


def test_an_architecture_with_another_text_decoder_than_its_familys_is_found_by_its_structure() -> None:
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 24, "patch_size": 8}
    text = {**sizes(), "model_type": "phi"}
    found = family_of(LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)))
    assert (found.decoder, found.final_norm) == ("model.language_model", "final_layernorm")
    assert found.down_projection == "mlp.fc2"


def test_the_table_of_families_lists_every_architecture_and_no_other() -> None:
    table = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    listed = {row[1].strip().strip("`"): row[3].strip() for row in rows}
    known = {a: "yes" if f.image_token else "no" for f in FAMILIES for a in f.architectures}
    assert listed == known
    assert len(listed) == len(rows)


@pytest.mark.skipif(not _STORIES.is_dir(), reason="stories260K is not part of the project")
def test_a_trained_checkpoint_from_elsewhere_is_traced_and_answers() -> None:
    model = load_model(_STORIES)
    prompt = Prompt(text="Once upon a time, there was a little girl named", chat=False)
    assert model.generate([prompt], max_new_tokens=8)[0].text
    asked = context(model, "Once upon a time, there was a little girl", "little girl")
    request = TraceRequest(prompt=asked.prompt, constraint=asked.constraint, corruption=Substitution(word="dog"))
    found = trace(model, request, TraceSettings(min_total_effect=-1))
    assert found.restored.shape[1] == len(model.layers)
