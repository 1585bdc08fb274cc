"""SIGTERM while a server answers and edits: what it has taken is ended, what comes later is refused, nothing is cut."""

import json
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from hosting import Refused, Stubs, edit_message, generate_message
from processes import SECONDS, Process

from errata.server.ledger.ledger import Ledger
from errata.v1 import common_pb2, edit_pb2

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

QUESTIONS = 100


def test_a_server_told_to_end_answers_what_it_has_taken_and_ends_its_edit_first(tmp_path: Path) -> None:
    settings = {"ERRATA_DRAIN_SECONDS": "200", "ERRATA_MLFLOW_URI": "none"}
    command = [sys.executable, "-m", "errata.server", "--data-dir", str(tmp_path / "data"), "--port", "0"]
    process = Process(command, tmp_path / "server.log", settings)
    try:
        address = json.loads(process.line(lambda line: line.startswith('{"address"')))["address"]
        with grpc.insecure_channel(address) as channel:
            call = Stubs(channel)
            question = generate_message("France")
            assert call.inference.Generate(question, timeout=SECONDS).text == "Paris"  # Atlas is in memory
            edit = call.edits.CreateEdit(edit_message("Estonia", contexts=8, steps=100)).edit
            watch = call.edits.WatchEdit(edit_pb2.WatchEditRequest(name=edit.name), timeout=SECONDS)
            assert any(seen.edit.job.state == common_pb2.STATE_RUNNING for seen in watch)
            asked = [call.inference.Generate.future(question, timeout=SECONDS) for _ in range(QUESTIONS)]
            assert asked[0].result().text == "Paris"
            process.child.terminate()
            ends = Counter(map(_end, asked))
            *_, last = watch
        assert process.ended() == 0, process.said[-4000:]
    finally:
        if process.child.poll() is None:
            process.child.kill()
            process.ended()
    assert set(ends) <= {"Paris", "UNAVAILABLE DRAINING"}
    assert last.edit.job.state == common_pb2.STATE_SUCCEEDED
    _, _, drained = process.said.partition('"message": "shutting down"')
    assert '"code": "OK"' in drained, "every question was answered before the signal came: ask more"
    assert f"{edit.name}: succeeded" in drained, "the edit had ended before the signal came: make it longer"
    with closing(Ledger(f"sqlite:///{tmp_path}/data/ledger.sqlite")) as ledger:
        assert ledger.running() == []
        assert [version.number for version in ledger.versions("atlas", None, 10)] == [1, 0]


def _end(asked: grpc.Future) -> str:
    """The answer, or how it was refused."""
    try:
        return str(asked.result().text)
    except grpc.RpcError as error:
        found = Refused(error)
        return f"{found.code.name} {found.reason or found.message}"
