"""The server killed at every stage of an edit or derivation and its publication: nothing lost, doubled or touched.

One edit is killed again and again: each new server takes up what the one before left, and dies one stage later.
"""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from forked import ForkedServer
from hosting import BASE, edit_message, generate_message
from processes import SECONDS, ServerProcess, server

from errata.editor.checkpoints import atlas_folder
from errata.v1 import common_pb2, edit_pb2, history_pb2, history_pb2_grpc, inference_pb2, model_pb2

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    # MLflow 3.17 reads its database in a way that SQLAlchemy 2.1 gives up.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
]

KILLED = -9


def killed(data: Path, stage: str, ask: Callable[[ServerProcess], object] | None = None) -> None:
    """Starts a server that ends itself at a stage, asks it for something, and waits for the end."""
    process = ForkedServer(data, fault=stage)
    try:
        if ask:
            process.connected()
            ask(process)
            process.channel.close()
        assert process.ended() == KILLED, f"{stage}: {process.said[-4000:]}"
    finally:
        if process.child.poll() is None:
            process.child.kill()
            process.ended()


def weights() -> str:
    return sha256((atlas_folder() / "model.safetensors").read_bytes()).hexdigest()


def ended(process: ServerProcess) -> list[edit_pb2.Edit]:
    """Every edit, once it has ended."""
    listed = process.call.edits.ListEdits(edit_pb2.ListEditsRequest(parent="models/atlas")).edits
    found = []
    for edit in listed:
        *_, last = process.call.edits.WatchEdit(edit_pb2.WatchEditRequest(name=edit.name), timeout=SECONDS)
        found.append(last.edit)
    return found


def test_a_server_killed_at_each_stage_of_an_edit_loses_and_doubles_nothing(tmp_path: Path) -> None:
    before = weights()
    first = edit_message("Estonia", request_id="first")
    second = edit_message("Latvia", request_id="second")
    killed(tmp_path, "queued", lambda server: server.call.edits.CreateEdit(first))
    killed(tmp_path, "values")
    for stage in ("run", "files", "model", "finished", "registered"):
        killed(tmp_path, f"mlflow:{stage}")
    killed(tmp_path, "solved", lambda server: server.call.edits.CreateEdit(second))
    killed(tmp_path, "stored")
    killed(tmp_path, "committed")
    with server(tmp_path, kind=ForkedServer) as last:
        edits = ended(last)
        assert [e.job.state for e in edits] == [common_pb2.STATE_SUCCEEDED] * 2
        made = [_published(last, e.version) for e in reversed(edits)]
        assert [v.name for v in made] == ["models/atlas/versions/1", "models/atlas/versions/2"]
        listed = last.call.models.ListVersions(model_pb2.ListVersionsRequest(parent="models/atlas")).versions
        assert [v.name for v in listed] == [made[1].name, made[0].name, BASE]
        again = last.call.edits.CreateEdit(first).edit
        assert again.name == edits[1].name
        for edit, request in zip(reversed(edits), (first, second), strict=True):
            asked = request.requests[0]
            question = inference_pb2.GenerateRequest(version=edit.version, prompt=asked.contexts[0].prompt)
            assert last.call.inference.Generate(question).text == asked.target
        assert last.call.inference.Generate(generate_message("France")).text == "Paris"
        base = last.call.models.GetModel(model_pb2.GetModelRequest(name="models/atlas")).model
        assert {v.base_sha256 for v in made} == {base.base_sha256}
    assert weights() == before
    _agrees(tmp_path, made)


def derived(process: ServerProcess, ask: history_pb2.CreateDerivationRequest) -> history_pb2.Derivation:
    """A derivation, as it is asked for or as it is there already."""
    return history_pb2_grpc.HistoryServiceStub(process.channel).CreateDerivation(ask).derivation


def test_a_server_killed_in_a_derivation_and_in_its_publication_loses_and_doubles_nothing(tmp_path: Path) -> None:
    with server(tmp_path, kind=ForkedServer) as first:
        first.call.edits.CreateEdit(edit_message("Estonia"))
        [edit] = ended(first)
        made = [_published(first, edit.version)]
    ask = history_pb2.CreateDerivationRequest(
        parent=edit.version, revert=history_pb2.Revert(version=edit.version), request_id="once"
    )
    killed(tmp_path, "stored", lambda server: derived(server, ask))
    for stage in ("committed", "mlflow:run", "mlflow:files", "mlflow:finished", "mlflow:registered"):
        killed(tmp_path, stage)
    with server(tmp_path, kind=ForkedServer) as last:
        revert = derived(last, ask)
        assert revert.job.state == common_pb2.STATE_SUCCEEDED
        made.append(_published(last, revert.version))
        listed = last.call.models.ListVersions(model_pb2.ListVersionsRequest(parent="models/atlas")).versions
        assert [v.name for v in listed] == [made[1].name, made[0].name, BASE]
        answers = [last.call.inference.Generate(generate_message("Estonia", v)).text for v in (BASE, revert.version)]
        assert answers[0] == answers[1]
    _agrees(tmp_path, made)


def _published(process: ServerProcess, name: str) -> model_pb2.Version:
    count = 0
    while True:
        version = process.call.models.GetVersion(model_pb2.GetVersionRequest(name=name)).version
        if version.publish_state == model_pb2.PUBLISH_STATE_PUBLISHED:
            return version
        count += 1
        process.lines(lambda line: "a version was" in line, count)


def _agrees(data: Path, made: list[model_pb2.Version]) -> None:
    """MLflow holds exactly these versions, each with one finished run."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{data}/mlflow.sqlite", f"sqlite:///{data}/mlflow.sqlite")
    registered = sorted(client.search_model_versions("name = 'atlas'"), key=lambda v: int(v.version))
    assert [(int(v.version), v.run_id, v.tags["errata.edit"]) for v in registered] == [
        (v.mlflow_version, v.mlflow_run_id, (v.edit or v.derivation).rpartition("/")[2]) for v in made
    ]
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert {(r.info.run_id, r.info.status) for r in runs} == {(v.mlflow_run_id, "FINISHED") for v in made}


def test_a_fault_that_names_no_stage_stops_the_start(tmp_path: Path) -> None:
    process = ForkedServer(tmp_path, fault="nowhere")
    assert process.ended() == 1
    assert "'nowhere' is no stage" in process.said
