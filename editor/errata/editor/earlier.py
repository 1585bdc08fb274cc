"""What earlier edits installed, so that the next one can hold it: the keys of their requests.

A key depends on its context and on what is edited below its layer. Where nothing is, it is the base's, for good: it is
kept on disk, so that an edit on a version of a thousand edits reads a thousand small files, and neither runs the model
nor decodes a picture. Elsewhere the model is run, up to the layer and no further, a few requests at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from errata.editor.caching import digest_of, written
from errata.editor.checkpoints import hash_tensors
from errata.editor.images import sha256_of
from errata.editor.memory import Memory
from errata.editor.model import EditableModel, Encoded, by_length
from errata.editor.requests import Context, EditRequest
from errata.editor.states import by_row

_AT_ONCE = 16
"""Requests that are run together."""

_ROWS = 64
"""Contexts of a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierRequest:
    """A request that a version holds already, without its pictures.

    `name` stands for its contexts: two of one name have the same, and share what is kept of them. `subjects` is what
    their constraints mean, where that is known. `contexts` makes them; it is called where their keys are not kept.
    """

    name: str
    subjects: frozenset[str]
    contexts: Callable[[], Sequence[Context]] = field(repr=False)

    @classmethod
    def of(cls, request: EditRequest) -> "EarlierRequest":
        """A request whose contexts are in memory."""
        name = digest_of(part for context in request.contexts for part in _said(context))
        return cls(name=name, subjects=request.subjects, contexts=lambda: request.contexts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """The requests that a version holds already. `folder` keeps their keys; None computes them every time."""

    requests: tuple[EarlierRequest, ...] = ()
    folder: Path | None = None

    @classmethod
    def of(cls, requests: Sequence[EditRequest], folder: Path | None = None) -> "Earlier":
        """Requests whose contexts are in memory."""
        return cls(requests=tuple(EarlierRequest.of(r) for r in requests), folder=folder)

    def keys(
        self, model: EditableModel, layer: int, *, of_base: bool, memory: Memory | None = None
    ) -> Iterator[Float[Tensor, "m n"]]:
        """Each request's keys at a layer, a column a context, in float64 on the CPU.

        `model` answers as the version does; `of_base` says that nothing is edited below the layer, so that the keys are
        the base's. Only these are kept. Batches are cut to what `memory` holds, None: the device's own. Raises
        InvalidInputError and its kinds for contexts that the model cannot take.
        """
        memory = memory or Memory.of(model.device)
        kept = _Kept(model, layer, self.folder, memory) if of_base and self.folder else None
        for i in range(0, len(self.requests), _AT_ONCE):
            some = self.requests[i : i + _AT_ONCE]
            for keys in kept.of(some) if kept else _computed(model, some, layer, memory):
                yield keys.double().T


class _Kept:
    """Keys of the base at a layer, read where they are kept, and kept where they are not."""

    def __init__(self, model: EditableModel, layer: int, folder: Path, memory: Memory) -> None:
        self._model, self._layer, self._folder, self._memory = model, layer, folder, memory
        self._writable = True

    def of(self, requests: Sequence[EarlierRequest]) -> list[Float[Tensor, "n m"]]:
        """Each request's. After the first file that cannot be written no other is tried."""
        found = {r.name: keys for r in requests if (keys := _read(self._path(r))) is not None}
        missing = [r for r in requests if r.name not in found]
        for request, keys in zip(missing, _computed(self._model, missing, self._layer, self._memory), strict=True):
            found[request.name] = keys
            said = {"sha256": hash_tensors([("keys", keys)])}
            self._writable = self._writable and written(self._path(request), {"keys": keys}, said)
        return [found[r.name] for r in requests]

    def _path(self, request: EarlierRequest) -> Path:
        model = self._model
        name = digest_of(
            (model.base_sha256, model.reading_sha256, str(model.model.dtype), str(self._layer), request.name)
        )
        return self._folder / f"{name}.safetensors"


def _said(context: Context) -> Iterator[str]:
    """What a context's key depends on."""
    prompt = context.prompt
    yield repr((prompt.text, prompt.chat, context.constraint, len(prompt.images)))
    yield from (sha256_of(image) for image in prompt.images)


def _read(path: Path) -> Float[Tensor, "n m"] | None:
    """Keys as they were written, or None."""
    try:
        with safe_open(path, "pt") as file:
            keys: Tensor = file.get_tensor("keys")
            return keys if file.metadata()["sha256"] == hash_tensors([("keys", keys)]) else None
    except (OSError, SafetensorError, KeyError, TypeError):
        return None


def _computed(
    model: EditableModel, requests: Sequence[EarlierRequest], layer: int, memory: Memory
) -> list[Float[Tensor, "n m"]]:
    """Each request's keys, a row a context, by one run over all. The pictures of one at a time are decoded."""
    sites = [[model.encode_at(c, field="earlier") for c in r.contexts()] for r in requests]
    keys = iter(_keys_at(model, [site for some in sites for site in some], layer, memory))
    return [torch.stack([next(keys) for _ in some]) for some in sites]


class _ReachedError(Exception):
    """Ends a run at the layer whose keys it was made for."""


def _keys_at(
    model: EditableModel, sites: Sequence[tuple[Encoded, int]], layer: int, memory: Memory
) -> list[Float[Tensor, " m"]]:
    """The key at a token of every row, in the model's dtype; the layers above are not run."""
    found: dict[int, Tensor] = {}

    def run(batch: Sequence[int]) -> None:
        def reached(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            keys = by_row(args[0], len(batch))[range(len(batch)), [sites[i][1] for i in batch]].cpu()
            found.update(zip(batch, keys, strict=True))
            raise _ReachedError

        handle = model.down_projection(layer).register_forward_pre_hook(reached)
        try:
            with torch.no_grad(), suppress(_ReachedError):
                model.model(**model.inputs([sites[i][0] for i in batch]), logits_to_keep=1, use_cache=False)
        finally:
            handle.remove()

    for batch in by_length([row for row, _ in sites], _ROWS):
        memory.parts(run, batch, most=_ROWS, row_bytes=len(sites[batch[0]][0].ids) * model.token_bytes)
    return [found[i] for i in range(len(sites))]
