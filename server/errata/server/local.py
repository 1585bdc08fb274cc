"""Versions asked in this process, without a server: from MLflow, from an adapter's folder, or a whole checkpoint.

What `errata check --local` finds by the entry point `errata.answerers`. Whatever cannot be opened or asked is a
ValueError, the one kind that the client knows, in one line that says what to do. Not thread-safe.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from errata.editor.checkpoints import ATLAS, load_model
from errata.editor.delta import Delta, applied, load_delta
from errata.editor.errors import ErrataError, WrongBaseError
from errata.editor.images import open_image
from errata.editor.model import EditableModel
from errata.editor.prompts import Prompt

BASE = "0"
"""The target that is a base itself, as `atlas@0` is."""

_REGISTRY = "models:/"


class UnusableError(ValueError):
    """A version that cannot be opened, or a question that it cannot be asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalVersion:
    """A model and what a version adds to it, which is None for the model itself."""

    name: str
    model: EditableModel
    delta: Delta | None

    @property
    def base_sha256(self) -> str:
        """The base's hash."""
        return self.model.base_sha256

    @property
    def delta_sha256(self) -> str:
        """The delta's hash; empty for the base."""
        return self.delta.sha256 if self.delta else ""

    def answers(self, questions: Sequence[tuple[str, Sequence[bytes]]], *, raw: bool, max_new_tokens: int) -> list[str]:
        """Greedy answers to prompts with encoded images; `raw` goes without the chat template."""
        with _explained():
            prompts = [
                Prompt(text=text, images=tuple(open_image(i) for i in images), chat=not raw)
                for text, images in questions
            ]
            with applied(self.model, *([self.delta] if self.delta else [])):
                return [a.text for a in self.model.generate(prompts, max_new_tokens=max_new_tokens)]


class LocalVersions:
    """Opens versions; those of one base share one copy of it."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, str, str], EditableModel] = {}

    def __call__(self, target: str, base: str) -> LocalVersion:
        """Opens `models:/NAME/VERSION`, an adapter's folder on `base`, a whole checkpoint's folder, or "0": `base`."""
        with _explained():
            if target == BASE:
                return LocalVersion(name=base, model=self._model(base), delta=None)
            if target.startswith(_REGISTRY):
                return self._registered(target)
            return self._folder(Path(target), base)

    def _folder(self, folder: Path, base: str) -> LocalVersion:
        if (folder / "adapter_config.json").is_file():
            model = self._model(base)
            return LocalVersion(name=str(folder), model=model, delta=load_delta(folder, model))
        if (folder / "config.json").is_file():
            return LocalVersion(name=str(folder), model=self._model(str(folder)), delta=None)
        raise UnusableError(
            f"{str(folder)!r} is no adapter's and no checkpoint's folder; give one that was exported, "
            f'models:/NAME/VERSION, or "{BASE}" for the base'
        )

    def _registered(self, uri: str) -> LocalVersion:
        with tempfile.TemporaryDirectory() as scratch:
            folder, config, adapter = _published(uri, scratch)
            model = self._model(config["source"], config["dtype"], config["quantization"])
            if model.base_sha256 != config["base_sha256"]:
                raise WrongBaseError(
                    f"{uri} was made for the base {config['base_sha256'][:12]}…, and {config['source']!r} is "
                    f"{model.base_sha256[:12]}…; bring that checkpoint back"
                )
            return LocalVersion(name=uri, model=model, delta=load_delta(folder / adapter, model) if adapter else None)

    def _model(self, source: str, dtype: str = "float32", quantization: str = "none") -> EditableModel:
        key = source, dtype, quantization
        if key not in self._models:
            disable_progress_bar()  # it would be drawn in pipes, too
            self._models[key] = load_model(source, dtype=dtype, device=_device(source), quantization=quantization)
        return self._models[key]


def _device(source: str) -> str:
    # Atlas is too small for a transfer to pay.
    return "cuda" if source != ATLAS and torch.cuda.is_available() else "cpu"


def _published(uri: str, scratch: str) -> tuple[Path, dict[str, str], str]:
    """A version's files from MLflow: their folder, the model's configuration, the adapter's folder if there is one."""
    # MLflow reads its settings from the environment when it is imported; this package sets them.
    import_module("errata.server.registry")
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    try:
        folder = Path(download_artifacts(artifact_uri=uri, dst_path=scratch))
        flavour = Model.load(folder).flavors["python_function"]
        config = {name: str(flavour["config"][name]) for name in ("source", "dtype", "base_sha256")}
        config["quantization"] = str(flavour["config"].get("quantization", "none"))
    except (MlflowException, OSError) as error:
        said = " ".join(str(error).split())
        raise UnusableError(f"MLflow has no {uri}: {said}; check the name, and MLFLOW_TRACKING_URI") from error
    except KeyError as error:
        raise UnusableError(f"{uri} is no version that Errata published: its MLmodel lacks {error}") from error
    return folder, config, flavour.get("artifacts", {}).get("adapter", {}).get("path", "")


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except ErrataError as error:
        raise UnusableError(" ".join(str(error).split())) from error
