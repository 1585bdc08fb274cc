"""A cluster with two workers on this machine: it finds and answers what one process does, and loses nothing."""

import asyncio
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import nan
from pathlib import Path
from typing import NoReturn

import deeds
import grpc
import numpy as np
import pytest
import torch
import yaml
from google.rpc import error_details_pb2, status_pb2
from hosting import BASE, SECONDS, Hosted, Stubs, generate_message, hosting, question, refused
from pydantic import SecretStr, ValidationError
from ray.exceptions import ActorDiedError, AuthenticationError, OutOfMemoryError
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from errata.client import Errata, Prompt
from errata.editor.atlas.facts import errata, probes, trace_requests
from errata.editor.atlas.world import Attribute
from errata.editor.checkpoints import load_model
from errata.editor.delta import Delta, LowRank, applied, weight_of
from errata.editor.errors import CancelledError, ConstraintNotFoundError, InvalidInputError, ModelError
from errata.editor.evaluation import evaluate
from errata.editor.model import EditableModel
from errata.editor.prompts import Constraint
from errata.editor.states import Component
from errata.editor.trace import CausalTrace, TraceSettings, trace
from errata.server.cluster.connection import ClusterSettings, _refused, connected
from errata.server.cluster.errors import ClusterError, Fault, WorkerLostError, WorkFailedError
from errata.server.cluster.front import REPLICA_KEY, Front
from errata.server.cluster.replica import Replica
from errata.server.cluster.serving import NAME, SERVICERS, ReplicaSettings, application, bound, serving
from errata.server.cluster.sharding import ModelSource, sharded_evaluation, sharded_traces
from errata.server.cluster.studies import on_cluster
from errata.server.cluster.workers import LOST, Ended, Worker, Workers, WorkerSettings, lacking_for
from errata.server.errors import LedgerUnavailableError
from errata.server.settings import ModelSettings, Settings, SettingsError
from errata.server.studies.command import studies
from errata.server.studies.format import read_study
from errata.server.studies.plan import Cell, plan
from errata.server.studies.results import Place
from errata.server.studies.running import Outcome, measure_cell
from errata.v1 import inference_pb2

ONE, TWO = WorkerSettings(workers=1), WorkerSettings(workers=2)
FEW = TraceSettings(components=(Component.MLP,))


@pytest.fixture(scope="module")
def atlas() -> EditableModel:
    return load_model("atlas")


def some_delta(model: EditableModel, seed: int, size: float) -> Delta:
    """Of size 3 it changes some answers and not all."""
    random = torch.Generator().manual_seed(seed)
    d, m = weight_of(model, 1).shape
    low = LowRank(a=torch.randn(2, m, generator=random) * 0.1, b=torch.randn(d, 2, generator=random) * size)
    return Delta(base_sha256=model.base_sha256, layers={1: low}, modules={1: model.down_projection_name(1)})


def test_an_error_crosses_processes_whole() -> None:
    invalid = Fault.of(InvalidInputError("it is no word", field="target").within("requests[2]")).error
    assert type(invalid) is InvalidInputError
    assert str(invalid) == "requests[2].target: it is no word"
    busy = Fault.of(LedgerUnavailableError("later", retry_after=2.5, reason="ELSEWHERE")).error
    assert isinstance(busy, LedgerUnavailableError)
    assert (busy.retry_after, busy.said_reason) == (2.5, "ELSEWHERE")


def test_a_cluster_that_is_not_there_is_said_to_be_missing() -> None:
    nowhere = connected(ClusterSettings(address="127.0.0.1:1"))
    with pytest.raises(ClusterError, match=r"no Ray cluster at '127\.0\.0\.1:1'"), nowhere:
        pass


def test_a_cluster_that_refuses_or_cannot_be_reached_this_way_says_what_to_give() -> None:
    for error in (AuthenticationError("no token"), ConnectionError("Failed to connect")):
        assert "RAY_AUTH_TOKEN" in str(_refused("auto", error))
    other = str(_refused("auto", RuntimeError("Version mismatch: The cluster was started with: Ray: 2.9.0")))
    assert "has another release" in other
    assert "there is no" not in other
    with pytest.raises(ClusterError, match="with auto or HOST:PORT"), connected(ClusterSettings(address="ray://a:1")):
        pass
    for address in ("", "nonsense", "host:port", "host:99999", ":6379"):
        with pytest.raises(ClusterError, match="is no cluster; give auto"), connected(ClusterSettings(address=address)):
            pass


def test_a_head_that_is_gone_is_missing_at_once_where_auto_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ClusterError, match="no Ray cluster at 'auto'"), connected(ClusterSettings(address="auto")):
        pass


def test_what_nobody_foresaw_is_handed_back_and_its_worker_lives_on(caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker[None]()
    assert worker.open(deeds.nothing) is None
    fault = worker.work(deeds.as_told, 7, "fail")
    assert isinstance(fault, Fault)
    assert isinstance(fault.error, WorkFailedError)
    assert str(fault.error) == "shard 7: RuntimeError: CUDA error: an illegal access; the worker's log has the rest"
    assert "Traceback" in caplog.text
    assert worker.work(deeds.as_told, 8, "a") == "a"


def test_shards_of_an_evaluation_have_probes() -> None:
    none = Workers(deeds.nothing, TWO)
    with pytest.raises(InvalidInputError, match="give at least 1") as caught:
        sharded_evaluation(none, [], Delta(base_sha256="", layers={}, modules={}), probes_per_shard=-1)  # type: ignore[arg-type]
    assert caught.value.field == "probes_per_shard"


class Differing:
    """Workers of which each holds another checkpoint."""

    def map(self, _task: object, shards: Sequence[object]) -> Iterator[Ended[tuple[str, str]]]:
        return (Ended(shard=i, outcome=(f"base {i}", "a trace")) for i in range(len(shards)))


def test_traces_of_two_checkpoints_are_not_mixed() -> None:
    one, two = trace_requests(2)
    assert sharded_traces(Differing(), [one]) == ["a trace"]  # type: ignore[arg-type, comparison-overlap]
    with pytest.raises(ClusterError, match="are base 0 and base 1; give all nodes the same"):
        sharded_traces(Differing(), [one, two])  # type: ignore[arg-type]


def test_workers_load_a_model_as_it_is_said_to_be_quantised() -> None:
    with pytest.raises(InvalidInputError) as caught:
        ModelSource(quantization="of our own")()  # type: ignore[arg-type]
    assert caught.value.field == "quantization"


def test_workers_need_something_to_work_with() -> None:
    for given in ({"workers": 0}, {"workers": 1, "cpus": 0}, {"workers": 1, "gpus": -0.5}, {"workers": 1, "gpus": nan}):
        with pytest.raises(InvalidInputError, match="give at least"):
            WorkerSettings(**given)  # type: ignore[arg-type]


def test_gpus_are_whole_ones_or_a_part_of_one() -> None:
    assert [WorkerSettings(workers=1, gpus=gpus).gpus for gpus in (0, 0.25, 1, 2)] == [0, 0.25, 1, 2]
    for gpus in (1.5, 0.00001):
        with pytest.raises(InvalidInputError, match=r"a part of one|at least") as caught:
            WorkerSettings(workers=1, gpus=gpus)
        assert caught.value.field == "gpus"
        with pytest.raises(ValidationError, match="gpus is"):
            ReplicaSettings(gpus=gpus)


@pytest.mark.slow
def test_a_worker_whose_weights_are_others_is_refused(atlas: EditableModel) -> None:
    assert ModelSource(base_sha256=atlas.base_sha256)().base_sha256 == atlas.base_sha256
    with pytest.raises(ModelError, match="give all nodes the same"):
        ModelSource(base_sha256="of the server")()


def test_replicas_need_leave_to_listen_everywhere_and_the_servers_folder(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="insecure_ok = true"):
        bound(Settings(data_dir=tmp_path), ReplicaSettings())
    with pytest.raises(SettingsError, match="data_dir is 'errata-data'; give full paths"):
        bound(Settings(insecure_ok=True), ReplicaSettings())
    with pytest.raises(ClusterError, match="give all nodes the server's data_dir"):
        Replica(Settings(data_dir=tmp_path / "gone"))


def test_replicas_need_full_paths(tmp_path: Path) -> None:
    hub = ModelSettings(source="llava-hf/llava-1.5-7b-hf")
    base = {"insecure_ok": True, "data_dir": tmp_path, "models": {"llava": hub}}
    bound(Settings(**base), ReplicaSettings())
    for wrong in (
        {"image_folders": (tmp_path, Path("flags"))},
        {"ledger_url": SecretStr("sqlite:///ledger.sqlite")},
        {"models": {"llava": ModelSettings(source="./llava")}},
    ):
        with pytest.raises(SettingsError, match="give full paths") as caught:
            bound(Settings(**base | wrong), ReplicaSettings())
        assert str(caught.value).startswith(next(iter(wrong)))
        assert str(caught.value).count(" is ") == 1


def test_the_example_is_a_configuration_that_serve_takes_and_builds_the_application(tmp_path: Path) -> None:
    example = yaml.safe_load((Path(__file__).parents[3] / "examples" / "cluster" / "serve.yaml").read_text())
    deployed = ServeDeploySchema.model_validate(example)
    assert deployed.grpc_options.grpc_servicer_functions == SERVICERS
    [entry] = deployed.applications
    assert (entry.import_path, entry.name) == (f"{application.__module__}:{application.__name__}", NAME)
    settings = tmp_path / "errata.toml"
    settings.write_text(f'insecure_ok = true\ndata_dir = "{tmp_path}"')
    built = application(ReplicaSettings.model_validate({**entry.args, "config": settings}))
    assert isinstance(built, Application)


class Gone:
    """A handle to replicas, each of which ends its call with an error."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    @property
    def call(self) -> "Gone":
        return self

    stream = call

    def options(self, **_: object) -> "Gone":
        return self

    def remote(self, *_: object) -> "Gone":
        return self

    def __await__(self) -> NoReturn:
        raise self.error

    def __aiter__(self) -> "Gone":
        return self

    async def __anext__(self) -> NoReturn:
        raise self.error


class Call:
    """gRPC's side of a call at Ray's proxy."""

    code = details = None
    trailing: Sequence[tuple[str, str | bytes]] = ()

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return []

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing: Sequence[tuple[str, str | bytes]]) -> None:
        self.trailing = trailing


def ends(error: Exception, most: int = 10**6) -> list[tuple[Call, str]]:
    """How calls of each method end whose replica fails so, with their reasons."""
    front = Front.func_or_class(Gone(error), most)
    request = generate_message()

    async def streamed(call: Call) -> None:
        sent = inference_pb2.StreamGenerateRequest(request=request)
        assert [each async for each in front.StreamGenerate(sent, call)] == [inference_pb2.StreamGenerateResponse()]

    score = inference_pb2.ScoreRequest(version=BASE)
    told = []
    for ask in (partial(front.Generate, request), partial(front.Score, score), streamed):
        call = Call()
        asyncio.run(ask(call))
        status = status_pb2.Status.FromString(dict(call.trailing)["grpc-status-details-bin"])
        info = error_details_pb2.ErrorInfo()
        assert any(detail.Unpack(info) for detail in status.details)
        told.append((call, info.reason))
    return told


@pytest.mark.parametrize("error", [ActorDiedError(), OutOfMemoryError("the node is full")])
def test_a_call_whose_replica_died_is_to_be_repeated(error: Exception) -> None:
    assert isinstance(error, LOST)
    for call, reason in ends(error):
        assert (call.code, reason) == (grpc.StatusCode.UNAVAILABLE, "REPLICA_LOST")
        assert dict(call.trailing)["grpc-retry-pushback-ms"] == "1000"


def test_what_nobody_foresaw_goes_to_the_log_and_not_to_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    for call, reason in ends(RuntimeError("the secret")):
        assert (call.code, reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        assert "failed inside the server" in str(call.details)
        assert "the secret" not in str([call.details, *call.trailing])
    assert caplog.text.count("RuntimeError: the secret") == 3


def test_a_request_that_is_too_large_is_carried_to_no_replica() -> None:
    for call, reason in ends(RuntimeError("carried"), most=3):
        assert (call.code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MESSAGE_TOO_LARGE")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_traces_and_an_evaluation_over_two_workers_are_those_of_one_process(atlas: EditableModel) -> None:
    good = trace_requests(3)
    mistyped = replace(good[0], constraint=Constraint(text="this contry"))
    asked = [good[0], mistyped, *good[1:]]
    judged = probes([errata()[0]], per_fact=2, others=3)
    reference = [p.prompt for p in judged[:3]]
    parent, child = some_delta(atlas, 1, 0.3), some_delta(atlas, 2, 3.0)
    told: list[tuple[int, int]] = []
    with Workers(ModelSource(), TWO) as workers:
        with pytest.raises(CancelledError, match="after 1 of 4 shards"):
            sharded_traces(workers, asked, FEW, cancelled=lambda: True)
        found = sharded_traces(workers, asked, FEW, deltas=[parent], progress=lambda *each: told.append(each))
        evaluated = sharded_evaluation(workers, judged, child, parent=[parent], reference=reference, probes_per_shard=5)
        long = replace(judged[-1], prompt=replace(judged[-1].prompt, text="where is this " * 500))
        with pytest.raises(InvalidInputError) as refused:
            sharded_evaluation(workers, [*judged[:-1], long], child, probes_per_shard=5)
        assert refused.value.field == f"probes[{len(judged) - 1}].prompt.text"
        assert workers.retried == 0
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert isinstance(found[1], ConstraintNotFoundError)
    assert found[1].field == "constraint.text"
    with applied(atlas, parent):
        for request, traced in zip(good, [found[0], *found[2:]], strict=True):
            alone = trace(atlas, request, FEW)
            assert isinstance(traced, CausalTrace)
            np.testing.assert_array_equal(traced.restored, alone.restored)
            assert (traced.answer, traced.tokens, traced.constraint) == (alone.answer, alone.tokens, alone.constraint)
        whole = evaluate(atlas, judged, applied(atlas, child), reference=reference)
    assert [r.after for r in evaluated.results] == [r.after for r in whole.results]
    assert evaluated.results == whole.results
    of_text = [(e.drift, e.fluency_before, e.fluency) for e in (evaluated, whole)]
    assert of_text[0] == of_text[1]
    assert 0 < sum(r.before != r.after for r in whole.results) < len(whole.results)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_shard_whose_worker_died_is_done_by_another_and_one_that_kills_twice_ends_alone(tmp_path: Path) -> None:
    told: list[str] = []
    # The third has no room as long as the others live, and nobody waits for it.
    with Workers(deeds.Looked(), WorkerSettings(workers=3), told=told.append) as workers:
        assert told.pop() == "3 workers need 3 CPU, and the cluster has 2; those without room wait for it"
        assert lacking_for(TWO, 2) == ""
        assert lacking_for(WorkerSettings(workers=1, gpus=0.5), 1) == "1 worker needs 0.5 GPU, and the cluster has 0"
        done = {each.shard: each.outcome for each in workers.map(deeds.once_deadly, [tmp_path] * 3)}
        assert workers.retried == len(told) == 1
        assert "its worker died" in told[0]
        asked = ["a", "die", "refuse", "b", "grow", "fail", "look"]
        ended = {each.shard: each.outcome for each in workers.map(deeds.as_told, asked)}
        assert (workers.retried, len(told), len(workers)) == (3, 3, 3)
    assert sorted(done) == [0, 1, 2]
    assert all(isinstance(pid, int) for pid in done.values())
    assert (ended[0], ended[3]) == ("a", "b")
    assert isinstance(ended[1], WorkerLostError)
    assert isinstance(ended[4], WorkerLostError)
    assert "running out of memory" in str(ended[4])
    assert isinstance(ended[5], WorkFailedError)
    assert "shard 5: RuntimeError: CUDA error" in str(ended[5])
    assert ended[6] == ""  # no GPU is seen by workers without a share of one
    assert isinstance(ended[2], InvalidInputError)
    assert ended[2].field == "told"


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_replacement_that_cannot_open_what_it_needs_takes_no_shards_and_the_last_one_says_why(tmp_path: Path) -> None:
    told: list[str] = []
    with Workers(partial(deeds.opens_twice, tmp_path), TWO, told=told.append) as workers:
        ended = {each.shard: each.outcome for each in workers.map(deeds.once_deadly, [tmp_path] * 9)}
        assert len(ended) == 9
        assert all(isinstance(pid, int) for pid in ended.values())
        # What was asked may be answered before the replacement is known to be of no use.
        with pytest.raises(InvalidInputError, match="there is no third"):
            list(workers.map(deeds.as_told, ["die"] * 2))
        assert any("could not be opened" in line for line in told)
        with pytest.raises(WorkerLostError, match="all workers are gone"):
            list(workers.map(deeds.as_told, ["a"]))


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_workers_that_cannot_open_what_they_need_say_why_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="look elsewhere"), Workers(deeds.refuses, ONE):
        pass
    with pytest.raises(ClusterError, match="a folder that all nodes share"):
        on_cluster(ONE)([], Place(out=tmp_path / "gone"), lambda *_: None)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_worker_that_refuses_first_does_not_end_the_run_of_one_that_still_opens(tmp_path: Path) -> None:
    told: list[str] = []
    opened = partial(deeds.refuses_before_another_opens, tmp_path)
    with Workers(opened, TWO, told=told.append) as workers:
        assert [each.outcome for each in workers.map(deeds.as_told, ["a"])] == ["a"]
        assert len(workers) == 1
    [line] = told
    assert "there is nothing here" in line
    assert "1 go on" in line


STUDY = {
    "study": "on a cluster",
    "data": {"words": {"atlas": "textual", "n": 2}, "gone": {"path": "gone.json"}},
    "measurements": {"lens": {"kind": "lens"}},
}


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_studys_cells_on_a_cluster_are_those_of_this_process(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    (tmp_path / "gone.json").write_text("[]")
    file.write_text(yaml.safe_dump(STUDY))
    cells = plan(read_study(file), tmp_path)
    here, there = Place(out=tmp_path / "here"), Place(out=tmp_path / "there")
    there.out.mkdir()
    ended: list[tuple[Cell, Outcome]] = []
    on_cluster(ONE)(cells, there, lambda *each: ended.append(each))
    assert sorted(cell.label for cell, _ in ended) == sorted(cell.label for cell in cells)
    for cell, outcome in ended:
        alone = measure_cell(cell, here)
        assert (there.has(cell.id), outcome.failed) == (here.has(cell.id), alone.failed)
        if not alone.failed:
            read = [(place.cells / cell.id / "findings.json").read_text() for place in (there, here)]
            assert read[0] == read[1]
    assert {bool(outcome.failed) for _, outcome in ended} == {True, False}
    ran = CliRunner().invoke(studies, ["run", str(file), "--out", str(there.out), "--cluster", "auto"])
    assert ran.exit_code == 1
    assert "connected to a cluster already" in ran.output


@dataclass(frozen=True)
class Served:
    """A plain server, and replicas that read its ledger and ask for tokens."""

    plain: Hosted
    address: str
    token: str
    version: str
    replicas: Stubs


@pytest.fixture(scope="module")
def served(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("data"), port=0, mlflow_uri="none", insecure_ok=True, drain_seconds=5.0
    )
    with hosting(settings) as plain:
        plain.loaded()
        version = plain.version()
        token = plain.server.stores.ledger.create_token("reader", {"*": "reader"})
        replicas = bound(settings.model_copy(update={"auth": True}), ReplicaSettings(replicas=2))
        port, http_port = free_ports(2)
        with (
            serving(replicas, port=port, http_port=http_port) as address,
            grpc.insecure_channel(address) as channel,
        ):
            yield Served(plain, address, token, version, Stubs(channel))


def free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.mark.slow
def test_replicas_answer_the_ordinary_client_as_the_server_does(served: Served) -> None:
    known = question("Estonia", Attribute.CURRENCY).prompt
    asked = Prompt(known.text, images=known.images)
    with (
        Errata(served.address, token=served.token, timeout=SECONDS) as replicas,
        Errata(served.plain.server.address, timeout=SECONDS) as plain,
    ):
        told = {version: plain.generate(version, asked) for version in ("atlas@0", served.version)}
        assert len({each.text for each in told.values()}) == 2
        for version, expected in told.items():
            assert replicas.generate(version, asked) == expected
            stream = replicas.stream(version, asked)
            assert "".join(stream) == expected.text
            assert stream.result() == expected
            candidates = [each.text for each in told.values()]
            assert replicas.score(version, asked, candidates) == plain.score(version, asked, candidates)
        assert replicas.generate("atlas", asked) == told["atlas@0"]
        plain.promote(served.version)
        assert replicas.generate("atlas", asked) == told[served.version]
        plain.rollback("atlas@champion")
        assert replicas.generate("atlas", asked) == told["atlas@0"]


@pytest.mark.slow
def test_both_replicas_answer_and_versions_may_be_mixed(served: Served) -> None:
    versions = [BASE, served.version] * 16
    expected = {v: served.plain.call.inference.Generate(generate_message("Estonia", v)).text for v in set(versions)}
    metadata = (("authorization", f"Bearer {served.token}"),)

    def answer(version: str) -> tuple[str, str]:
        call = served.replicas.inference.Generate.with_call
        told, rpc = call(generate_message("Estonia", version), metadata=metadata, timeout=SECONDS)
        return told.text, dict(rpc.trailing_metadata())[REPLICA_KEY]

    with ThreadPoolExecutor(len(versions)) as callers:
        answers = list(callers.map(answer, versions))
    assert [text for text, _ in answers] == [expected[v] for v in versions]
    assert len({replica for _, replica in answers}) == 2


@pytest.mark.slow
def test_what_replicas_refuse_looks_as_at_the_server(served: Served) -> None:
    how = {"metadata": (("authorization", f"Bearer {served.token}"),), "timeout": SECONDS}
    both = served.plain.call, served.replicas
    wrong = [
        generate_message(version="models/atlas/versions/99"),
        generate_message(version="models/other/versions/0"),
        generate_message(version="atlas"),
        generate_message(version=""),
        generate_message(max_new_tokens=0),
    ]
    for request in wrong:
        stream = inference_pb2.StreamGenerateRequest(request=request)
        for method, sent in (("Generate", request), ("StreamGenerate", stream)):
            expected, found = (refused(partial(getattr(each.inference, method), sent, **how)) for each in both)
            for name in ("code", "message", "reason", "domain", "field"):
                assert getattr(found, name) == getattr(expected, name)
    anonymous = refused(lambda: served.replicas.inference.Generate(generate_message(), timeout=SECONDS))
    assert (anonymous.code, anonymous.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
