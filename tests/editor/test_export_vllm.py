"""A uniform adapter's folder, read as vLLM's documentation says that vLLM reads one.

vLLM itself is not run: it pins other releases of PyTorch and transformers. The reader below is our own wording of its
rules, from these pages of docs.vllm.ai:

| rule | page |
|---|---|
| the configuration's fields, what is refused of them, the scale | v0.10.0, latest: api/vllm/lora/peft_helper |
| ranks that may be configured; the adapter's is at most that | v0.14.0, v0.22.1: api/vllm/config/lora |
| names of tensors | v0.15.0: api/vllm/lora/utils |
| the last part of a module's name is one that takes LoRA | v0.22.1: api/vllm/lora/lora_model |
| prefixes that a multimodal model maps | v0.20.2, v0.29.0: api/vllm/model_executor/models/llava |
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_delta, tiny_model

from errata.editor.card import Card
from errata.editor.delta import Delta
from errata.editor.export import ExportFormat, ExportSettings, composed, export
from errata.editor.model import EditableModel

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
TAKE_LORA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
"""Suffixes of the linear layers of vLLM's Llama, the packed ones (qkv_proj, gate_up_proj) taken apart."""

RENAMED: Mapping[str, Mapping[str, str]] = {
    "llama": {},
    "llava": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    },
}
"""Prefixes as checkpoints have them since transformers 4.52, and as vLLM calls these modules."""

MODULES = {"llama": "model.layers.{}.mlp.down_proj", "llava": "language_model.model.layers.{}.mlp.down_proj"}
"""What vLLM calls the down-projection of a layer."""


class RefusedError(ValueError):
    """What vLLM would refuse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """An adapter as it was read: its scale, and A (rank × inner) and B (width × rank) by module."""

    scale: float
    a: Mapping[str, torch.Tensor]
    b: Mapping[str, torch.Tensor]


def read_as_vllm(folder: Path, family: str, max_lora_rank: int) -> Read:
    """Raises RefusedError."""
    config = json.loads((folder / "adapter_config.json").read_text())
    _check_config(config, max_lora_rank)
    found: dict[str, dict[str, torch.Tensor]] = {"lora_A": {}, "lora_B": {}}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        module, factor = _parsed(name, RENAMED[family])
        if module.rsplit(".", 1)[-1] not in TAKE_LORA:
            raise RefusedError(f"{module} takes no LoRA")
        found[factor][module] = tensor
    return Read(scale=config["lora_alpha"] / config["r"], a=found["lora_A"], b=found["lora_B"])


def _check_config(config: Mapping[str, object], max_lora_rank: int) -> None:
    if missing := {"r", "lora_alpha", "target_modules"} - config.keys():
        raise RefusedError(f"the configuration lacks {missing}")
    if max_lora_rank not in MAX_LORA_RANKS:
        raise RefusedError(f"--max-lora-rank takes one of {MAX_LORA_RANKS}")
    rank = config["r"]
    if not isinstance(rank, int) or rank > max_lora_rank:
        raise RefusedError(f"rank {rank} is greater than max_lora_rank {max_lora_rank}")
    if config.get("bias", "none") != "none":
        raise RefusedError("adapter bias is not supported")
    for field in ("modules_to_save", "use_dora"):
        if config.get(field):
            raise RefusedError(f"{field} is not supported")


def _parsed(name: str, renamed: Mapping[str, str]) -> tuple[str, str]:
    bare = name.removeprefix("base_model.model.")
    old = next((prefix for prefix in renamed if bare.startswith(prefix)), "")
    *module, factor, weight = (renamed.get(old, "") + bare.removeprefix(old)).split(".")
    if weight != "weight" or factor not in ("lora_A", "lora_B"):
        raise RefusedError(f"{name} is unsupported LoRA weight")
    return ".".join(module), factor


def exported(model: EditableModel, deltas: list[Delta], folder: Path, format: ExportFormat) -> Path:
    settings = ExportSettings(format=format)
    return export(model, deltas, folder, settings, Card(version="models/tiny/versions/2", base="tiny")).folder


@pytest.fixture
def uniform_folder(tmp_path: Path) -> Path:
    model = tiny_model("llama")
    return exported(model, [random_delta(model, {1: 3, 2: 1})], tmp_path / "out", ExportFormat.UNIFORM_ADAPTER)


@pytest.mark.parametrize("family", RENAMED)
def test_vllm_finds_the_versions_own_change_in_the_folder(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    deltas = [random_delta(model, {0: 1, 2: 3}, seed=1), random_delta(model, {2: 2, 3: 1}, seed=2)]
    read = read_as_vllm(exported(model, deltas, tmp_path / "out", ExportFormat.UNIFORM_ADAPTER), family, 8)
    whole = composed(deltas)
    assert read.scale == 1.0
    assert read.a.keys() == read.b.keys() == {MODULES[family].format(i) for i in whole.layers}
    for i, low in whole.layers.items():
        module = MODULES[family].format(i)
        assert read.a[module].shape[0] == read.b[module].shape[1] == 8
        change = read.b[module].double() @ read.a[module].double()
        torch.testing.assert_close(change, low.dense().double(), rtol=1e-5, atol=1e-6)


def test_the_folder_needs_the_rank_that_the_export_says(uniform_folder: Path) -> None:
    card = (uniform_folder / "README.md").read_text()
    assert "--max-lora-rank 8" in card
    assert read_as_vllm(uniform_folder, "llama", 16).scale == 1.0
    with pytest.raises(RefusedError, match="rank 8 is greater than max_lora_rank 1"):
        read_as_vllm(uniform_folder, "llama", 1)


@pytest.mark.parametrize(
    ("field", "value", "refused"),
    [
        ("bias", "all", "bias"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("use_dora", True, "use_dora"),
        ("r", 9, "rank 9"),
    ],
)
def test_the_reader_refuses_what_vllm_refuses(uniform_folder: Path, field: str, value: object, refused: str) -> None:
    file = uniform_folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(RefusedError, match=refused):
        read_as_vllm(uniform_folder, "llama", 8)


@pytest.mark.parametrize("suffix", ["mlp.down_proj.weight", "mlp.other.lora_A.weight"])
def test_the_reader_refuses_tensors_that_are_no_lora(uniform_folder: Path, suffix: str) -> None:
    file = uniform_folder / "adapter_model.safetensors"
    save_file({**load_file(file), f"base_model.model.model.layers.0.{suffix}": torch.zeros(1, 1)}, file)
    with pytest.raises(RefusedError, match=r"unsupported LoRA weight|takes no LoRA"):
        read_as_vllm(uniform_folder, "llama", 8)


def test_a_plain_adapter_says_ranks_by_layer_that_vllm_does_not_read(tmp_path: Path) -> None:
    """Why the uniform one is for vLLM: it scales every module by alpha / r and knows no patterns."""
    model = tiny_model("llama")
    folder = exported(model, [random_delta(model, {1: 3, 2: 1})], tmp_path / "out", ExportFormat.ADAPTER)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    ranks = {len(a) for a in read_as_vllm(folder, "llama", 8).a.values()}
    assert ranks == {3, 1} != {config["r"]}
