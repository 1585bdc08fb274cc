"""PEFT adapters made elsewhere, read as deltas: what is exactly a low-rank ΔW of down-projections, and nothing else.

A LoRA is ΔW = s·BA with s = alpha / rank (or alpha / √rank). Whatever else an adapter's settings do to a model has no
place in a delta, so a setting that is not known to be harmless is refused by its name.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from errata.editor.delta import CONFIG, MANIFEST, WEIGHTS, Delta, LowRank, check_base, check_fit, load_delta
from errata.editor.errors import CorruptDeltaError, DeltaError, UnsupportedAdapterError, WrongBaseError
from errata.editor.model import EditableModel

_USED = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias"}
_HARMLESS = {
    # where it came from
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    # what was trained, which the tensors say better
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out",
    # how it was trained
    "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size",
}  # fmt: skip
_KEPT_BASE = (True, False, "gaussian", "orthogonal")
"""Initialisations that leave the base's weights alone. Others (PiSSA, OLoRA, LoftQ, …) change them when they load."""

_PATTERN = re.compile(r"[\w.^$]+")
_TENSOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")

_Json: TypeAlias = "Mapping[str, _Json] | list[_Json] | str | int | float | bool | None"


def read_adapter(folder: Path, model: EditableModel, *, base_sha256: str = "") -> Delta:
    """The delta that a PEFT adapter folder holds, in float32, its scale multiplied into `b`.

    `base_sha256` is the base that it was trained on, as `EditableModel.base_sha256` says it; an adapter that Errata
    stored names it itself, another one does not, so that the caller must.

    Raises UnsupportedAdapterError for one that is no such delta, WrongBaseError for one of another base, DeltaError
    where no base is known or the tensors do not fit the model, CorruptDeltaError for what cannot be read.
    """
    if (folder / MANIFEST).is_file():
        delta = load_delta(folder, model)
        if base_sha256 and base_sha256 != delta.base_sha256:
            raise WrongBaseError(f"the adapter names the base {delta.base_sha256[:12]}…, not {base_sha256[:12]}…")
    else:
        if not base_sha256:
            raise DeltaError("the adapter does not name its base; state the SHA-256 of the one it was trained on")
        lows = _layers(folder, model)
        modules = {i: model.down_projection_name(i) for i in lows}
        delta = Delta(base_sha256=base_sha256, layers=lows, modules=modules)
        check_base(delta, model)
        check_fit(delta, model)
    return delta


@dataclass(frozen=True, slots=True)
class _Scaling:
    """How an adapter's settings scale each module."""

    rank: float
    alpha: float
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    stabilized: bool

    def of(self, module: str, rank: int) -> float:
        """Raises CorruptDeltaError where the tensors have another rank than the settings say."""
        from peft.utils.other import get_pattern_key  # seconds to import

        said = self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), module), self.rank)
        if said != rank:
            raise CorruptDeltaError(f"{module} has rank {rank}, and {CONFIG} says {said}; fetch the adapter again")
        alpha = self.alpha_pattern.get(get_pattern_key(list(self.alpha_pattern), module), self.alpha)
        return alpha / (math.sqrt(rank) if self.stabilized else rank)


def _layers(folder: Path, model: EditableModel) -> dict[int, LowRank]:
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise UnsupportedAdapterError("pickled weights can run code; store them as safetensors", setting=WEIGHTS)
    try:
        scaling = _scaling(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise CorruptDeltaError(f"{folder} is no readable PEFT adapter: {error}; fetch it again") from error
    found: dict[int, LowRank] = {}
    for i, (module, a, b) in sorted(_pairs(tensors, model).items()):
        if a.ndim != 2 or b.ndim != 2 or b.shape[1] != a.shape[0] or not a.shape[0]:
            shapes = f"{tuple(b.shape)} and {tuple(a.shape)}"
            raise CorruptDeltaError(f"the factors of {module} are {shapes}, which do not fit; fetch the adapter again")
        scale = scaling.of(module, a.shape[0])
        found[i] = LowRank(a=a.float(), b=b.float() if scale == 1 else (b.double() * scale).float())
    if not found:
        raise CorruptDeltaError(f"{folder} holds no factors at all; fetch the adapter again")
    return found


def _scaling(config: Mapping[str, _Json]) -> _Scaling:
    """How the settings scale, once nothing else in them does anything."""
    for setting, value in config.items():
        if value and setting not in _USED | _HARMLESS and not _unused(setting, config):
            raise UnsupportedAdapterError(
                f"{json.dumps(value)[:60]} does more than add ΔW = BA; merge it, or train without it", setting=setting
            )
    if config["peft_type"] != "LORA":
        raise UnsupportedAdapterError(f"{config['peft_type']!r} is no LoRA", setting="peft_type")
    if config.get("bias", "none") != "none":
        raise UnsupportedAdapterError("a version changes weights and no bias; train with 'none'", setting="bias")
    if config.get("init_lora_weights", True) not in _KEPT_BASE:
        raise UnsupportedAdapterError(
            "it changes the base's weights as well; convert the adapter with PEFT's "
            "`save_pretrained(path_initial_model_for_weight_conversion=…)`",
            setting="init_lora_weights",
        )
    return _Scaling(
        rank=_number(config, "r"),
        alpha=_number(config, "lora_alpha"),
        rank_pattern=_patterns(config, "rank_pattern"),
        alpha_pattern=_patterns(config, "alpha_pattern"),
        stabilized=bool(config.get("use_rslora")),
    )


def _unused(setting: str, config: Mapping[str, _Json]) -> bool:
    """Whether it belongs to an initialisation that is not used, such as `loftq_config` beside the plain one."""
    prefix = setting.removesuffix("_config")
    return prefix in ("loftq", "eva", "corda", "lora_ga") and config.get("init_lora_weights", True) in _KEPT_BASE


def _number(config: Mapping[str, _Json], setting: str) -> float:
    value = config[setting]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{setting} is {value!r} and no number")
    return value


def _patterns(config: Mapping[str, _Json], setting: str) -> dict[str, float]:
    patterns = config.get(setting) or {}
    if not isinstance(patterns, Mapping):
        raise TypeError(f"{setting} is no object")
    for key in patterns:
        # A regular expression from elsewhere could run for ever.
        if not _PATTERN.fullmatch(key):
            raise UnsupportedAdapterError(f"{key!r} is no module's name; spell the modules out", setting=setting)
    return {key: _number(patterns, key) for key in patterns}


def _pairs(tensors: Mapping[str, Tensor], model: EditableModel) -> dict[int, tuple[str, Tensor, Tensor]]:
    """A and B by layer. Raises UnsupportedAdapterError for any tensor that is no factor of a down-projection."""
    layers = {model.down_projection_name(i): i for i in range(len(model.layers))}
    pairs: dict[int, tuple[str, Tensor, Tensor]] = {}
    for name in tensors:
        matched = _TENSOR.fullmatch(name)
        if matched is None:
            raise UnsupportedAdapterError(f"the tensor {name!r} is no factor of a LoRA", setting=WEIGHTS)
        module = matched[1]
        if module not in layers:
            raise UnsupportedAdapterError(
                f"it changes {module!r}; a version changes down-projections alone ({next(iter(layers))!r} and so on)",
                setting="target_modules",
            )
        a, b = (tensors.get(f"base_model.model.{module}.lora_{part}.weight") for part in "AB")
        if a is None or b is None:
            raise CorruptDeltaError(f"{module} has one factor of two; fetch the adapter again")
        pairs[layers[module]] = (module, a, b)
    return pairs
