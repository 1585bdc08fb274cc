"""Whether a family that was found by structure is right about a model: one run says what structure cannot.

Everything the algorithms rest on is compared with the model's own run: what joins the residual stream, the key and
the value of the down-projection, the logits, and runs started in the middle, also two of unequal lengths in one row.
"""

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from errata.editor.errors import UnknownFamilyError
from errata.editor.model import EditableModel, Encoded
from errata.editor.prefixed import shares_prefix
from errata.editor.quantization import Quantization, dense_weight, quantization_of
from errata.editor.recording import Recording, record
from errata.editor.states import Component, logits_of
from errata.editor.suffix import Suffix

_TOKENS = 8
_INT8 = 0.05
"""LLM.int8 rounds what goes into a map to 127 steps: on tiny models up to 0.02 of the largest logit."""


def check_unfamiliar(model: EditableModel) -> None:
    """Raises UnknownFamilyError unless runs of a few tokens agree with what the model's family says."""
    _refuse_windows(model)
    ids = torch.arange(1, _TOKENS + 1) % model.model.config.get_text_config().vocab_size
    rows = [_row(ids), _row(ids.flip(0)[2:])]
    try:
        runs = record(model, rows, [0, 0], components=tuple(Component), key_layers=range(len(model.layers)))
        with torch.no_grad():
            share = _INT8 if quantization_of(model.model) is Quantization.BNB_8BIT else None
            pairs = chain(_pairs(model, runs[0]), _packed(model, runs))
            wrong = next((what for what, a, b in pairs if not _same(a, b, share)), None)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError) as error:
        wrong = f"a run could not be recorded ({type(error).__name__}: {error})"
    if wrong:
        raise UnknownFamilyError(
            f"{type(model.model).__name__} is built like a known family, but {wrong}; it needs a family of its own, a "
            "short file beside errata/editor/families/llama.py"
        )


def _refuse_windows(model: EditableModel) -> None:
    """A window may be wider than any run that could be tried here."""
    if shares_prefix(model):
        return
    for index, layer in enumerate(model.layers):
        if window := next((name for name, mask in layer.named_buffers() if _is_window(mask)), None):
            raise UnknownFamilyError(
                f"layer {index} of {type(model.model).__name__} hides what is behind a window of its own ({window}), "
                "which it counts in columns: those of runs that share a row or a prefix are no positions, so such runs "
                "would be wrong without a word"
            )


def _is_window(mask: Tensor) -> bool:
    """Whether a mask hides more than what comes after a token."""
    if mask.dtype != torch.bool or mask.dim() < 2 or mask.shape[-2] != mask.shape[-1]:
        return False
    return bool((~mask).tril().any())


def _row(ids: Tensor) -> Encoded:
    return Encoded(ids=ids, prompt_length=len(ids), spans=(None,) * len(ids), images=(), vision={})


def _pairs(model: EditableModel, run: Recording) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What would be wrong if the two states were not the same."""
    attention, mlp, layer = (run.outputs[c] for c in (Component.ATTENTION, Component.MLP, Component.LAYER))
    joined = run.inputs + attention + mlp
    yield "its layers add something else than attention and MLP to the residual stream", joined, layer
    values = torch.stack([_mapped(model, i, run.keys[i]) for i in range(len(model.layers))])
    yield "its MLP puts out something else than its last linear map", values, mlp
    logits = _logits(model, run)
    yield "its head makes other logits of the last layer's output", logits_of(model, layer[-1]), logits
    start = _TOKENS // 2
    with Suffix(model, [run], [start]) as suffix:
        yield "a run started in the middle gives other logits", _continued(model, suffix)[0], logits[start:]


def _packed(model: EditableModel, runs: Sequence[Recording]) -> Iterator[tuple[str, Tensor, Tensor]]:
    starts = [run.length // 2 for run in runs]
    with Suffix(model, runs, starts, [len(runs)]) as suffix:
        found = _continued(model, suffix)
    for run, start, (row, span) in zip(runs, starts, suffix.spans, strict=True):
        yield "runs that share a row give other logits", found[row, span], _logits(model, run)[start:]


def _continued(model: EditableModel, suffix: Suffix) -> Tensor:
    """The logits of a batch of suffixes."""
    hidden = suffix.inputs(0)
    for index in range(len(model.layers)):
        hidden = suffix.run(index, hidden)
    return logits_of(model, hidden)


def _logits(model: EditableModel, run: Recording) -> Tensor:
    """Those of the model's own run of a whole row."""
    logits: Tensor = model.model(**model.inputs([run.row]), use_cache=False).logits[0].float()
    return logits


def _mapped(model: EditableModel, layer: int, keys: Tensor) -> Tensor:
    down = model.down_projection(layer)
    bias = getattr(down, "bias", None)
    value = keys @ dense_weight(down).to(keys.dtype).T
    return value if bias is None else value + bias


def _same(a: Tensor, b: Tensor, share: float | None) -> bool:
    """To a share of the largest entry; None: to half the digits of the dtype."""
    eps = torch.finfo(a.dtype if a.dtype != torch.float32 else b.dtype).eps
    return a.shape == b.shape and float((a - b).abs().max()) <= (share or eps**0.5) * float(b.abs().max())
