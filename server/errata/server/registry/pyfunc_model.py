"""The model that MLflow loads for a version: its base with the version's adapter on it ("models from code").

MLflow copies this file beside the adapter and runs it wherever the version is loaded, so it needs Errata's editor
there but no server. `model_config`, which `mlflow.pyfunc.load_model` may override: `source` and `base_sha256` of the
base, `dtype`, `device` (default: a GPU where there is one).
"""

import base64
import binascii
from contextlib import ExitStack
from pathlib import Path

import pandas as pd  # type: ignore[import-untyped]
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from PIL import Image

from errata.editor.checkpoints import load_model
from errata.editor.delta import applied, load_delta
from errata.editor.errors import ImageError, WrongBaseError
from errata.editor.images import open_image
from errata.editor.prompts import Prompt


class ErrataModel(PythonModel):
    """Answers prompts as one version does. May be asked from several threads."""

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the base and puts the adapter on it; a version that changes nothing has none.

        Raises WrongBaseError where the checkpoint at `source` is not the one that the version was made for.
        """
        config = context.model_config
        device = config.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model = load_model(
            config["source"],
            dtype=config["dtype"],
            device=device,
            # Versions that were published before there was any do not name it.
            quantization=config.get("quantization", "none"),
        )
        if self._model.base_sha256 != config["base_sha256"]:
            raise WrongBaseError(
                f"{config['source']!r} is the base {self._model.base_sha256[:12]}…, and the version was made for "
                f"{config['base_sha256'][:12]}…; give the right one: load_model(uri, model_config={{'source': ...}})"
            )
        deltas = [load_delta(Path(context.artifacts["adapter"]), self._model)] if context.artifacts else []
        # Never closed: this process asks no other version, and threads that answer at once must not add it twice.
        self._applied = ExitStack()
        self._applied.enter_context(applied(self._model, *deltas))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, int] | None = None
    ) -> pd.DataFrame:
        """One greedy `answer` for each row's `prompt` and, where it has one, `image`: bytes of a file, or base64 text.

        Raises ImageError and PromptError; `params["max_new_tokens"]` bounds an answer.
        """
        images = model_input["image"] if "image" in model_input else [None] * len(model_input)
        rows = enumerate(zip(model_input["prompt"], images, strict=True))
        prompts = [Prompt(text=text, images=_images(image, f"image[{i}]")) for i, (text, image) in rows]
        answers = self._model.generate(prompts, max_new_tokens=(params or {}).get("max_new_tokens", 16))
        return pd.DataFrame({"answer": [a.text for a in answers]}, index=model_input.index)


def _images(given: object, field: str) -> tuple[Image.Image, ...]:
    if given is None or given is pd.NA or given != given:  # pandas' empty cells: None, NA, NaN
        return ()
    if isinstance(given, str):
        try:
            given = base64.b64decode("".join(given.split()), validate=True)
        except (binascii.Error, ValueError) as error:
            raise ImageError(f"the text is not base64 ({error}); paths are not read", field=field) from error
    if not isinstance(given, bytes):
        raise ImageError(f"{type(given).__name__} is no image; give a file's bytes, or base64 text", field=field)
    return (open_image(given, field=field),)


set_model(ErrataModel())
