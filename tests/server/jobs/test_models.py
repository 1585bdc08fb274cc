import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from house import House, edit_message, question, small_edit, succeeded, working, write_references

from errata.editor.checkpoints import atlas_folder
from errata.editor.errors import InvalidInputError, ModelError
from errata.server.errors import BaseChangedError, NotFoundError
from errata.server.jobs.references import has_references, read_references, references_of
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobKind, NewVersion
from errata.server.models import LoadState, Models
from errata.server.settings import ModelSettings
from errata.server.store import DeltaStore

Make = Callable[..., Models]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    ledger.migrate()
    yield ledger
    ledger.close()


@pytest.fixture
def make(ledger: Ledger, tmp_path: Path) -> Iterator[Make]:
    made: list[Models] = []

    def make(settings: ModelSettings, changed: Callable[[str, LoadState], None] = lambda *_: None) -> Models:
        models = Models({"m": settings}, ledger, DeltaStore(tmp_path / "deltas"), tmp_path, changed=changed)
        made.append(models)
        models.start()
        return models

    yield make
    for models in made:
        models.close(0)


def test_a_failed_load_is_a_model_error_and_the_next_call_tries_again(make: Make, tmp_path: Path) -> None:
    seen: list[LoadState] = []
    folder = tmp_path / "checkpoint"
    models = make(ModelSettings(source=str(folder), load="lazy"), lambda _name, state: seen.append(state))
    with pytest.raises(ModelError):
        models.get("m")
    assert models.state("m") is LoadState.FAILED
    folder.symlink_to(atlas_folder())
    assert models.get("m").layers > 0
    assert seen == [LoadState.LOADING, LoadState.FAILED, LoadState.LOADING, LoadState.READY]


def test_a_lazy_model_is_loaded_when_it_is_asked_for_and_once(make: Make) -> None:
    models = make(ModelSettings(source="atlas", load="lazy"))
    assert models.state("m") is LoadState.UNLOADED
    assert models.loaded("m") is None
    with ThreadPoolExecutor(4) as pool:
        assert len(set(map(id, pool.map(lambda _: models.get("m"), range(4))))) == 1
    assert models.state("m") is LoadState.READY


def test_what_loading_showed_is_in_the_ledger(make: Make, ledger: Ledger) -> None:
    loaded = make(ModelSettings(source="atlas")).get("m")
    row = ledger.model("m")
    assert row.base_sha256 == loaded.base.base_sha256
    assert (row.architecture, row.layers) == ("LlavaForConditionalGeneration", loaded.layers)


def test_a_checkpoint_that_is_not_the_versions_own_is_refused(make: Make, ledger: Ledger) -> None:
    ledger.ensure_model("m")
    ledger.describe_model("m", base_sha256="0" * 64, architecture="Other", layers=1)
    job = ledger.create_job(JobKind.EDIT, "m", version=0, request=b"", request_id=None, actor="tester")
    ledger.claim((JobKind.EDIT,))
    new = NewVersion(
        base_sha256="0" * 64, delta_sha256="1" * 64, delta_bytes=1, layers=(0,), facts=(), scores="[]", rejections=()
    )
    ledger.commit_edit(job.id, new, result=b"", publish=False)
    with pytest.raises(BaseChangedError):
        make(ModelSettings(source="atlas", load="lazy")).get("m")


def test_an_unknown_model_is_not_found(house: House) -> None:
    with pytest.raises(NotFoundError) as caught:
        house.models.get("nobody")
    assert caught.value.said_reason == "MODEL_NOT_FOUND"


def test_replicas_share_the_weights_and_nothing_else(house: House) -> None:
    loaded = house.models.get("atlas")
    with loaded.borrow() as one, loaded.borrow() as two:
        assert one.model is not two.model
        shared = zip(one.model.parameters(), two.model.parameters(), loaded.base.model.parameters(), strict=True)
        assert all(a.data_ptr() == b.data_ptr() == c.data_ptr() for a, b, c in shared)


def test_a_replica_that_came_back_is_lent_again(house: House) -> None:
    loaded = house.models.get("atlas")
    with loaded.borrow() as first:
        pass
    with loaded.borrow() as second:
        assert second is first


def test_threads_with_replicas_of_their_own_answer_like_one_alone(house: House) -> None:
    loaded = house.models.get("atlas")
    prompts = [question(c).prompt for c in ("Estonia", "Japan")]
    together = Barrier(2, timeout=60)

    def ask(n: int) -> str:
        with loaded.borrow() as model:
            together.wait()
            return model.generate([prompts[n]])[0].text

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, range(2))) == ["Tallinn", "Tokyo"]


def test_memory_is_that_of_the_weights_however_many_replicas_there_are(house: House) -> None:
    loaded = house.models.get("atlas")
    assert loaded.memory_bytes >= sum(p.nbytes for p in loaded.base.model.parameters())


def test_a_versions_deltas_are_those_of_its_lineage_the_oldest_first(house: House) -> None:
    with working(house) as worker:
        one = succeeded(worker.run(edit_message(small_edit("Estonia", contexts=2)))).made or 0
        two = succeeded(worker.run(edit_message(small_edit("Latvia", contexts=2)), version=one)).made or 0
    loaded = house.models.get("atlas")
    assert loaded.deltas_of(0) == ()
    assert loaded.composed(0) is None
    hashes = [d.sha256 for d in loaded.deltas_of(two)]
    assert hashes == [house.ledger.version("atlas", n).delta_sha256 for n in (one, two)]
    composed = loaded.composed(two)
    assert composed is not None
    assert composed.ranks[1] == sum(d.ranks[1] for d in loaded.deltas_of(two))


def test_statistics_are_computed_once_and_then_read_from_disk(house: House) -> None:
    loaded = house.models.get("atlas")
    steps: list[int] = []
    with loaded.borrow() as model:
        first = loaded.statistics(model, (0,), progress=lambda done, _total: steps.append(done))
        assert steps
        steps.clear()
        again = loaded.statistics(model, (0,), progress=lambda done, _total: steps.append(done))
    assert not steps
    assert bool((first.everywhere[0] == again.everywhere[0]).all())


def test_atlas_has_references_and_another_checkpoint_has_none() -> None:
    assert has_references(ModelSettings(source="atlas"))
    other = ModelSettings(source=str(atlas_folder()))
    assert not has_references(other)
    assert references_of(other) == ()


def test_references_come_from_a_file_with_their_images_beside_it(tmp_path: Path) -> None:
    found = read_references(write_references(tmp_path))
    assert {len(c.prompt.images) for c in found} == {0, 1}
    assert all(c.subject for c in found)
    assert all(c.constraint.text in c.prompt.text for c in found)


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        json.dumps({"text": "What is the capital of Estonia?"}),
        json.dumps({"text": "What is the capital of Estonia?", "constraint": "Latvia"}),
        json.dumps({"text": "this country?", "constraint": "this country", "images": ["missing.png"]}),
        json.dumps({"text": "Estonia?", "constraint": "Estonia", "subjekt": "Estonia"}),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "references.jsonl"
    path.write_text('{"text": "Where is Riga?", "constraint": "Riga"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ModelError, match="line 3") as caught:
        read_references(path)
    assert not isinstance(caught.value, InvalidInputError)


def test_a_file_without_references_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "references.jsonl"
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(ModelError, match="no line"):
        read_references(path)
