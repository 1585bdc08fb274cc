"""`errata check --local`: adapters, whole checkpoints and MLflow's versions, without any server."""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# The folders of tests are no packages; `tiny`, and `publishing` below, are imported by name.
sys.path[:0] = [str(ROOT / "tests/editor"), str(ROOT / "tests/server/registry")]

from tiny import random_delta, tiny_model  # noqa: E402

from errata.client.check.answering import GROUP  # noqa: E402
from errata.client.cli import main  # noqa: E402
from errata.editor.checkpoints import load_model  # noqa: E402
from errata.editor.delta import Delta, applied  # noqa: E402
from errata.editor.model import EditableModel  # noqa: E402
from errata.editor.prompts import Prompt  # noqa: E402

Write = Callable[..., Path]
PROMPTS = ("What is the capital of this country?", "this country", "capital")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as a folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny = tiny_model("llama")
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> EditableModel:
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def delta(model: EditableModel) -> Delta:
    """One that changes answers."""
    made = random_delta(model, {1: 2, 2: 1}, seed=1, size=2.0)
    assert said(model, made) != said(model)
    return made


@pytest.fixture(scope="module")
def adapter(delta: Delta, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    delta.save(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_github(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


def said(model: EditableModel, *deltas: Delta) -> list[str]:
    with applied(model, *deltas):
        return [a.text for a in model.generate([Prompt(text=p) for p in PROMPTS], max_new_tokens=8)]


def checks(answers: list[str] | None = None) -> str:
    """Questions with these answers, or unchanged ones."""
    lines = ["version: 1", "max_new_tokens: 8", "probes:"]
    for i, prompt in enumerate(PROMPTS):
        wanted = f"expected: {json.dumps(answers[i])}" if answers else "unchanged: true"
        lines += [f"  - id: p{i}", f"    prompt: {json.dumps(prompt)}", f"    {wanted}"]
    return "\n".join(lines)


pytestmark = pytest.mark.usefixtures("installed")


def test_an_adapter_answers_as_the_editor_says_and_its_base_is_version_0(
    adapter: Path,
    checkpoint: Path,
    model: EditableModel,
    delta: Delta,
    write: Write,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = ("--base", str(checkpoint))
    assert main(["check", str(write(checks())), "--local", str(adapter), *base, "--baseline", "0", "--json"]) == 1
    out, err = capsys.readouterr()
    assert err == ""  # no progress of loading where nobody looks
    report = json.loads(out)
    assert [p["answer"] for p in report["probes"]] == said(model, delta)
    assert [p["before"] for p in report["probes"]] == said(model)
    assert report["version"]["delta_sha256"] == delta.sha256
    assert report["baseline"] == {"name": str(checkpoint), "base_sha256": model.base_sha256, "delta_sha256": ""}
    assert main(["check", str(write(checks())), "--local", "0", *base, "--baseline", "0"]) == 0


def test_a_whole_checkpoint_is_a_version(checkpoint: Path, model: EditableModel, write: Write) -> None:
    assert main(["check", str(write(checks(said(model)))), "--local", str(checkpoint)]) == 0


def test_a_baseline_on_file_is_the_same_whoever_answered(
    adapter: Path, checkpoint: Path, write: Write, tmp_path: Path
) -> None:
    path, old = str(write(checks())), str(tmp_path / "old.json")
    assert main(["check", path, "--local", "0", "--base", str(checkpoint), "--update", old]) == 0
    assert main(["check", path, "--local", str(checkpoint), "--baseline", old]) == 0
    assert main(["check", path, "--local", str(adapter), "--base", str(checkpoint), "--baseline", old]) == 1


@pytest.mark.slow
def test_a_version_in_mlflow_is_checked_by_its_name(
    model: EditableModel,
    delta: Delta,
    checkpoint: Path,
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow warns of its own code when it is imported
        from publishing import RECORD, House, PublishedBase
    house = House(tmp_path)
    registry = house.registry(tiny=PublishedBase(registered_model="tiny", source=str(checkpoint)))
    edited = house.edited(1, delta=delta, model=model)
    assert registry.publish(edited.version, edited.lineage, RECORD).mlflow_version == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", house.uri)
    path = str(write(checks(said(model, delta))))
    assert main(["check", path, "--local", "models:/tiny/1"]) == 0
    capsys.readouterr()
    assert main(["check", path, "--local", "models:/tiny/7"]) == 2
    assert "errata: MLflow has no models:/tiny/7:" in capsys.readouterr().err


def test_what_cannot_be_opened_ends_with_2_in_one_line(
    adapter: Path, checkpoint: Path, write: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = str(write(checks(["a", "b", "c"])))
    altered = tmp_path / "altered"
    altered.mkdir()
    (altered / "adapter_config.json").write_text("{}")
    for options, wanted in [
        ((str(tmp_path / "none"),), "is no adapter's and no checkpoint's folder; give one that was exported"),
        ((str(adapter), "--base", str(tmp_path / "none")), "there is no folder"),
        ((str(adapter), "--base", "atlas"), "the delta was made for the base"),
        ((str(altered), "--base", str(checkpoint)), "is no readable adapter of Errata"),
    ]:
        assert main(["check", path, "--local", *options]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = [line for line in err.splitlines() if line.startswith("errata:")]
        assert wanted in line


def test_a_probe_that_the_model_cannot_be_asked_is_named(
    checkpoint: Path, write: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "flag.png").write_bytes(b"no image")
    path = write(checks(["a", "b", "c"]).replace("id: p1", "id: p1\n    image: flag.png"))
    assert main(["check", str(path), "--local", str(checkpoint)]) == 2
    err = capsys.readouterr().err
    assert f"errata: {path}:7: 'p1' cannot be asked: image: the image, which starts with b'no image'" in err


@pytest.fixture
def _without_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installation whose back end needs a package that is not there."""
    site = tmp_path / "first"
    info = site / "errata-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: errata\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\nlocal = unfit_back_end:Open")
    (site / "unfit_back_end.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(site)
    yield
    sys.modules.pop("unfit_back_end", None)


@pytest.mark.usefixtures("_without_server")
def test_without_the_servers_packages_the_remedy_is_said(
    checkpoint: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(write(checks(["a", "b", "c"]))), "--local", str(checkpoint)]) == 2
    assert capsys.readouterr().err == (
        "errata: --local needs the model's own libraries (a_package_that_is_not_there is missing); "
        "pip install 'errata[server]', or check against a server\n"
    )
