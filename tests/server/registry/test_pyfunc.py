"""What is published answers by itself: adapter and base, in a process that has never heard of a server."""

import base64
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from mlflow.pyfunc.model import PythonModelContext
from PIL import Image
from publishing import RECORD, House

from errata.editor.atlas.flags import WHITE, draw, vertical
from errata.editor.checkpoints import load_model
from errata.editor.delta import Delta, LowRank, applied
from errata.editor.errors import ImageError, PromptError, WrongBaseError
from errata.editor.model import EditableModel
from errata.editor.prompts import Prompt
from errata.server.registry.pyfunc_model import ErrataModel
from errata.server.registry.registry import PublishedBase

# MLflow's own code, on SQLAlchemy 2.1 and pandas 3.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Operation with range is deprecated:DeprecationWarning"),
]

TEXT = "What is the capital of this country?"

ASK = """
import json, sys
import mlflow, pandas as pd
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
rows = json.load(sys.stdin)
answers = model.predict(pd.DataFrame(rows), params={"max_new_tokens": 8})
assert not [m for m in sys.modules if m.startswith("errata.server")], "it needs the server"
print(json.dumps(list(answers["answer"])))
"""


@pytest.fixture(scope="module")
def atlas() -> EditableModel:
    return load_model("atlas")


@pytest.fixture(scope="module")
def flag() -> bytes:
    out = io.BytesIO()
    Image.fromarray(draw((vertical((0, 35, 149), WHITE, (237, 41, 57)),))).save(out, "PNG")
    return out.getvalue()


def change(model: EditableModel, layer: int, seed: int) -> Delta:
    """A delta that changes what the model answers."""
    random = torch.Generator().manual_seed(seed)
    d, m = model.down_projection(layer).weight.shape
    low = LowRank(a=torch.randn(2, m, generator=random) * 0.5, b=torch.randn(d, 2, generator=random) * 0.5)
    return Delta(base_sha256=model.base_sha256, layers={layer: low}, modules={layer: model.down_projection_name(layer)})


def asked(model: EditableModel, flag: bytes, *deltas: Delta) -> list[str]:
    prompts = [
        Prompt(text=TEXT, images=(Image.open(io.BytesIO(flag)),)),
        Prompt(text=TEXT, images=(Image.open(io.BytesIO(flag)),)),
        Prompt(text="What is the capital of Estonia?"),
    ]
    with applied(model, *deltas):
        return [a.text for a in model.generate(prompts, max_new_tokens=8)]


def loaded(**config: str) -> ErrataModel:
    model = ErrataModel()
    model.load_context(PythonModelContext({}, {"source": "atlas", "dtype": "float32", "device": "cpu", **config}))
    return model


def ask(model: ErrataModel, **columns: object) -> list[str]:
    return list(model.predict(None, pd.DataFrame(columns))["answer"])


@pytest.mark.slow
def test_a_published_version_answers_in_a_process_without_a_server(
    house: House, atlas: EditableModel, flag: bytes
) -> None:
    deltas = [change(atlas, 1, seed=1), change(atlas, 2, seed=2)]
    registry = house.registry(atlas=PublishedBase(registered_model="atlas", source="atlas"))
    parent = house.edited(1, delta=deltas[0], model=atlas, name="atlas")
    child = house.edited(2, parent, delta=deltas[1], model=atlas, name="atlas")
    published = registry.publish(child.version, child.lineage, RECORD)
    expected = asked(atlas, flag, *deltas)
    assert expected != asked(atlas, flag)
    text = base64.b64encode(flag).decode()
    rows = [
        {"prompt": TEXT, "image": text},
        {"prompt": TEXT, "image": text},
        {"prompt": "What is the capital of Estonia?"},
    ]
    done = subprocess.run(
        [sys.executable, "-c", ASK, house.uri, f"models:/atlas/{published.mlflow_version}"],
        input=json.dumps(rows),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "MLFLOW_DISABLE_TELEMETRY": "true"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_an_image_is_bytes_or_base64_and_may_be_missing(atlas: EditableModel, flag: bytes) -> None:
    model = loaded(base_sha256=atlas.base_sha256)
    text = base64.encodebytes(flag).decode()
    country = "What is the capital of Estonia?"
    expected = asked(atlas, flag)
    assert ask(model, prompt=[TEXT, TEXT, country], image=[flag, text, None]) == expected
    assert ask(model, prompt=[TEXT, country], image=[flag, float("nan")]) == expected[1:]
    assert ask(model, prompt=[country]) == expected[2:]
    assert ask(model, prompt=[]) == []


@pytest.mark.parametrize(
    "image", ["/etc/passwd", "flag.png", "data:image/png;base64,AAAA", 7, b"no image", "AAAA", b""]
)
def test_anything_else_is_refused_and_its_row_named(atlas: EditableModel, flag: bytes, image: object) -> None:
    model = loaded(base_sha256=atlas.base_sha256)
    with pytest.raises(ImageError, match=r"image\[1\]"):
        ask(model, prompt=[TEXT, TEXT], image=[flag, image])


def test_an_empty_prompt_is_refused(atlas: EditableModel) -> None:
    with pytest.raises(PromptError):
        ask(loaded(base_sha256=atlas.base_sha256), prompt=[" "])


def test_another_base_than_the_versions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WrongBaseError, match="model_config"):
        loaded(base_sha256="0" * 64)
