"""The server as a whole: health, reflection, figures, what it refuses to start with, and how it ends."""

import json
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hosting import BASE, SECONDS, Hosted, Refused, edit_message, generate_message, hosting, refused, trace_message
from typer.testing import CliRunner

from errata.server.__main__ import cli
from errata.server.app import Server
from errata.server.errors import NotMigratedError
from errata.server.health import Health
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobKind, JobState
from errata.server.models import LoadState
from errata.server.settings import ModelSettings, Settings, SettingsError
from errata.v1 import common_pb2, inference_pb2, model_pb2, trace_pb2

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def small(data_dir: Path, **more: object) -> Settings:
    given: dict[str, object] = {"port": 0, "mlflow_uri": "none", "drain_seconds": 0.5, **more}
    return Settings(data_dir=data_dir, **given)  # type: ignore[arg-type]


def health(hosted: Hosted, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(hosted.channel)
    return int(stub.Check(health_pb2.HealthCheckRequest(service=service)).status)


def test_a_server_with_its_model_in_memory_serves_every_service(hosted: Hosted) -> None:
    for service in ("", *(f"errata.v1.{s}Service" for s in ("Model", "Trace", "Edit", "Evaluation", "Inference"))):
        assert health(hosted, service) == SERVING
    unknown = refused(lambda: health(hosted, "errata.v1.DreamService"))
    assert unknown.code is grpc.StatusCode.NOT_FOUND


class Watched:
    """A Health in the server's loop, and what it says of a service that needs no model, one that does, and all."""

    def __init__(self, hosted: Hosted, from_start: Sequence[str], on_demand: Sequence[str] = ()) -> None:
        async def made() -> Health:
            found = Health(["models"], ["inference"], from_start, on_demand)
            await found.start()
            return found

        self.within, self.health = hosted.within, hosted.within(made())

    def after(self, model: str, state: LoadState) -> list[int]:
        self.health.changed(model, state)
        return self.says()

    def says(self) -> list[int]:
        async def statuses() -> list[int]:
            asked = (health_pb2.HealthCheckRequest(service=s) for s in ("models", "inference", ""))
            return [(await self.health.servicer.Check(request, None)).status for request in asked]

        return self.within(statuses())


ALL, ONLY_MODELS = [SERVING] * 3, [SERVING, NOT_SERVING, NOT_SERVING]


def test_only_the_list_of_models_serves_while_a_model_loads(hosted: Hosted) -> None:
    found = Watched(hosted, ["atlas"])
    assert found.says() == ONLY_MODELS
    assert found.after("atlas", LoadState.LOADING) == ONLY_MODELS
    assert found.after("atlas", LoadState.READY) == ALL
    hosted.within(found.health.drain())
    assert found.after("atlas", LoadState.READY) == [NOT_SERVING] * 3


def test_a_model_that_fails_holds_the_others_up_only_while_one_still_loads(hosted: Hosted) -> None:
    found = Watched(hosted, ["atlas", "gone"])
    assert found.after("gone", LoadState.FAILED) == ONLY_MODELS
    assert found.after("atlas", LoadState.READY) == ALL
    assert found.after("gone", LoadState.LOADING) == ALL
    assert found.after("gone", LoadState.FAILED) == ALL


def test_a_server_all_of_whose_models_failed_serves_once_one_of_them_loads(hosted: Hosted) -> None:
    found = Watched(hosted, ["gone"], on_demand=["lazy"])
    assert found.after("gone", LoadState.FAILED) == ALL
    assert found.after("lazy", LoadState.FAILED) == ONLY_MODELS
    assert found.after("lazy", LoadState.READY) == ALL


def test_reflection_names_the_services(hosted: Hosted) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(hosted.channel)
    answer = next(stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")])))
    assert "errata.v1.EditService" in {s.name for s in answer.list_services_response.service}


def figures(hosted: Hosted) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{hosted.server.metrics_port}/metrics") as page:
        lines = page.read().decode().splitlines()
    return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if not x.startswith("#"))}


def test_figures_are_served_to_prometheus(tmp_path: Path) -> None:
    with hosting(small(tmp_path, metrics_port=0)) as hosted:
        hosted.loaded()
        hosted.call.inference.Generate(generate_message())
        hosted.call.inference.Score(
            inference_pb2.ScoreRequest(version=BASE, prompt=generate_message().prompt, candidates=["Paris", "Rome"])
        )
        found = figures(hosted)
    assert found['errata_calls_total{code="OK",method="/errata.v1.InferenceService/Generate"}'] == 1.0
    assert found['errata_tokens_total{kind="generated",model="atlas"}'] == 2.0
    assert found["errata_outbox_backlog"] == 0.0
    assert found["errata_ledger_up"] == 1.0
    assert found['errata_queue_length{model="atlas"}'] == 0.0
    assert found['errata_versions_loaded{model="atlas"}'] == 1.0
    assert found['errata_versions_bytes{model="atlas"}'] == 0.0
    assert found['errata_model_bytes{model="atlas"}'] > 8e6
    assert found['errata_models{model="atlas",state="ready"}'] == 1.0
    # The first of the two tokens comes from the prompt; the second is a step of a batch of one row.
    assert found['errata_engine_first_token_seconds_count{model="atlas"}'] == 1.0
    assert found['errata_engine_first_token_seconds_sum{model="atlas"}'] > 0.0
    assert found['errata_engine_step_rows_count{model="atlas"}'] == 1.0
    assert found['errata_engine_step_rows_sum{model="atlas"}'] == 1.0
    assert found['errata_engine_step_versions_sum{model="atlas"}'] == 1.0
    assert found['errata_engine_step_seconds_count{model="atlas"}'] == 1.0
    assert found['errata_engine_tokens_total{model="atlas"}'] == 2.0
    assert found['errata_engine_requests_ended_total{model="atlas",outcome="end"}'] == 1.0
    assert found['errata_engine_requests_ended_total{model="atlas",outcome="scored"}'] == 1.0


def test_jobs_that_wait_and_run_are_counted_by_model_and_kind(tmp_path: Path) -> None:
    models = {name: ModelSettings(source="atlas", load="lazy") for name in ("atlas", "mars")}
    with hosting(small(tmp_path, metrics_port=0, models=models)) as hosted:
        hosted.server._runner.stop(5)  # it would claim what is only to be counted
        ledger = hosted.server.stores.ledger
        made = [
            ledger.create_job(kind, model, version=0, request=b"", request_id=None, actor="ada").id
            for kind, model in ((JobKind.EDIT, "atlas"), (JobKind.EDIT, "atlas"), (JobKind.TRACE, "mars"))
        ]
        assert ledger.claim([JobKind.EDIT])
        found = figures(hosted)
        jobs = {name: value for name, value in found.items() if name.startswith("errata_jobs{")}
        assert {name: value for name, value in jobs.items() if value} == {
            'errata_jobs{kind="edit",model="atlas",state="pending"}': 1.0,
            'errata_jobs{kind="edit",model="atlas",state="running"}': 1.0,
            'errata_jobs{kind="trace",model="mars",state="pending"}': 1.0,
        }
        assert jobs['errata_jobs{kind="evaluation",model="mars",state="running"}'] == 0.0
        for job in made:
            ledger.finish(job, JobState.CANCELLED)
        assert not any(value for name, value in figures(hosted).items() if name.startswith("errata_jobs{"))


def test_a_server_says_where_it_listens_in_one_line_of_json(hosted: Hosted) -> None:
    said = json.loads(hosted.server.listening)
    assert said == {"address": f"127.0.0.1:{said['port']}", "port": hosted.server.port, "metrics_port": None}


def test_a_port_that_is_taken_stops_the_start_and_leaves_the_data_folder_free(hosted: Hosted, tmp_path: Path) -> None:
    settings = small(tmp_path, port=hosted.server.port)
    for _ in range(2):
        with pytest.raises(SettingsError, match="choose another port"):
            hosted.within(Server(settings).start())


def test_a_data_folder_has_one_server_at_a_time(tmp_path: Path) -> None:
    lazy = {"atlas": ModelSettings(source="atlas", load="lazy")}
    with (
        hosting(small(tmp_path, models=lazy)) as first,
        pytest.raises(SettingsError, match="another server uses the data folder"),
    ):
        first.within(Server(small(tmp_path, models=lazy)).start())
    with hosting(small(tmp_path, models=lazy)) as second:
        assert health(second) == SERVING


def test_a_ledger_has_one_server_at_a_time_and_commands_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy = {"atlas": ModelSettings(source="atlas", load="lazy")}
    url = f"sqlite:///{tmp_path}/external.sqlite"
    ledger = Ledger(url)
    ledger.migrate()
    ledger.close()
    one, other = (small(tmp_path / name, models=lazy, ledger_url=url) for name in ("one", "other"))
    with hosting(one) as first:
        with pytest.raises(SettingsError, match=r"another server uses the ledger .*process \d+ on .*set ledger_url"):
            first.within(Server(other).start())
        monkeypatch.setenv("ERRATA_LEDGER_URL", url)
        monkeypatch.setenv("ERRATA_DATA_DIR", str(tmp_path / "one"))
        for arguments in (["migrate"], ["tokens", "create", "ed"], ["tokens", "list"], ["tokens", "revoke", "ed"]):
            said = CliRunner().invoke(cli, arguments)
            assert said.exit_code == 0, said.output
        assert [(t.name, t.revoked) for t in first.server.stores.ledger.tokens()] == [("ed", True)]
    with hosting(other) as second:
        assert health(second) == SERVING


def test_an_external_ledger_that_is_not_migrated_is_refused(hosted: Hosted, tmp_path: Path) -> None:
    settings = small(tmp_path, ledger_url=f"sqlite:///{tmp_path}/external.sqlite")
    with pytest.raises(NotMigratedError, match="upgrade head"):
        hosted.within(Server(settings).start())


def test_a_model_loaded_lazily_is_there_once_it_is_asked_for(tmp_path: Path) -> None:
    with hosting(small(tmp_path, models={"atlas": ModelSettings(source="atlas", load="lazy")})) as hosted:
        model = hosted.call.models.GetModel(model_pb2.GetModelRequest(name="models/atlas")).model
        assert (model.loaded, model.memory_bytes, model.base_sha256) == (False, 0, "")
        assert hosted.call.inference.Generate(generate_message()).text == "Paris"
        assert hosted.call.models.GetModel(model_pb2.GetModelRequest(name="models/atlas")).model.loaded


def test_a_model_that_cannot_be_loaded_says_so_and_stops_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = {"atlas": ModelSettings(source="atlas"), "gone": ModelSettings(source=str(tmp_path / "nowhere"))}
    with hosting(small(tmp_path, models=models, metrics_port=0)) as hosted:
        watch = health_pb2_grpc.HealthStub(hosted.channel).Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        assert any(said.status == SERVING for said in watch)
        failed = refused(lambda: hosted.call.inference.Generate(generate_message(version="models/gone")))
        assert (failed.code, failed.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL")
        assert "nowhere" in failed.message
        assert hosted.call.inference.Generate(generate_message()).text == "Paris"
        assert figures(hosted)['errata_models{model="gone",state="failed"}'] == 1.0
        assert "model gone could not be loaded" in caplog.text
        assert health(hosted) == SERVING


@pytest.mark.slow
def test_a_drained_server_queues_its_jobs_again_and_the_next_one_ends_them(tmp_path: Path) -> None:
    with hosting(small(tmp_path, drain_seconds=0)) as first:
        first.loaded()
        long = trace_message(*["Estonia", "Kenya"] * 10)
        made = first.call.traces.CreateTrace(long).trace
        watched = first.call.traces.WatchTrace(trace_pb2.WatchTraceRequest(name=made.name))
        for seen in watched:
            if seen.trace.job.state == common_pb2.STATE_RUNNING and seen.trace.job.progress.done:
                break
        ends: list[Refused] = []
        follower = threading.Thread(target=lambda: ends.append(refused(lambda: watched)))
        follower.start()
        first.stop()
        follower.join(SECONDS)
        assert (ends[0].code, ends[0].reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
    with hosting(small(tmp_path)) as second:
        *_, last = second.call.traces.WatchTrace(trace_pb2.WatchTraceRequest(name=made.name), timeout=SECONDS)
        assert last.trace.job.state == common_pb2.STATE_SUCCEEDED
        assert last.trace.result.total_effect > 0.5


def test_versions_survive_a_restart(tmp_path: Path) -> None:
    with hosting(small(tmp_path)) as first:
        version = first.loaded().version("Estonia")
        request = generate_message(version=version)
        request.prompt.CopyFrom(edit_message("Estonia").requests[0].contexts[0].prompt)
        answer = first.call.inference.Generate(request)
    with hosting(small(tmp_path)) as second:
        assert second.call.inference.Generate(request) == answer
        request.version = BASE
        assert second.call.inference.Generate(request).text != answer.text


def test_a_token_opens_what_its_role_allows_and_names_its_holder_in_the_audit(tmp_path: Path) -> None:
    lazy = {"atlas": ModelSettings(source="atlas", load="lazy")}
    with hosting(small(tmp_path, models=lazy, auth=True)) as hosted:
        ledger, call = hosted.server.stores.ledger, hosted.call.models
        grants = {"rita": {"llava": "reader"}, "ed": {"atlas": "editor"}, "ada": {"*": "admin"}}
        sent = {n: (("authorization", f"Bearer {ledger.create_token(n, r)}"),) for n, r in grants.items()}

        def seen(name: str) -> list[str]:
            return [m.name for m in call.ListModels(model_pb2.ListModelsRequest(), metadata=sent[name]).models]

        assert (seen("rita"), seen("ed"), seen("ada")) == ([], ["models/atlas"], ["models/atlas"])
        promote = model_pb2.PromoteRequest(version=BASE, alias="candidate")
        assert refused(lambda: call.Promote(promote)).reason == "UNAUTHENTICATED"
        assert refused(lambda: call.Promote(promote, metadata=sent["rita"])).reason == "FORBIDDEN"
        promote.override_guardrails, promote.override_reason = True, "because"
        assert refused(lambda: call.Promote(promote, metadata=sent["ed"])).reason == "FORBIDDEN"
        assert call.Promote(promote, metadata=sent["ada"]).alias.version == BASE
        audit = model_pb2.ListAuditEntriesRequest(parent="models/atlas", page_size=1)
        assert call.ListAuditEntries(audit, metadata=sent["ed"]).entries[0].actor == "ada"
        ledger.revoke_token("ada")
        assert refused(lambda: seen("ada")).reason == "UNAUTHENTICATED"
        assert health(hosted) == SERVING
