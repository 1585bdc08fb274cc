"""A version as an MLflow model folder: the code of `pyfunc_model.py`, the composed adapter, the base's name and hash.

Touches no tracking server. Nothing is pickled, and nothing is inferred: signature and requirements are given.
"""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

import mlflow.pyfunc
import pandas as pd  # type: ignore[import-untyped]
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import AnyType
from packaging.version import Version

from errata.editor.delta import Delta

_CODE = Path(__file__).with_name("pyfunc_model.py")
_NEEDED = ("mlflow", "pandas", "peft", "pillow", "safetensors", "torch", "transformers")
_ERRATA = "errata"


def signature() -> ModelSignature:
    """Columns `prompt` and, optionally, `image`, which takes bytes and base64 text alike and so has no one type."""
    anything = AnyType()  # type: ignore[no-untyped-call]
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt"), ColSpec(anything, "image", required=False)]),
        outputs=Schema([ColSpec(DataType.string, "answer")]),
        params=ParamSchema([ParamSpec("max_new_tokens", DataType.integer, 16)]),
    )


def requirements() -> list[str]:
    """What loading a version needs, pinned to what made it. Errata itself only where it is installed."""
    pinned = [f"{name}=={Version(importlib.metadata.version(name)).public}" for name in _NEEDED]
    try:
        return [f"{_ERRATA}[server]=={importlib.metadata.version(_ERRATA)}", *pinned]
    except importlib.metadata.PackageNotFoundError:
        return pinned


def save_pyfunc(
    folder: Path, model: Model, composed: Delta, config: Mapping[str, str], example: Mapping[str, str], scratch: Path
) -> None:
    """Writes the model to `folder`, which must not exist yet; `scratch` is a folder that may be written to.

    `composed` is the whole lineage's delta; an empty one leaves the adapter out.
    """
    artifacts = {}
    if composed.layers:
        composed.save(scratch / "adapter")
        artifacts["adapter"] = str(scratch / "adapter")
    mlflow.pyfunc.save_model(
        folder,
        mlflow_model=model,
        python_model=_CODE,
        artifacts=artifacts,
        model_config=dict(config),
        signature=signature(),
        input_example=pd.DataFrame([dict(example)]),
        pip_requirements=requirements(),
    )
