"""One edit is one finished run, one model and one registered version, however often it is published."""

import json
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import LoggedModelStatus, ViewType
from mlflow.exceptions import MlflowException
from publishing import FILES, MODEL, RECORD, Edited, House
from tiny import random_delta

from errata.editor.delta import load_delta
from errata.editor.errors import CorruptDeltaError, WrongBaseError
from errata.server.errors import NotFoundError
from errata.server.registry.record import Published
from errata.server.registry.registry import STEPS, PublishedBase, Registry

# MLflow's own code, on SQLAlchemy 2.1 and pandas 3.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Operation with range is deprecated:DeprecationWarning"),
]


class CutOffError(Exception):
    """The process ends here."""


def publish(registry: Registry, edited: Edited) -> Published:
    return registry.publish(edited.version, edited.lineage, RECORD)


def assert_published_once(house: House, edited: Edited, published: Published) -> None:
    (registered,), (run,), (model,) = house.registered(), house.runs(), house.models()
    assert (run.info.run_id, int(registered.version)) == (published.run_id, published.mlflow_version)
    assert run.info.status == "FINISHED"
    assert model.status is LoggedModelStatus.READY
    assert registered.run_id == model.source_run_id == run.info.run_id
    assert registered.source == model.artifact_location
    assert [o.model_id for o in run.outputs.model_outputs] == [model.model_id]
    folder = Path(run.info.artifact_uri.removeprefix("file://"))
    assert {p.name for p in folder.iterdir()} == {*FILES, "delta"}
    assert load_delta(folder / "delta").sha256 == edited.version.delta_sha256
    assert load_delta(house.files_of(registered) / "artifacts" / "adapter").base_sha256 == MODEL.base_sha256


def test_a_version_is_one_run_with_what_its_edit_left(house: House) -> None:
    edited = house.edited(rejections=("efficacy 0.5 is below 0.9",))
    published = publish(house.registry(), edited)
    assert_published_once(house, edited, published)
    (run,) = house.runs()
    assert house.client.get_experiment(run.info.experiment_id).name == "errata/tiny"
    assert run.info.run_name == "1 · fact 1"
    assert run.data.params == {
        "method": "memit", "preservation": "15000", "requests": "1", "layers": "1, 2", "facts": "1",
        "delta_bytes": str(edited.version.delta_bytes),
    }  # fmt: skip
    assert run.data.metrics == {
        "efficacy/before": 0, "efficacy/after": 1, "efficacy/forced": 1, "efficacy/low": 0.51, "efficacy/high": 1,
        "efficacy/n": 4, "other_subjects/before": 1, "other_subjects/after": 0.875, "other_subjects/low": 0.6,
        "other_subjects/high": 0.98, "other_subjects/n": 9,
    }  # fmt: skip
    assert run.data.tags["mlflow.user"] == "ada"
    assert run.data.tags["mlflow.loggedArtifacts"] == '[{"path": "before_after.json", "type": "table"}]'
    assert "mlflow.parentRunId" not in run.data.tags


def test_run_model_and_registered_version_carry_the_same_tags_and_the_description(house: House) -> None:
    edited = house.edited(rejections=("efficacy 0.5 is below 0.9",))
    publish(house.registry(), edited)
    (registered,), (run,), (model,) = house.registered(), house.runs(), house.models()
    tags = {
        "errata.edit": "edit-1",
        "errata.model": "tiny",
        "errata.version": "1",
        "errata.parent": "0",
        "errata.base_sha256": MODEL.base_sha256,
        "errata.delta_sha256": edited.version.delta_sha256,
        "errata.state": "rejected",
        "errata.created_by": "ada",
    }
    assert registered.tags == tags
    assert tags.items() <= run.data.tags.items()
    assert tags.items() <= model.tags.items()
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "tiny facts", "version": 1}]
    assert "| Kazakhstan: capital | Nur-Sultan | **Astana** |" in registered.description
    assert run.data.tags["mlflow.note.content"] == registered.description
    assert {m.key: m.value for m in model.metrics} == run.data.metrics


def test_the_model_holds_code_and_adapter_and_no_pickle(house: House) -> None:
    published = publish(house.registry(), house.edited())
    assert published.mlflow_version == 1
    folder = house.files_of(house.registered()[0])
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {"MLmodel", "pyfunc_model.py", "requirements.txt", "artifacts/adapter/adapter_model.safetensors"} <= files
    assert {Path(f).suffix for f in files} <= {"", ".py", ".txt", ".yaml", ".json", ".safetensors", ".md"}
    loaded = mlflow.models.Model.load(str(folder))
    config = loaded.flavors["python_function"]["config"]
    expected = {"source": "somewhere", "base_sha256": MODEL.base_sha256, "dtype": "float32", "quantization": "none"}
    assert config == expected
    assert loaded.signature.inputs.input_names() == ["prompt", "image"]
    assert not any("pickle" in r for r in (folder / "requirements.txt").read_text().splitlines())
    assert f"mlflow=={mlflow.__version__}" in (folder / "requirements.txt").read_text().splitlines()


def test_a_childs_run_is_nested_under_its_parents_and_its_model_holds_the_whole_lineage(house: House) -> None:
    registry = house.registry()
    parent = house.edited(1)
    child = house.edited(2, parent)
    first, second = publish(registry, parent), publish(registry, child)
    run = house.client.get_run(second.run_id)
    assert run.data.tags["mlflow.parentRunId"] == first.run_id
    assert run.data.tags["errata.parent"] == "1"
    assert second.mlflow_version == 2
    adapter = load_delta(house.files_of(house.registered()[1]) / "artifacts" / "adapter")
    whole = house.deltas.get(parent.version.delta_sha256) + house.deltas.get(child.version.delta_sha256)
    assert float((adapter - whole).norm()) <= 1e-6 * whole.norm()
    assert adapter.ranks == {1: 4, 2: 2}


def test_a_lineage_that_cancels_is_published_as_its_base(house: House) -> None:
    delta = random_delta(MODEL, {1: 2})
    parent = house.edited(1, delta=delta)
    child = house.edited(2, parent, delta=delta * -1.0)
    publish(house.registry(), child)
    folder = house.files_of(house.registered()[0])
    assert not (folder / "artifacts").exists()


def test_publishing_twice_changes_nothing(house: House) -> None:
    edited = house.edited()
    first = publish(house.registry(), edited)
    assert publish(house.registry(), edited) == first
    assert_published_once(house, edited, first)
    assert len(house.runs(ViewType.ALL)) == 1


@pytest.mark.parametrize("step", STEPS)
def test_publishing_after_a_cut_at_any_step_ends_with_one_of_each(house: House, step: str) -> None:
    edited = house.edited()

    def cut(reached: str) -> None:
        if reached == step:
            raise CutOffError

    # What is finished is not begun again, so only the steps before it can be cut off twice.
    for _ in range(2 if STEPS.index(step) < STEPS.index("finished") else 1):
        with pytest.raises(CutOffError):
            publish(house.registry(cut), edited)
    assert_published_once(house, edited, publish(house.registry(), edited))


def test_a_version_that_was_registered_twice_is_left_once(house: House) -> None:
    edited = house.edited()
    first = publish(house.registry(), edited)
    (registered,) = house.registered()
    house.client.create_model_version(registered.name, registered.source, registered.run_id, registered.tags)
    assert len(house.registered()) == 2
    assert house.registry().find(edited.version) == first
    assert_published_once(house, edited, first)


def test_all_published_versions_of_a_model_are_listed_by_edit(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = house.registry()
    assert registry.registered("tiny") == {}
    edits = [house.edited(n) for n in (1, 2, 3)]
    published = [publish(registry, e) for e in edits]
    monkeypatch.setattr("errata.server.registry.registry._PAGE", 2)
    assert registry.registered("tiny") == dict(zip(("edit-1", "edit-2", "edit-3"), published, strict=True))
    assert registry.registered("another") == {}


def test_an_alias_follows_its_version_and_is_taken_away(house: House) -> None:
    registry = house.registry()
    one, two = house.edited(1), house.edited(2)
    for edited in (one, two):
        publish(registry, edited)
    for version in (one.version, two.version, two.version):
        registry.set_alias(version, "champion")
    assert [v.aliases for v in house.registered()] == [[], ["champion"]]
    registry.delete_alias("tiny", "champion")
    registry.delete_alias("tiny", "champion")
    assert [v.aliases for v in house.registered()] == [[], []]


def test_an_alias_to_a_version_that_mlflow_lost_is_taken_away(house: House) -> None:
    registry = house.registry()
    registry.delete_alias("tiny", "champion")
    one, lost = house.edited(1), house.edited(2)
    publish(registry, one)
    registry.set_alias(one.version, "champion")
    registry.set_alias(lost.version, "champion")
    assert house.registered()[0].aliases == []


def test_a_deleted_version_leaves_the_others(house: House) -> None:
    registry = house.registry()
    registry.delete_version("tiny", "edit-1")
    one, two = house.edited(1), house.edited(2)
    publish(registry, one)
    kept = publish(registry, two)
    for _ in range(2):
        registry.delete_version("tiny", "edit-1")
    assert_published_once(house, two, kept)
    assert registry.registered("tiny") == {"edit-2": kept}


def test_a_version_is_published_again_after_its_experiment_was_deleted(house: House) -> None:
    registry = house.registry()
    publish(registry, house.edited(1))
    house.client.delete_experiment(house.runs()[0].info.experiment_id)
    assert publish(registry, house.edited(2)).mlflow_version == 2


@pytest.mark.parametrize("damage", ["model", "delta", "base"])
def test_what_cannot_be_published_registers_nothing(house: House, damage: str) -> None:
    edited = house.edited()
    error: type[Exception] = NotFoundError
    registry = house.registry()
    if damage == "model":
        registry = Registry(
            house.uri, bases={}, deltas=house.deltas, artifacts=house.artifacts, artifact_root=house.root
        )
    elif damage == "delta":
        folder = house.deltas.folder(edited.version.delta_sha256)
        (folder / "adapter_model.safetensors").write_bytes(b"damaged")
        error = CorruptDeltaError
    else:
        edited = Edited(replace(edited.version, base_sha256="0" * 64), edited.lineage)
        error = WrongBaseError
    with pytest.raises(error):
        publish(registry, edited)
    assert house.registered() == []
    assert [r.info.status for r in house.runs()] != ["FINISHED"]


def test_an_edit_whose_files_are_gone_is_published_without_them(house: House) -> None:
    publish(house.registry(), house.edited(files={}))
    (run,) = house.runs()
    assert [f.path for f in house.client.list_artifacts(run.info.run_id)] == ["delta"]


def test_making_a_registry_reaches_for_nothing(house: House) -> None:
    """MLflow may be down when the server starts."""
    registry = Registry("http://127.0.0.1:9", bases=house.bases, deltas=house.deltas, artifacts=house.artifacts)
    edited = house.edited()
    with pytest.raises(MlflowException):
        publish(registry, edited)


def test_publishing_leaves_the_processs_own_mlflow_alone(house: House) -> None:
    before = mlflow.get_tracking_uri()
    publish(house.registry(), house.edited())
    assert mlflow.get_tracking_uri() == before
    assert mlflow.active_run() is None


def test_a_folder_is_published_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "atlas").mkdir()
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    sources = {s: PublishedBase(registered_model="x", source=s).portable_source for s in ("base", "atlas", "hub/name")}
    assert sources == {"base": str(tmp_path / "base"), "atlas": "atlas", "hub/name": "hub/name"}
