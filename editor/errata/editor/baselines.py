"""Baselines that train instead of solving: fine-tuning (FT), FT under an L∞ bound (FT-L), LoRA (methods.md §6).

All descend with Adam on the loss that values are optimised with (module `values`), on the same requests:

    L(ΔW) = mean over requests of [ mean over contexts of −log p(target)
                                    + w · mean over preserved prompts of KL(before ‖ after) ]

with p of all the target's tokens, its end included. w is 0 unless `preserve_weight` says otherwise: fine-tuning is
mostly reported without it, while closed-form editors get to see what they must keep. A fair comparison shows both.

FT trains the down-projections of the given layers (Zhu et al. 2020, "Modifying Memories in Transformer Models"),
LoRA the two factors that PEFT puts beside them. What is trained is always ΔW, beside the frozen weights: in exact
arithmetic the descent is that on W, and no weight is ever touched.
"""

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from errata.editor.delta import Delta, LowRank, applied, borrowed_weights
from errata.editor.errors import CancelledError, InvalidInputError, WrongBaseError, check_numbers
from errata.editor.model import EditableModel, Encoded, by_length
from errata.editor.quantization import check_writable
from errata.editor.requests import Context, EditRequest, check_batch
from errata.editor.trace import Progress

if TYPE_CHECKING:  # PEFT takes seconds to import, and only LoRA needs it
    from peft.tuners.lora import LoraLayer


@dataclass(frozen=True, slots=True, kw_only=True)
class DescentSettings:
    """How a baseline descends.

    `learning_rate` is Adam's. The descent ends after `steps` updates, or once every request's target loss, in nats
    per answer, is below `stop_loss`; with a `preserve_weight` > 0 its KL, in nats, must be too. `preserve_weight` is
    w, unitless; 0 leaves `EditRequest.preserve` out. With `folds` > 1 a step takes every `folds`-th context of each
    request only, in turn: as many updates for less work. `max_rows` bounds the rows run at once, and with it memory.
    """

    steps: int = 60
    folds: int = 1
    learning_rate: float = 5e-4
    stop_loss: float = 0.02
    preserve_weight: float = 0.0
    max_rows: int = 64

    def __post_init__(self) -> None:
        at_least = {"steps": 0, "folds": 1, "max_rows": 1, "preserve_weight": 0.0, "stop_loss": 0.0}
        check_numbers(self, at_least=at_least, above={"learning_rate": 0.0})


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuneSettings:
    """FT, and FT-L where there is a `bound`.

    `bound` is the most any entry of a layer's weight may change, relative to the mean |entry| of that weight, so that
    it means the same for layers and models of any scale; in the literature it is absolute, around 5e-4. The weight is
    put back inside after every step. None: no bound.
    """

    layers: tuple[int, ...]
    bound: float | None = None
    descent: DescentSettings = field(default_factory=DescentSettings)

    def __post_init__(self) -> None:
        if self.bound is not None and not self.bound > 0:
            raise InvalidInputError(f"bound is {self.bound}; give more than 0, or None for no bound", field="bound")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """LoRA on the down-projections of `layers`, and with `attention` on every linear map of their attention blocks.

    ΔW is `alpha` / `rank` times the product of the factors; `seed` draws the first of them, the second starts at 0.
    """

    layers: tuple[int, ...]
    rank: int = 8
    alpha: int = 16
    attention: bool = False
    seed: int = 0
    descent: DescentSettings = field(default_factory=lambda: DescentSettings(learning_rate=5e-3))

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InvalidInputError(f"rank is {self.rank}; give at least 1", field="rank")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightChange:
    """What no delta can say: a ΔW of full rank, or one of a module that is no down-projection.

    `weights` is by full module path; a tensor is ΔW itself, d × m in every family, in float32.
    """

    base_sha256: str
    weights: Mapping[str, Float[Tensor, "d m"] | LowRank] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        pairs = ((w.a, w.b) if isinstance(w, LowRank) else (w,) for w in self.weights.values())
        return sum(t.numel() * t.element_size() for tensors in pairs for t in tensors)

    @contextmanager
    def applied(self, model: EditableModel) -> Iterator[EditableModel]:
        """While open, the weights are W + ΔW, rounded to the model's dtype: what a fine-tuned checkpoint would hold.

        The old weights are copied back on the way out, bit for bit. Nests with the deltas of `delta.applied`.
        Raises WrongBaseError for a change of another base.
        """
        if self.base_sha256 != model.base_sha256:
            raise WrongBaseError(
                f"the change was trained on the base {self.base_sha256[:12]}…, not on {model.name!r} "
                f"({model.base_sha256[:12]}…); load the base it was trained on"
            )
        weights = {path: _weight_at(model, path) for path in self.weights}
        with borrowed_weights(weights.values()):
            with torch.no_grad():
                for path, change in self.weights.items():
                    dense = change.dense() if isinstance(change, LowRank) else change.double()
                    dense = _stored(model.model.get_submodule(path), dense.to(weights[path].device))
                    weights[path].copy_((weights[path].double() + dense).to(weights[path].dtype))
            yield model


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineResult:
    """What a baseline changed and how its descent went.

    `change` is a delta for LoRA on down-projections alone, exactly what was trained; else a WeightChange. It stands
    on the parent that was trained on. `losses` are the target losses in nats per answer, the mean over requests,
    before the first update and after each, over the fold that was next; `kl` is the last mean KL on preserved prompts,
    0 where they were left out. `unconverged` names the requests that did not reach `stop_loss`.
    """

    settings: FineTuneSettings | LoraSettings
    change: Delta | WeightChange
    losses: tuple[float, ...]
    kl: float
    unconverged: tuple[str, ...]

    @property
    def steps(self) -> int:
        """Updates taken."""
        return len(self.losses) - 1

    @property
    def converged(self) -> bool:
        """Whether every request reached `stop_loss`."""
        return not self.unconverged

    @property
    def nbytes(self) -> int:
        """Bytes of the change on disk."""
        return self.change.nbytes

    def applied(self, model: EditableModel) -> AbstractContextManager[EditableModel]:
        """While open, the model answers as trained; on the way out it is bit-identical to what it was."""
        return applied(model, self.change) if isinstance(self.change, Delta) else self.change.applied(model)


def fine_tune(
    model: EditableModel,
    requests: Sequence[EditRequest],
    settings: FineTuneSettings,
    *,
    parent: Delta | None = None,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> BaselineResult:
    """FT or FT-L of a batch of requests on `parent`, the base where None. The model is left as it was.

    Unlike `methods.edit` it takes a request whose target is the present answer, and requests that contradict each
    other: they are in `unconverged`. Raises InvalidInputError and its kinds, CancelledError, and ModelError for a
    quantised base.
    """
    _check(model, requests, settings.layers)
    paths = [model.down_projection_name(i) for i in settings.layers]
    weights = {path: _weight_at(model, path) for path in paths}
    with _frozen(model, parent):
        objective = _Objective(model, requests, settings.descent)
        changes = {path: _zero_change(model, path) for path in paths}
        bounds = {p: math.inf if settings.bound is None else settings.bound * _mean_size(weights[p]) for p in paths}

        def clamp() -> None:
            for path, change in changes.items():
                change.clamp_(-bounds[path], bounds[path])

        with _adding(model, changes):
            tensors = [c.requires_grad_() for c in changes.values()]
            course = _descend(objective, tensors, settings.descent, clamp, progress, cancelled)
    kept = {path: change.detach().cpu() for path, change in changes.items()}
    change = WeightChange(base_sha256=model.base_sha256, weights=kept)
    return _result(settings, change, requests, course)


def fine_tune_lora(
    model: EditableModel,
    requests: Sequence[EditRequest],
    settings: LoraSettings,
    *,
    parent: Delta | None = None,
    progress: Progress | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> BaselineResult:
    """LoRA fine-tuning by PEFT of a batch of requests on `parent`, the base where None. The model is left as it was.

    While it runs, `progress` may ask the wrapped model. Takes and raises what `fine_tune` does.
    """
    _check(model, requests, settings.layers)
    down = {i: model.down_projection_name(i) for i in settings.layers}
    paths = [*down.values(), *(_attention_paths(model, settings.layers) if settings.attention else ())]
    with _frozen(model, parent):
        objective = _Objective(model, requests, settings.descent)
        with _wrapped(model, paths, settings) as lora:
            factors = [f for layer in lora.values() for f in _factors(layer)]
            course = _descend(objective, factors, settings.descent, None, progress, cancelled)
            lows = {path: _low_rank(layer) for path, layer in lora.items()}
    change: Delta | WeightChange
    if settings.attention:
        change = WeightChange(base_sha256=model.base_sha256, weights=lows)
    else:
        layers = {i: lows[path] for i, path in sorted(down.items())}
        change = Delta(base_sha256=model.base_sha256, layers=layers, modules={i: down[i] for i in layers})
    return _result(settings, change, requests, course)


def _check(model: EditableModel, requests: Sequence[EditRequest], layers: Sequence[int]) -> None:
    check_writable(model, "fine-tuning changes them")
    check_batch(tuple(requests))
    model.check_layers(layers)
    if not layers or len(set(layers)) != len(layers):
        raise InvalidInputError(f"layers {tuple(layers)} must be given once each, at least one", field="layers")


@contextmanager
def _frozen(model: EditableModel, parent: Delta | None) -> Iterator[None]:
    """While open, the parent is applied and no parameter of the model takes a gradient."""
    flags = [(p, p.requires_grad) for p in model.model.parameters()]
    try:
        model.model.requires_grad_(False)
        with applied(model, parent) if parent else nullcontext(), torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _adding(model: EditableModel, changes: Mapping[str, Float[Tensor, "d m"]]) -> Iterator[None]:
    """While open, each module's output has ΔW·x added, in float32."""
    with ExitStack() as stack:
        for path, change in changes.items():
            handle = model.model.get_submodule(path).register_forward_hook(_hook(change))
            stack.callback(handle.remove)
        yield


def _hook(change: Float[Tensor, "d m"]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return (output.float() + args[0].float() @ change.T).to(output.dtype)

    return hook


@contextmanager
def _wrapped(model: EditableModel, paths: Sequence[str], settings: LoraSettings) -> Iterator[dict[str, "LoraLayer"]]:
    """While open, PEFT's LoRA layers stand where the modules were, by path, their factors in float32."""
    from peft import LoraConfig, LoraModel

    base = model.model
    originals = {path: base.get_submodule(path) for path in paths}
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(paths),
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in originals.values()),
    )
    try:
        with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):
            torch.manual_seed(settings.seed)
            LoraModel(base, config, "default")
        yield {path: _lora_layer(base, path) for path in paths}
    finally:
        # Not by PEFT's unload(): the modules must come back after a failure halfway through wrapping too.
        for path, module in originals.items():
            base.set_submodule(path, module)
        vars(base).pop("peft_config", None)


def _lora_layer(base: nn.Module, path: str) -> "LoraLayer":
    from peft.tuners.lora import LoraLayer

    layer = base.get_submodule(path)
    assert isinstance(layer, LoraLayer)
    layer.lora_A.float()
    layer.lora_B.float()
    return layer


def _factors(layer: "LoraLayer") -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A.get_parameter("default.weight"), layer.lora_B.get_parameter("default.weight")


def _low_rank(layer: "LoraLayer") -> LowRank:
    a, b = (factor.detach().cpu() for factor in _factors(layer))
    return LowRank(a=a.clone(), b=b * layer.scaling["default"])


def _attention_paths(model: EditableModel, layers: Sequence[int]) -> list[str]:
    wanted = {m for i in layers for m in model.layers[i].get_submodule(model.family.attention).modules()}
    linear = (nn.Linear, Conv1D)
    return [path for path, m in model.model.named_modules() if m in wanted and isinstance(m, linear)]


def _weight_at(model: EditableModel, path: str) -> nn.Parameter:
    weight = model.model.get_submodule(path).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _stored(module: nn.Module, change: Float[Tensor, "d m"]) -> Tensor:
    """ΔW as the module stores its weight; its own inverse."""
    return change.T if isinstance(module, Conv1D) else change


def _zero_change(model: EditableModel, path: str) -> Float[Tensor, "d m"]:
    weight = _stored(model.model.get_submodule(path), _weight_at(model, path))
    return torch.zeros(weight.shape, device=weight.device)


def _mean_size(weight: Tensor) -> float:
    return float(weight.detach().abs().mean(dtype=torch.float64))


@dataclass(frozen=True, slots=True)
class _Row:
    """One prompt of one request as it is run, without its answer's last token: that predicts nothing asked for.

    `answer` is empty for a preserved prompt to which the model says nothing; its next token is compared then.
    `weight` is the row's share of the loss of its fold.
    """

    request: int
    fold: int
    encoded: Encoded
    answer: Int[Tensor, " answer"]
    preserved: bool
    weight: float

    @property
    def scored(self) -> int:
        """How many of the row's last positions are scored."""
        return max(1, len(self.answer))


@dataclass(frozen=True, slots=True)
class _Losses:
    """Of each request, in nats per answer."""

    target: Float[Tensor, " requests"]
    kl: Float[Tensor, " requests"]

    def reached(self, stop: float) -> list[bool]:
        """Which requests have both below `stop`; without preserved prompts the KL is 0."""
        return ((self.target < stop) & (self.kl < stop)).tolist()


class _Objective:
    """The loss of a batch of requests, run in groups of rows of one length, which no padding touches."""

    def __init__(self, model: EditableModel, requests: Sequence[EditRequest], settings: DescentSettings) -> None:
        self._model, self._n = model, len(requests)
        self._rows = _rows(model, requests, settings)
        self._folds = [self._grouped(fold, settings.max_rows) for fold in range(settings.folds)]
        with torch.no_grad():
            self._before = {
                i: log_p
                for group in chain.from_iterable(self._folds)
                if any(self._rows[i].preserved for i in group)
                for i, log_p in self._log_probabilities(group)
                if self._rows[i].preserved
            }

    def _grouped(self, fold: int, max_rows: int) -> list[list[int]]:
        """A fold's rows in groups of one length."""
        members = [i for i, row in enumerate(self._rows) if row.fold == fold]
        groups = by_length([self._rows[i].encoded for i in members], max_rows)
        return [[members[n] for n in group] for group in groups]

    def backward(self, step: int) -> _Losses:
        """Adds the gradient of the loss of the step's fold to whatever is being trained, group by group."""
        losses = torch.zeros(len(self._rows))
        fold = step % len(self._folds)
        for group in self._folds[fold]:
            found = {i: self._loss(i, log_p) for i, log_p in self._log_probabilities(group)}
            torch.stack([self._rows[i].weight * loss for i, loss in found.items()]).sum().backward()
            for i, loss in found.items():
                losses[i] = loss.detach()
        return _Losses(target=self._mean(losses, fold, preserved=False), kl=self._mean(losses, fold, preserved=True))

    def _loss(self, i: int, log_p: Float[Tensor, "answer vocabulary"]) -> Float[Tensor, ""]:
        if (before := self._before.get(i)) is not None:
            return (before.exp() * (before - log_p)).sum()
        answer = self._rows[i].answer.to(log_p.device)
        return -log_p.gather(-1, answer[:, None]).sum()

    def _log_probabilities(self, group: Sequence[int]) -> Iterator[tuple[int, Float[Tensor, "answer vocabulary"]]]:
        rows = [self._rows[i] for i in group]
        inputs = self._model.inputs([r.encoded for r in rows])
        longest = max(r.scored for r in rows)
        logits = self._model.model(**inputs, use_cache=False, logits_to_keep=longest).logits.float()
        for i, row, kept in zip(group, rows, logits, strict=True):
            yield i, kept[-row.scored :].log_softmax(-1)

    def _mean(self, losses: Float[Tensor, " rows"], fold: int, *, preserved: bool) -> Float[Tensor, " requests"]:
        total, count = torch.zeros(self._n), torch.zeros(self._n)
        for row, loss in zip(self._rows, losses, strict=True):
            if (row.fold, row.preserved) == (fold, preserved):
                total[row.request] += loss
                count[row.request] += 1
        return total / count.clamp(min=1)


def _rows(model: EditableModel, requests: Sequence[EditRequest], settings: DescentSettings) -> list[_Row]:
    asked = [(i, c, c.answer or r.target) for i, r in enumerate(requests) for c in r.contexts]
    rows = _weighed(model, asked, settings.folds, 1 / len(requests), preserved=False)
    if settings.preserve_weight > 0:
        kept = [(i, c) for i, r in enumerate(requests) for c in r.preserve]
        answers = model.generate([c.prompt for _, c in kept])
        said = [(i, c, answer.text or None) for (i, c), answer in zip(kept, answers, strict=True)]
        rows += _weighed(model, said, settings.folds, settings.preserve_weight / len(requests), preserved=True)
    return rows


def _weighed(
    model: EditableModel,
    asked: Sequence[tuple[int, Context, str | None]],
    folds: int,
    weight: float,
    *,
    preserved: bool,
) -> list[_Row]:
    """Rows of (request, context, answer), dealt out to the folds; each request's rows of a fold share `weight`."""
    seen: Counter[int] = Counter()
    dealt = []
    for request, _, _ in asked:
        dealt.append(seen[request] % folds)
        seen[request] += 1
    share = Counter(zip((request for request, _, _ in asked), dealt, strict=True))
    rows = []
    for (request, context, answer), fold in zip(asked, dealt, strict=True):
        encoded = model.encode(context.prompt, answer)
        rows.append(
            _Row(
                request=request,
                fold=fold,
                encoded=encoded if answer is None else encoded.replaced(encoded.ids[:-1]),
                answer=encoded.answer,
                preserved=preserved,
                weight=weight / share[request, fold],
            )
        )
    return rows


@dataclass(frozen=True, slots=True)
class _Course:
    """How a descent went: the mean target loss at every step, the last losses, and which requests are done."""

    curve: tuple[float, ...]
    last: _Losses
    done: list[bool]


def _descend(
    objective: _Objective,
    trained: Sequence[Tensor],
    settings: DescentSettings,
    project: Callable[[], None] | None,
    progress: Progress | None,
    cancelled: Callable[[], bool] | None,
) -> _Course:
    """Adam on `trained`, with `project` after each update."""
    optimizer = torch.optim.Adam(trained, lr=settings.learning_rate)
    curve: list[float] = []
    recent: deque[list[bool]] = deque(maxlen=settings.folds)
    for step in range(settings.steps + 1):
        if cancelled and cancelled():
            raise CancelledError("the fine-tuning was cancelled; nothing was changed")
        optimizer.zero_grad()
        losses = objective.backward(step)
        curve.append(float(losses.target.mean()))
        recent.append(losses.reached(settings.stop_loss))
        done = [all(folds) for folds in zip(*recent, strict=True)]
        if progress:
            progress(step, settings.steps)
        if (len(recent) == settings.folds and all(done)) or step == settings.steps:
            break
        optimizer.step()
        if project:
            with torch.no_grad():
                project()
    return _Course(curve=tuple(curve), last=losses, done=done)


def _result(
    settings: FineTuneSettings | LoraSettings,
    change: Delta | WeightChange,
    requests: Sequence[EditRequest],
    course: _Course,
) -> BaselineResult:
    return BaselineResult(
        settings=settings,
        change=change,
        losses=course.curve,
        kl=float(course.last.kl.mean()),
        unconverged=tuple(r.name for r, done in zip(requests, course.done, strict=True) if not done),
    )
