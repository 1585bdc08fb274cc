"""What MLflow is told of a version that was made of versions."""

from publishing import TIME

from errata.server.ledger.rows import JobKind, JobRow, JobState
from errata.server.registry.record import record_of
from errata.v1 import common_pb2, evaluation_pb2, history_pb2


def test_a_derivations_record_says_what_it_was_made_of() -> None:
    asked = history_pb2.CreateDerivationRequest(
        description="a mistake",
        probes=[
            evaluation_pb2.Probe(
                metric=evaluation_pb2.METRIC_UNRELATED, prompt=common_pb2.Prompt(text="What is the capital of Norway?")
            )
        ],
    )
    done = history_pb2.Derivation(
        kind=history_pb2.DERIVATION_KIND_COMPOSE, sources=["models/tiny/versions/1", "models/tiny/versions/2"]
    )
    job = JobRow(
        id="d", kind=JobKind.DERIVATION, model="tiny", version=0, state=JobState.SUCCEEDED, stage="", done=0, total=0,
        request=asked.SerializeToString(), result=done.SerializeToString(), failure=None, made=3, attempt=1,
        cancel_requested=False, created_by="ada", create_time=TIME, start_time=None, end_time=None,
    )  # fmt: skip
    record = record_of(job)
    assert record.parameters == {"derivation": "compose", "sources": "models/tiny/versions/1, models/tiny/versions/2"}
    assert record.note == "a mistake"
    assert record.example == {"prompt": "What is the capital of Norway?"}
