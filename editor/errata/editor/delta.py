"""The delta: an edit as exact low-rank factors per layer. Applied without touching a weight, stored as a PEFT adapter.

A delta is bound to its base by the SHA-256 of the base's weights. Deltas of one base add and subtract; a sum's rank
can be brought down again without changing it.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from errata.editor.checkpoints import hash_tensors
from errata.editor.errors import CorruptDeltaError, DeltaError, WrongBaseError
from errata.editor.model import EditableModel
from errata.editor.quantization import Quantization, check_writable, map_shape, quantization_of, quantized_base

if TYPE_CHECKING:  # PEFT takes seconds to import, and only what stores or reads a delta needs it
    from peft import LoraConfig

MANIFEST, CONFIG, WEIGHTS = "errata.json", "adapter_config.json", "adapter_model.safetensors"
"""The files of an adapter's folder: Errata's own, and the two that PEFT reads."""
_PREFIX = "base_model.model."
_FORMAT = 1
_MEANING = (
    "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "use_rslora", "use_dora",
    "bias", "modules_to_save",
)  # fmt: skip
"""What of PEFT's configuration says which ΔW the factors make."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """ΔW = b @ a, in float32, for a down-projection that maps m to d."""

    a: Float[Tensor, "rank m"]
    b: Float[Tensor, "d rank"]

    @property
    def rank(self) -> int:
        """The number of rows of `a`."""
        return self.a.shape[0]

    def norm(self) -> float:
        """The Frobenius norm of ΔW, from the factors' Gram matrices: ‖BA‖² = ⟨BᵀB, AAᵀ⟩."""
        a, b = self.a.double(), self.b.double()
        return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))

    def dense(self) -> Float[Tensor, "d m"]:
        """ΔW itself, in float64."""
        return self.b.double() @ self.a.double()


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """The low-rank ΔW of one edit, or of several added up, by layer index.

    `modules` names each layer's down-projection by its full path, as adapters do.
    """

    base_sha256: str
    layers: Mapping[int, LowRank] = field(repr=False)
    modules: Mapping[int, str]

    @property
    def sha256(self) -> str:
        """SHA-256 over the base's hash and every factor, with its layer and module."""
        named = [
            (f"{self.base_sha256}.{i}.{self.modules[i]}.{part}", factor)
            for i, low in self.layers.items()
            for part, factor in (("a", low.a), ("b", low.b))
        ]
        return hash_tensors(named)

    @property
    def ranks(self) -> dict[int, int]:
        """The rank at each layer."""
        return {i: low.rank for i, low in self.layers.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all factors."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def norm(self) -> float:
        """The Frobenius norm of ΔW over all layers."""
        return math.hypot(*(low.norm() for low in self.layers.values()))

    def __add__(self, other: "Delta") -> "Delta":
        """The sum, as factors side by side; raises WrongBaseError for deltas of two bases."""
        if other.base_sha256 != self.base_sha256:
            raise WrongBaseError(
                f"deltas of two bases cannot be added: {self.base_sha256[:12]}… and {other.base_sha256[:12]}…"
            )
        layers = dict(self.layers)
        for i, low in other.layers.items():
            if mine := layers.get(i):
                low = LowRank(a=torch.cat([mine.a, low.a]), b=torch.cat([mine.b, low.b], dim=1))
            layers[i] = low
        return Delta(
            base_sha256=self.base_sha256,
            layers=dict(sorted(layers.items())),
            modules={**self.modules, **other.modules},
        )

    def __mul__(self, weight: float) -> "Delta":
        """The delta with every ΔW scaled."""
        layers = {i: LowRank(a=low.a, b=low.b * weight) for i, low in self.layers.items()}
        return Delta(base_sha256=self.base_sha256, layers=layers, modules=self.modules)

    def __sub__(self, other: "Delta") -> "Delta":
        """The delta without another that was added to it."""
        return self + other * -1.0

    def compressed(self, tolerance: float = 1e-7) -> "Delta":
        """The same ΔW at its smallest rank, by QR of both factors and SVD of the small core between them.

        Singular values up to `tolerance` times ‖A‖‖B‖, the factors' own size in Frobenius norms, are dropped: rounding
        noise, at the default. That is never less than the largest of them, and of k equal ones, balanced, k times it. A
        layer that comes to nothing is dropped.
        """
        layers = {}
        for i, low in self.layers.items():
            q_b, r_b = torch.linalg.qr(low.b.double())
            q_a, r_a = torch.linalg.qr(low.a.double().T)
            u, s, vh = torch.linalg.svd(r_b @ r_a.T)
            # Not against the largest of them, so that a sum that cancels comes to nothing.
            scale = float(low.b.double().norm() * low.a.double().norm())
            kept = int((s > tolerance * scale).sum())
            if kept:
                root = s[:kept].sqrt()
                layers[i] = LowRank(
                    a=(root[:, None] * (vh[:kept] @ q_a.T)).float(), b=((q_b @ u[:, :kept]) * root).float()
                )
        return Delta(
            base_sha256=self.base_sha256, layers=layers, modules={i: m for i, m in self.modules.items() if i in layers}
        )

    def save(self, folder: Path) -> None:
        """Writes a PEFT adapter folder: safetensors, alpha equal to the rank, full module paths.

        `peft.PeftModel.from_pretrained(base, folder)` reads it without Errata; `errata.json` beside it binds it to
        its base.
        """
        if not self.layers:
            raise DeltaError("an empty delta has nothing to store; it is its base")
        folder.mkdir(parents=True, exist_ok=True)
        self._config().save_pretrained(str(folder))
        save_file(self._tensors(), folder / WEIGHTS, {"format": "pt"})
        manifest = {
            "format": _FORMAT,
            "base_sha256": self.base_sha256,
            "delta_sha256": self.sha256,
            "layers": {str(i): m for i, m in self.modules.items()},
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    def _config(self) -> "LoraConfig":
        from peft import LoraConfig

        top = max(self.ranks.values())
        by_module = {self.modules[i]: r for i, r in self.ranks.items() if r != top}
        return LoraConfig(
            r=top,
            lora_alpha=top,
            target_modules=[self.modules[i] for i in self.layers],
            rank_pattern=by_module,
            alpha_pattern=by_module,
            fan_in_fan_out=any(self.modules[i].endswith("c_proj") for i in self.layers),
            task_type="CAUSAL_LM",
            inference_mode=True,
        )

    def _says_the_same(self, config: Mapping[str, object]) -> bool:
        """Whether PEFT would make the same ΔW of the factors by the stored configuration."""
        own = self._config()
        stored = {**config, "target_modules": set(map(str, config["target_modules"]))}  # type: ignore[call-overload]
        return all(stored.get(name) == getattr(own, name) for name in _MEANING)

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for i, low in self.layers.items():
            name = f"{_PREFIX}{self.modules[i]}"
            tensors |= {f"{name}.lora_A.weight": low.a.contiguous(), f"{name}.lora_B.weight": low.b.contiguous()}
        return tensors


def empty_delta(model: EditableModel) -> Delta:
    """The delta of the base itself."""
    return Delta(base_sha256=model.base_sha256, layers={}, modules={})


def load_delta(folder: Path, model: EditableModel | None = None) -> Delta:
    """Reads an adapter folder that `Delta.save` wrote.

    Raises CorruptDeltaError for a folder that is incomplete, unreadable or altered, and WrongBaseError where
    `model` is not the base that it was made for, or DeltaError where the factors do not fit it.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise ValueError(f"{MANIFEST} is of format {manifest['format']}, this Errata reads {_FORMAT}")
        tensors = load_file(folder / WEIGHTS)
        modules = {int(i): str(m) for i, m in manifest["layers"].items()}
        layers = {
            i: LowRank(a=tensors[f"{_PREFIX}{m}.lora_A.weight"], b=tensors[f"{_PREFIX}{m}.lora_B.weight"])
            for i, m in modules.items()
        }
        delta = Delta(base_sha256=str(manifest["base_sha256"]), layers=layers, modules=modules)
        stored = manifest["delta_sha256"]
        if set(tensors) != set(delta._tensors()):
            raise ValueError(f"{WEIGHTS} holds other tensors than {MANIFEST} names")
        # An upload may come without PEFT's configuration: Errata's own manifest says all that it needs.
        config = folder / CONFIG
        if config.exists() and not delta._says_the_same(json.loads(config.read_text(encoding="utf-8"))):
            raise ValueError(f"{CONFIG} gives the factors another meaning than they were saved with")
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError, SafetensorError) as error:
        raise CorruptDeltaError(f"{folder} is no readable adapter of Errata: {error}; save it again") from error
    if delta.sha256 != stored:
        raise CorruptDeltaError(f"{folder} was altered after it was saved: its hash no longer matches {MANIFEST}")
    if model is not None:
        check_base(delta, model)
        check_fit(delta, model)
    return delta


def check_base(delta: Delta, model: EditableModel) -> None:
    """Raises WrongBaseError unless the delta was made for this model's base, quantised in the same way."""
    if delta.base_sha256 != model.base_sha256:
        raise WrongBaseError(
            f"the delta was made for the base {delta.base_sha256[:12]}…, not for {model.name!r} "
            f"({model.base_sha256[:12]}…); {_other_base(delta, model)}"
        )


def _other_base(delta: Delta, model: EditableModel) -> str:
    """What to do, and where only the quantisation differs, that it does."""
    mine = quantization_of(model.model)
    if quantized_base(delta.base_sha256, mine) == model.base_sha256:
        return f"that is the same checkpoint without {mine.value}: load it so, or evaluate the edit anew on this one"
    made = next((q for q in Quantization if quantized_base(model.base_sha256, q) == delta.base_sha256), None)
    if made and mine is Quantization.NONE:
        return f"that is this checkpoint as {made.value}: load it so, or evaluate the edit anew on this one"
    how = "" if mine is Quantization.NONE else f", and as it was quantised then: this one is {mine.value}"
    return f"load the base it was made for{how}"


def check_fit(delta: Delta, model: EditableModel) -> None:
    """Raises DeltaError unless every factor is finite, in float32, of rank ≥ 1, and of the down-projection it names.

    For a delta from elsewhere: one that an edit made fits.
    """
    for i, low in delta.layers.items():
        if not 0 <= i < len(model.layers) or delta.modules[i] != model.down_projection_name(i):
            raise DeltaError(f"{model.name!r} has no down-projection {delta.modules[i]!r} at layer {i}")
        d, m = map_shape(model.down_projection(i))
        if low.a.shape != (low.rank, m) or low.b.shape != (d, low.rank) or not low.rank:
            raise DeltaError(
                f"the factors of layer {i} are {tuple(low.b.shape)} and {tuple(low.a.shape)}; the layer maps {m} to {d}"
            )
        if any(f.dtype != torch.float32 or not torch.isfinite(f).all() for f in (low.a, low.b)):
            raise DeltaError(f"the factors of layer {i} are not finite numbers in float32; export the version again")


@contextmanager
def applied(model: EditableModel, *deltas: Delta) -> Iterator[EditableModel]:
    """While open, the model answers as edited: each down-projection adds b(a·x), in float32, to its output.

    No weight is touched, so there is nothing to undo and no rounding in a narrow dtype. Contexts nest: deltas add.
    """
    for delta in deltas:
        check_base(delta, model)
    with ExitStack() as stack:
        for i, lows in _by_layer(deltas).items():
            a = torch.cat([low.a for low in lows]).to(model.device)
            b = torch.cat([low.b for low in lows], dim=1).to(model.device)
            handle = model.down_projection(i).register_forward_hook(_adding(a, b))
            stack.callback(handle.remove)
        yield model


def _adding(a: Tensor, b: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        change = (args[0].to(a.dtype) @ a.T) @ b.T
        return (output.to(a.dtype) + change).to(output.dtype)

    return hook


@contextmanager
def merged(model: EditableModel, *deltas: Delta) -> Iterator[EditableModel]:
    """While open, the weights themselves are W + ΔW, rounded to the model's dtype: what an export would hold.

    The old weights are copied back on the way out, bit for bit. Raises ModelError for a quantised base.
    """
    check_writable(model, "ΔW cannot be added to them without rounding both")
    for delta in deltas:
        check_base(delta, model)
    changes = _by_layer(deltas)
    with borrowed_weights([weight_of(model, i) for i in changes]), torch.no_grad():
        for i, lows in changes.items():
            weight = weight_of(model, i)
            change = torch.stack([low.dense() for low in lows]).sum(0).to(weight.device)
            change = change.T if isinstance(model.down_projection(i), Conv1D) else change
            weight.copy_((weight.double() + change).to(weight.dtype))
        yield model


def weight_of(model: EditableModel, layer: int) -> nn.Parameter:
    """The down-projection's weight: d × m, or m × d where the family stores it transposed.

    Raises ModelError for a quantised base; `quantization.dense_weight` reads W of any.
    """
    check_writable(model, "they are no numbers to read or change")
    weight = model.down_projection(layer).weight
    assert isinstance(weight, nn.Parameter)
    return weight


@contextmanager
def borrowed_weights(weights: Iterable[Tensor]) -> Iterator[None]:
    """While open, the weights may be changed in place; on the way out they are what they were, bit for bit."""
    kept = [(w, w.detach().clone()) for w in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, old in kept:
                weight.copy_(old)


def _by_layer(deltas: Iterable[Delta]) -> dict[int, list[LowRank]]:
    found: dict[int, list[LowRank]] = {}
    for delta in deltas:
        for i, low in delta.layers.items():
            found.setdefault(i, []).append(low)
    return found
