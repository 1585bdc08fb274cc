"""The whole of it: a server process, an MLflow server, gRPC; and what MLflow's own pages show of it."""

import shutil
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hosting import BASE, edit_message, evaluation_message, trace_message
from processes import SECONDS, MlflowProcess, ServerProcess, mlflow_server, server

from errata.v1 import common_pb2, edit_pb2, evaluation_pb2, inference_pb2, model_pb2, trace_pb2

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

COUNTRIES = ("Estonia", "Latvia", "Lithuania")
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowProcess]:
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as running:
        yield running


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, pages: MlflowProcess) -> Iterator[ServerProcess]:
    with server(tmp_path_factory.mktemp("data"), mlflow=pages.url) as found:
        yield found


@pytest.fixture(scope="module")
def traced(running: ServerProcess) -> str:
    """A trace that has found where Atlas keeps its facts."""
    made = running.call.traces.CreateTrace(trace_message(*COUNTRIES)).trace
    *_, last = running.call.traces.WatchTrace(trace_pb2.WatchTraceRequest(name=made.name), timeout=SECONDS)
    assert last.trace.job.state == common_pb2.STATE_SUCCEEDED, last.trace.job.error
    return made.name


@pytest.fixture(scope="module")
def versions(running: ServerProcess, traced: str) -> tuple[str, ...]:
    """Three versions, each built on the one before; the first edited where the trace says."""
    made: list[str] = []
    for country in COUNTRIES:
        request = edit_message(country, parent=made[-1] if made else BASE, layers=None if not made else (1,))
        if not made:
            request.layers.trace = traced
        edit = running.call.edits.CreateEdit(request).edit
        *_, last = running.call.edits.WatchEdit(edit_pb2.WatchEditRequest(name=edit.name), timeout=SECONDS)
        assert last.edit.job.state == common_pb2.STATE_SUCCEEDED, last.edit.job.error
        made.append(last.edit.version)
    return tuple(made)


def asked(country: str, version: str) -> inference_pb2.GenerateRequest:
    """The question that an edit of a country's outdated fact answers anew."""
    return inference_pb2.GenerateRequest(
        version=version, prompt=edit_message(country).requests[0].contexts[0].prompt, max_new_tokens=8
    )


def answer(running: ServerProcess, country: str, version: str) -> str:
    return str(running.call.inference.Generate(asked(country, version), timeout=SECONDS).text)


def test_a_fact_is_traced_corrected_judged_promoted_served_and_rolled_back(
    running: ServerProcess, versions: tuple[str, ...]
) -> None:
    targets = {c: edit_message(c).requests[0].target for c in COUNTRIES}
    request = evaluation_message(versions[-1], "France", "Japan", baseline=BASE)
    evaluation = running.call.evaluations.CreateEvaluation(request).evaluation
    *_, judged = running.call.evaluations.WatchEvaluation(
        evaluation_pb2.WatchEvaluationRequest(name=evaluation.name), timeout=SECONDS
    )
    assert [r.after for r in judged.evaluation.results] == ["Paris", "Tokyo"]

    old = answer(running, "Latvia", "models/atlas")
    running.call.models.Promote(model_pb2.PromoteRequest(version=versions[-1], alias="champion"))
    promoted = running.call.inference.Generate(asked("Latvia", "models/atlas"))
    assert (promoted.version, promoted.text) == (versions[-1], targets["Latvia"])

    with ThreadPoolExecutor(3) as at_once:
        said = list(at_once.map(lambda v: answer(running, "Latvia", v), (BASE, *versions[:2])))
    assert said == [old, old, targets["Latvia"]]

    running.call.models.Rollback(model_pb2.RollbackRequest(name="models/atlas/aliases/champion"))
    rolled = running.call.inference.Generate(asked("Latvia", "models/atlas"))
    assert (rolled.version, rolled.text) == (BASE, old)


def test_every_answer_under_load_is_its_versions_own(
    running: ServerProcess, versions: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    served = (BASE, *versions)
    alone = {(v, c): answer(running, c, v) for v in served for c in COUNTRIES}
    assert len({tuple(alone[v, c] for c in COUNTRIES) for v in served}) == 4
    requests = {key: asked(key[1], key[0]) for key in alone}
    mixed, mixed_rate = _load(running, 200, [(v, c) for c in COUNTRIES for v in served], requests, alone)
    base, base_rate = _load(running, 50, [(BASE, c) for c in COUNTRIES], requests, alone)
    with capsys.disabled():
        for name, times, rate in (("four versions", mixed, mixed_rate), ("the base alone", base, base_rate)):
            cuts = statistics.quantiles(times, n=100)
            sys.stdout.write(
                f"\n{name}: {len(times)} requests, {rate:.0f}/s, "
                f"p50 {1000 * cuts[49]:.0f} ms, p95 {1000 * cuts[94]:.0f} ms, p99 {1000 * cuts[98]:.0f} ms\n"
            )


def _load(
    running: ServerProcess,
    each: int,
    keys: list[tuple[str, str]],
    requests: dict[tuple[str, str], inference_pb2.GenerateRequest],
    alone: dict[tuple[str, str], str],
) -> tuple[list[float], float]:
    """8 clients make `each` requests, all at once; seconds of each request, and requests a second."""
    together = threading.Barrier(8)

    def client(n: int) -> list[float]:
        times = []
        together.wait()
        for i in range(each):
            key = keys[(n + i) % len(keys)]
            began = time.perf_counter()
            said = running.call.inference.Generate(requests[key], timeout=SECONDS)
            times.append(time.perf_counter() - began)
            assert (said.version, said.text) == (key[0], alone[key])
        return times

    began = time.perf_counter()
    with ThreadPoolExecutor(8) as clients:
        times = [seconds for asked in clients.map(client, range(8)) for seconds in asked]
    return times, len(times) / (time.perf_counter() - began)


def published(running: ServerProcess, name: str) -> model_pb2.Version:
    """A version, once it is in MLflow. Asked anew each time the server says that one was published."""
    count = 0

    def said(line: str) -> bool:
        return "a version was published" in line or "a version was found in MLflow" in line

    while True:
        version = running.call.models.GetVersion(model_pb2.GetVersionRequest(name=name)).version
        if version.publish_state == model_pb2.PUBLISH_STATE_PUBLISHED:
            return version
        count += 1
        running.lines(said, count)


@pytest.mark.skipif(CHROMIUM is None, reason="MLflow's pages are looked at in Chromium: there is no `chromium` on PATH")
def test_mlflows_pages_show_the_versions_the_heatmap_and_before_and_after(
    running: ServerProcess, versions: tuple[str, ...], pages: MlflowProcess, output: Path
) -> None:
    from mlflow import MlflowClient
    from playwright.sync_api import expect, sync_playwright

    made = [published(running, v) for v in versions]
    client = MlflowClient(pages.url)
    experiment = client.get_run(made[0].mlflow_run_id).info.experiment_id
    run = f"{pages.url}/#/experiments/{experiment}/runs/{made[0].mlflow_run_id}"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1600, "height": 1500})
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        page.goto(f"{pages.url}/#/models/atlas")
        for version in made:
            expect(page.get_by_text(f"Version {version.mlflow_version}", exact=True).first).to_be_visible()
        page.screenshot(path=output / "versions.png")
        page.goto(f"{run}/artifacts")
        page.get_by_text("causal_trace.png", exact=True).first.click()
        expect(page.get_by_role("img", name="causal_trace.png")).to_be_visible()
        page.screenshot(path=output / "heatmap.png")
        page.get_by_text("before_after.html", exact=True).first.click()
        frame = page.frame_locator("iframe")
        expect(frame.get_by_text(made[0].facts[0].partition(" → ")[2]).first).to_be_visible()
        page.screenshot(path=output / "before_after.png")
        browser.close()
