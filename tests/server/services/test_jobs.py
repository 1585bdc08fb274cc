"""Traces, edits and evaluations over the wire: asked for, looked up, watched, cancelled."""

import grpc
import pytest
from hosting import BASE, SECONDS, Hosted, edit_message, evaluation_message, refused, trace_message

from errata.v1 import common_pb2, edit_pb2, evaluation_pb2, inference_pb2, model_pb2, trace_pb2

ATLAS = "models/atlas"


def test_a_trace_is_watched_to_its_end_and_finds_atlas_early_mlp(hosted: Hosted) -> None:
    made = hosted.call.traces.CreateTrace(trace_message("Estonia", "Kenya")).trace
    assert (made.version, made.questions, made.window) == (BASE, 2, 1)
    seen = [
        w.trace for w in hosted.call.traces.WatchTrace(trace_pb2.WatchTraceRequest(name=made.name), timeout=SECONDS)
    ]
    assert seen[-1].job.state == common_pb2.STATE_SUCCEEDED, seen[-1].job.error
    assert all(t.job.state in (common_pb2.STATE_PENDING, common_pb2.STATE_RUNNING) for t in seen[:-1])
    assert seen[-1].result.total_effect > 0.5
    assert list(seen[-1].result.auto_layers) == [1]
    assert hosted.call.traces.GetTrace(trace_pb2.GetTraceRequest(name=made.name)).trace == seen[-1]


def test_an_edit_is_watched_through_its_stages_and_names_its_version(hosted: Hosted) -> None:
    made = hosted.call.edits.CreateEdit(edit_message("Estonia")).edit
    assert (made.parent, made.requests, made.version) == (BASE, 1, "")
    assert made.job.state == common_pb2.STATE_PENDING
    assert made.job.created_by == "anonymous"
    seen = [w.edit for w in hosted.call.edits.WatchEdit(edit_pb2.WatchEditRequest(name=made.name), timeout=SECONDS)]
    last = seen[-1]
    assert last.job.state == common_pb2.STATE_SUCCEEDED, last.job.error
    assert last.version.startswith("models/atlas/versions/")
    assert (last.settings.method, list(last.layers)) == (edit_pb2.METHOD_MULTEDIT, [1])
    assert last.outcomes[0].target == edit_message("Estonia").requests[0].target
    assert last.scores[0].after == 1.0


def test_a_job_that_has_ended_is_watched_in_one_message(hosted: Hosted) -> None:
    edit = hosted.edit(edit_message("Estonia"))
    seen = list(hosted.call.edits.WatchEdit(edit_pb2.WatchEditRequest(name=edit.name)))
    assert [w.edit for w in seen] == [edit]


def test_an_evaluation_compares_a_version_with_its_parent(hosted: Hosted) -> None:
    version = hosted.version("Estonia")
    made = hosted.call.evaluations.CreateEvaluation(evaluation_message(version, "France", "Japan")).evaluation
    *_, last = hosted.call.evaluations.WatchEvaluation(
        evaluation_pb2.WatchEvaluationRequest(name=made.name), timeout=SECONDS
    )
    done = last.evaluation
    assert done.job.state == common_pb2.STATE_SUCCEEDED, done.job.error
    assert (done.version, done.baseline) == (version, BASE)
    assert [r.before for r in done.results] == ["Paris", "Tokyo"]
    assert done.scores[0].n == 2


def test_lists_show_what_was_asked_and_leave_results_out(hosted: Hosted) -> None:
    edit = hosted.edit(edit_message("Estonia"))
    trace = hosted.call.traces.CreateTrace(trace_message("Estonia", window=2)).trace
    evaluation = hosted.call.evaluations.CreateEvaluation(evaluation_message(edit.version)).evaluation
    edits = hosted.call.edits.ListEdits(edit_pb2.ListEditsRequest(parent=ATLAS, page_size=1))
    traces = hosted.call.traces.ListTraces(trace_pb2.ListTracesRequest(parent=ATLAS, page_size=1))
    evaluations = hosted.call.evaluations.ListEvaluations(
        evaluation_pb2.ListEvaluationsRequest(parent=ATLAS, page_size=1)
    )
    listed = edits.edits[0]
    assert (listed.name, listed.parent, listed.version) == (edit.name, BASE, edit.version)
    assert list(listed.facts) == list(edit.facts) != []
    assert not listed.outcomes
    assert edits.next_page_token
    assert (traces.traces[0].name, traces.traces[0].questions, traces.traces[0].window) == (trace.name, 1, 2)
    assert (evaluations.evaluations[0].name, evaluations.evaluations[0].baseline) == (evaluation.name, BASE)


@pytest.mark.slow
def test_a_list_leaves_nothing_out_of_ended_work_but_outcomes_and_results(hosted: Hosted) -> None:
    asked = edit_message("Estonia", steps=1)
    asked.guardrails.add(metric=evaluation_pb2.METRIC_EFFICACY, least=1.0)
    edit = hosted.edit(asked)
    request = evaluation_message(edit.version)
    request.guardrails.add(metric=evaluation_pb2.METRIC_OTHER_SUBJECTS, least=1.0)
    request.probes[0].expected = "Atlantis"
    evaluation = _judged(hosted, hosted.call.evaluations.CreateEvaluation(request).evaluation.name)
    made = hosted.call.traces.CreateTrace(trace_message("Estonia")).trace
    *_, traced = hosted.call.traces.WatchTrace(trace_pb2.WatchTraceRequest(name=made.name), timeout=SECONDS)
    edits = hosted.call.edits.ListEdits(edit_pb2.ListEditsRequest(parent=ATLAS, page_size=1)).edits
    evaluations = hosted.call.evaluations.ListEvaluations(
        evaluation_pb2.ListEvaluationsRequest(parent=ATLAS, page_size=1)
    ).evaluations
    traces = hosted.call.traces.ListTraces(trace_pb2.ListTracesRequest(parent=ATLAS, page_size=1)).traces
    assert (len(edit.rejections), len(evaluation.rejections)) == (1, 1)
    assert edit.outcomes
    assert evaluation.results
    assert traced.trace.HasField("result")
    edit.ClearField("outcomes")
    evaluation.ClearField("results")
    traced.trace.ClearField("result")
    assert [*edits, *evaluations, *traces] == [edit, evaluation, traced.trace]


def _judged(hosted: Hosted, name: str) -> evaluation_pb2.Evaluation:
    watch = evaluation_pb2.WatchEvaluationRequest(name=name)
    *_, last = hosted.call.evaluations.WatchEvaluation(watch, timeout=SECONDS)
    return last.evaluation


def test_the_same_request_id_returns_the_first_edit(hosted: Hosted) -> None:
    request = edit_message("Estonia", request_id="once-and-only-once")
    first = hosted.call.edits.CreateEdit(request).edit
    again = hosted.call.edits.CreateEdit(request).edit
    assert again.name == first.name
    request.requests[0].target = "Narva"
    other = refused(lambda: hosted.call.edits.CreateEdit(request))
    assert (other.code, other.reason, other.field) == (
        grpc.StatusCode.ALREADY_EXISTS,
        "REQUEST_ID_REUSED",
        "request_id",
    )


def test_what_is_only_validated_has_no_name_and_is_not_queued(hosted: Hosted) -> None:
    def newest() -> list[str]:
        return [e.name for e in hosted.call.edits.ListEdits(edit_pb2.ListEditsRequest(parent=ATLAS, page_size=1)).edits]

    before = newest()
    edit = hosted.call.edits.CreateEdit(edit_message("Estonia", validate_only=True)).edit
    assert (edit.name, edit.parent, edit.requests) == ("", BASE, 1)
    trace = hosted.call.traces.CreateTrace(trace_message(validate_only=True)).trace
    assert (trace.name, trace.version) == ("", BASE)
    request = evaluation_message(BASE, baseline=BASE, validate_only=True)
    assert hosted.call.evaluations.CreateEvaluation(request).evaluation.baseline == BASE
    assert newest() == before


def test_a_running_trace_is_cancelled_and_its_watchers_hear_of_it(hosted: Hosted) -> None:
    made = hosted.call.traces.CreateTrace(_long_trace()).trace
    watched = hosted.call.traces.WatchTrace(trace_pb2.WatchTraceRequest(name=made.name), timeout=SECONDS)
    next(w for w in watched if w.trace.job.progress.stage == "tracing")
    hosted.call.traces.CancelTrace(trace_pb2.CancelTraceRequest(name=made.name))
    *_, last = watched
    assert last.trace.job.state == common_pb2.STATE_CANCELLED
    assert not last.trace.HasField("result")
    again = hosted.call.traces.CancelTrace(trace_pb2.CancelTraceRequest(name=made.name)).trace
    assert again == last.trace


def _long_trace() -> trace_pb2.CreateTraceRequest:
    message = trace_message("Estonia")
    message.questions.extend([message.questions[0]] * 100)
    return message


@pytest.mark.parametrize("stage", ["values", "evaluate"])
def test_an_edit_is_cancelled_in_any_stage_and_leaves_no_version(hosted: Hosted, stage: str) -> None:
    slow = stage == "values"
    request = edit_message("Estonia", steps=1000 if slow else 1, contexts=8 if slow else 1)
    request.requests[0].target = "Ouagadougou Zanzibar Vaduz"
    for context in request.requests[0].contexts:
        context.ClearField("answer")
    request.probes.extend([evaluation_message(BASE, shown=False).probes[0]] * 500)
    edit = hosted.call.edits.CreateEdit(request).edit
    watched = hosted.call.edits.WatchEdit(edit_pb2.WatchEditRequest(name=edit.name), timeout=SECONDS)
    next(w for w in watched if w.edit.job.progress.stage == stage)
    hosted.call.edits.CancelEdit(edit_pb2.CancelEditRequest(name=edit.name))
    *_, last = watched
    assert (last.edit.job.state, last.edit.version) == (common_pb2.STATE_CANCELLED, "")


def test_a_running_evaluation_is_cancelled(hosted: Hosted) -> None:
    request = evaluation_message(BASE, baseline=BASE, shown=False)
    request.probes.extend([request.probes[0]] * 1000)
    made = hosted.call.evaluations.CreateEvaluation(request).evaluation
    watch = evaluation_pb2.WatchEvaluationRequest(name=made.name)
    watched = hosted.call.evaluations.WatchEvaluation(watch, timeout=SECONDS)
    next(w for w in watched if w.evaluation.job.progress.stage == "evaluate")
    hosted.call.evaluations.CancelEvaluation(evaluation_pb2.CancelEvaluationRequest(name=made.name))
    *_, last = watched
    assert (last.evaluation.job.state, len(last.evaluation.results)) == (common_pb2.STATE_CANCELLED, 0)


def test_a_watcher_whose_deadline_passes_leaves_the_job_alone(hosted: Hosted) -> None:
    made = hosted.call.traces.CreateTrace(_long_trace()).trace
    late = refused(lambda: hosted.call.traces.WatchTrace(trace_pb2.WatchTraceRequest(name=made.name), timeout=0.2))
    assert late.code is grpc.StatusCode.DEADLINE_EXCEEDED
    cancelled = hosted.call.traces.CancelTrace(trace_pb2.CancelTraceRequest(name=made.name)).trace
    assert cancelled.job.state in (common_pb2.STATE_PENDING, common_pb2.STATE_RUNNING)


def test_a_watcher_who_leaves_is_forgotten(hosted: Hosted) -> None:
    made = hosted.call.traces.CreateTrace(_long_trace()).trace
    watched = hosted.call.traces.WatchTrace(trace_pb2.WatchTraceRequest(name=made.name))
    next(watched)
    assert hosted.server.events.watched == 1
    watched.cancel()
    hosted.within(hosted.server.gate.idle())
    assert hosted.server.events.watched == 0
    hosted.call.traces.CancelTrace(trace_pb2.CancelTraceRequest(name=made.name))
    list(hosted.call.traces.WatchTrace(trace_pb2.WatchTraceRequest(name=made.name), timeout=SECONDS))


@pytest.mark.slow
def test_an_edit_takes_the_layers_that_a_trace_found(hosted: Hosted) -> None:
    trace = hosted.call.traces.CreateTrace(trace_message("Estonia", "Kenya")).trace
    request = edit_message("Estonia", layers=None)
    request.layers.trace = trace.name
    list(hosted.call.traces.WatchTrace(trace_pb2.WatchTraceRequest(name=trace.name), timeout=SECONDS))
    assert list(hosted.edit(request).layers) == [1]


@pytest.mark.parametrize("baseline", ["models/atlas/versions/99", "models/atlas/aliases/nobody"])
def test_an_evaluation_needs_a_baseline_that_exists(hosted: Hosted, baseline: str) -> None:
    unknown = refused(lambda: hosted.call.evaluations.CreateEvaluation(evaluation_message(BASE, baseline=baseline)))
    assert unknown.code is grpc.StatusCode.NOT_FOUND


def test_the_base_has_nothing_to_be_compared_with(hosted: Hosted) -> None:
    alone = refused(lambda: hosted.call.evaluations.CreateEvaluation(evaluation_message(BASE)))
    assert (alone.code, alone.reason, alone.field) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "MISSING_FIELD",
        "baseline",
    )


def test_an_edit_that_fails_says_why_and_changes_nothing(hosted: Hosted) -> None:
    before = hosted.call.models.ListVersions(model_pb2.ListVersionsRequest(parent=ATLAS, page_size=1)).versions
    request = edit_message("Estonia")
    asked = request.requests[0]
    believed = hosted.call.inference.Generate(
        inference_pb2.GenerateRequest(version=BASE, prompt=asked.contexts[0].prompt)
    )
    asked.target = believed.text
    for context in asked.contexts:
        context.ClearField("answer")
    failed = hosted.edit(request)
    assert failed.job.state == common_pb2.STATE_FAILED
    assert (failed.job.error.reason, failed.version) == ("NO_OP_EDIT", "")
    after = hosted.call.models.ListVersions(model_pb2.ListVersionsRequest(parent=ATLAS, page_size=1)).versions
    assert after == before
