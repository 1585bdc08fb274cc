"""Adapters from elsewhere: what PEFT would answer, or a refusal that names the setting."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import question, random_delta, tiny_model

from errata.editor.adapters import read_adapter
from errata.editor.delta import applied
from errata.editor.errors import CorruptDeltaError, DeltaError, UnsupportedAdapterError, WrongBaseError
from errata.editor.model import EditableModel

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 4},
    "alpha that is not the rank": {"r": 4, "lora_alpha": 7},
    "rank-stabilized": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "ranks by layer": {"r": 4, "lora_alpha": 8, "rank_pattern": {"layers.1.mlp.down_proj": 2}},
    "alphas by layer": {"r": 4, "lora_alpha": 8, "alpha_pattern": {"layers.1.mlp.down_proj": 3}},
    "both by layer": {"rank_pattern": {"1.mlp.down_proj": 2}, "alpha_pattern": {"2.mlp.down_proj": 3}},
    "some layers": {"r": 2, "layers_to_transform": [0, 3]},
    "dropout": {"r": 2, "lora_dropout": 0.5},
    "gaussian": {"r": 2, "init_lora_weights": "gaussian"},
}


def logits(model: EditableModel) -> torch.Tensor:
    return oracle.logits(model, model.encode(question(model)))[-1]


def trained(family: str, folder: Path, **settings: Any) -> torch.Tensor:
    """An adapter that PEFT stored, with random factors; gives what PEFT's model answers."""
    base = tiny_model(family)
    modules = {"target_modules": "mlp.c_proj" if family == "gpt2" else "down_proj", "fan_in_fan_out": family == "gpt2"}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        wrapped = get_peft_model(base.model, LoraConfig(**{**modules, **settings, **_listed(settings, modules)})).eval()
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.2)
    wrapped.save_pretrained(str(folder))
    return logits(replace(base, model=wrapped.get_base_model()))


def _listed(settings: dict[str, Any], modules: dict[str, Any]) -> dict[str, Any]:
    named = settings.get("target_modules", modules["target_modules"])
    return {"target_modules": [named] if isinstance(named, str) else named}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("family", ["llava", "llama"])
def test_an_adapter_from_elsewhere_answers_as_with_peft(family: str, case: str, tmp_path: Path) -> None:
    expected = trained(family, tmp_path, **SETTINGS[case])
    model = tiny_model(family)
    delta = read_adapter(tmp_path, model, base_sha256=model.base_sha256)
    before = logits(model)
    with applied(model, delta):
        found = logits(model)
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert float((found - before).abs().max()) > 0.01


def test_a_transposed_family_is_read_alike(tmp_path: Path) -> None:
    expected = trained("gpt2", tmp_path, r=2, lora_alpha=3)
    model = tiny_model("gpt2")
    with applied(model, read_adapter(tmp_path, model, base_sha256=model.base_sha256)):
        assert float((logits(model) - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_a_narrow_adapter_is_widened_without_loss(llama: EditableModel, tmp_path: Path) -> None:
    trained("llama", tmp_path, r=2, lora_alpha=2)
    path = tmp_path / "adapter_model.safetensors"
    narrow = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(narrow, path)
    delta = read_adapter(tmp_path, llama, base_sha256=llama.base_sha256)
    for i, low in delta.layers.items():
        name = f"base_model.model.{llama.down_projection_name(i)}"
        assert low.a.equal(narrow[f"{name}.lora_A.weight"].float())
        assert low.b.equal(narrow[f"{name}.lora_B.weight"].float())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "trained biases": ({"bias": "lora_only"}, "bias"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 4]]}, "layer_replication"),
    "other modules": ({"target_modules": ["down_proj", "q_proj"]}, "target_modules"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_delta_is_refused_by_its_setting(llama: EditableModel, tmp_path: Path, case: str) -> None:
    settings, setting = REFUSED[case]
    trained("llama", tmp_path, r=2, **settings)
    with pytest.raises(UnsupportedAdapterError) as refused:
        read_adapter(tmp_path, llama, base_sha256=llama.base_sha256)
    assert refused.value.setting == setting
    assert str(refused.value).startswith(f"{setting}: ")


def _config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
FORGED: dict[str, tuple[Callable[[Path], object], type[DeltaError], str]] = {
    "another method": (lambda f: _config(f, peft_type="LOHA"), UnsupportedAdapterError, "peft_type"),
    "a bias of its own": (lambda f: _config(f, lora_bias=True), UnsupportedAdapterError, "lora_bias"),
    "a setting of tomorrow": (lambda f: _config(f, use_zora={"x": 1}), UnsupportedAdapterError, "use_zora"),
    "a regular expression": (
        lambda f: _config(f, alpha_pattern={"(a+)+$": 2}), UnsupportedAdapterError, "alpha_pattern"
    ),
    "a rank that is not the tensors'": (lambda f: _config(f, r=3), CorruptDeltaError, "says 3"),
    "an alpha that is no number": (lambda f: _config(f, lora_alpha="4"), CorruptDeltaError, "lora_alpha"),
    "an infinite alpha": (lambda f: _config(f, lora_alpha=float("inf")), CorruptDeltaError, "lora_alpha"),
    "a pattern that is a list": (lambda f: _config(f, rank_pattern=["x"]), CorruptDeltaError, "rank_pattern"),
    "a config that is a list": (lambda f: (f / "adapter_config.json").write_text("[]"), CorruptDeltaError, "readable"),
    "a config that is no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), CorruptDeltaError, "readable"),
    "a config that is all brackets": (
        lambda f: (f / "adapter_config.json").write_text("[" * 100_000), CorruptDeltaError, "readable"
    ),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), CorruptDeltaError, "readable"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), CorruptDeltaError, "readable"),
    "pickled weights": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), UnsupportedAdapterError, "pickled"
    ),
    "no tensor": (lambda f: _tensors(f, lambda t: t.clear()), CorruptDeltaError, "no factors"),
    "half a pair": (lambda f: _tensors(f, lambda t: t.pop(FIRST)), CorruptDeltaError, "one factor of two"),
    "a tensor that is no factor": (
        lambda f: _tensors(f, lambda t: t.update(x=torch.ones(1))), UnsupportedAdapterError, "'x'"
    ),
    "a factor of another width": (
        lambda f: _tensors(f, lambda t: t.update({FIRST: torch.ones(2, 47)})), DeltaError, "layer 0"
    ),
    "a factor of another rank": (
        lambda f: _tensors(f, lambda t: t.update({FIRST: torch.ones(5, 48)})), CorruptDeltaError, "do not fit"
    ),
    "NaN": (lambda f: _tensors(f, lambda t: t[FIRST].fill_(torch.nan)), DeltaError, "finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_adapter_is_refused(llama: EditableModel, tmp_path: Path, case: str) -> None:
    forge, error, said = FORGED[case]
    trained("llama", tmp_path, r=2, lora_alpha=2)
    forge(tmp_path)
    with pytest.raises(error, match=said):
        read_adapter(tmp_path, llama, base_sha256=llama.base_sha256)


def test_a_base_must_be_named_by_the_adapter_or_by_its_caller(llama: EditableModel, tmp_path: Path) -> None:
    trained("llama", tmp_path / "theirs", r=2)
    delta = random_delta(llama, {1: 2})
    delta.save(tmp_path / "ours")
    with pytest.raises(DeltaError, match="does not name its base"):
        read_adapter(tmp_path / "theirs", llama)
    assert read_adapter(tmp_path / "ours", llama).sha256 == delta.sha256
    for folder in ("ours", "theirs"):
        with pytest.raises(WrongBaseError):
            read_adapter(tmp_path / folder, llama, base_sha256="0" * 64)
    with pytest.raises(WrongBaseError):
        read_adapter(tmp_path / "ours", tiny_model("llama", seed=1))


def test_what_was_read_is_saved_as_an_adapter_of_scale_one(llama: EditableModel, tmp_path: Path) -> None:
    trained("llama", tmp_path / "theirs", r=4, lora_alpha=7)
    delta = read_adapter(tmp_path / "theirs", llama, base_sha256=llama.base_sha256)
    delta.save(tmp_path / "ours")
    assert read_adapter(tmp_path / "ours", llama).sha256 == delta.sha256
