"""The server as a whole: health, reflection, figures, what it refuses to start with, and how it ends."""

import json
import threading
import urllib.request
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hosting import BASE, SECONDS, Hosted, Refused, edit_message, generate_message, hosting, refused, trace_message

from errata.server.app import Server
from errata.server.errors import NotMigratedError
from errata.server.health import Health
from errata.server.models import LoadState
from errata.server.settings import ModelSettings, Settings, SettingsError
from errata.v1 import common_pb2, model_pb2, trace_pb2

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


def test_only_the_list_of_models_serves_while_a_model_loads(hosted: Hosted) -> None:
    async def made() -> Health:
        found = Health(["models"], ["inference"], ["atlas"])
        await found.start()
        return found

    async def statuses() -> list[int]:
        asked = (health_pb2.HealthCheckRequest(service=s) for s in ("models", "inference", ""))
        return [(await found.servicer.Check(request, None)).status for request in asked]

    found = hosted.within(made())
    assert hosted.within(statuses()) == [SERVING, NOT_SERVING, NOT_SERVING]
    found.changed("atlas", LoadState.LOADING)
    assert hosted.within(statuses()) == [SERVING, NOT_SERVING, NOT_SERVING]
    found.changed("atlas", LoadState.READY)
    assert hosted.within(statuses()) == [SERVING, SERVING, SERVING]
    hosted.within(found.drain())
    found.changed("atlas", LoadState.READY)
    assert hosted.within(statuses()) == [NOT_SERVING, NOT_SERVING, NOT_SERVING]


def test_reflection_names_the_services(hosted: Hosted) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(hosted.channel)
    answer = next(stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")])))
    assert "errata.v1.EditService" in {s.name for s in answer.list_services_response.service}


def test_figures_are_served_to_prometheus(tmp_path: Path) -> None:
    with hosting(small(tmp_path, metrics_port=0)) as hosted:
        hosted.loaded()
        hosted.call.inference.Generate(generate_message())
        with urllib.request.urlopen(f"http://127.0.0.1:{hosted.server.metrics_port}/metrics") as page:
            text = page.read().decode()
    assert 'errata_calls_total{code="OK",method="/errata.v1.InferenceService/Generate"} 1.0' in text
    assert 'errata_queue_length{model="atlas"} 0.0' in text
    assert "errata_outbox_backlog 0.0" in text
    assert 'errata_tokens_total{kind="generated",model="atlas"} 2.0' in text


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


def test_a_model_that_cannot_be_loaded_says_so_and_stops_no_other(tmp_path: Path) -> None:
    models = {
        "atlas": ModelSettings(source="atlas"),
        "gone": ModelSettings(source=str(tmp_path / "nowhere"), load="lazy"),
    }
    with hosting(small(tmp_path, models=models)) as hosted:
        failed = refused(lambda: hosted.call.inference.Generate(generate_message(version="models/gone")))
        assert (failed.code, failed.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL")
        assert hosted.call.inference.Generate(generate_message()).text == "Paris"


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
