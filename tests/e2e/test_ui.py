"""`python -m errata.server ui`: MLflow's pages, for this machine alone."""

import http.client
import json
import signal
import socket
import sys
from pathlib import Path

import pytest
from processes import SECONDS, Process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def asked(port: int, method: str = "GET", path: str = "/", body: str = "", **headers: str) -> int:
    """The status of an answer. `headers` may name another host than the one that is asked."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    connection.request(method, path, body or None, headers)
    status = connection.getresponse().status
    connection.close()
    return status


def test_mlflows_pages_answer_this_machine_by_its_names_only_until_they_are_interrupted(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = tmp_path / "data"
    data.mkdir()
    command = [sys.executable, "-m", "errata.server", "ui", "--port", str(port), "--data-dir", str(data)]
    process = Process(command, tmp_path / "ui.log", {})
    try:
        process.line(lambda line: f"Uvicorn running on http://127.0.0.1:{port}" in line)
        assert asked(port) == 200
        assert asked(port, Host=f"localhost:{port}") == 200
        # A page of another site whose name was pointed to this machine, and one that posts to it.
        assert asked(port, Host="evil.example") == 403
        search = ("POST", "/api/2.0/mlflow/experiments/search", json.dumps({"max_results": 1}))
        typed = {"Content-Type": "application/json"}
        assert asked(port, *search, **typed) == 200
        assert asked(port, *search, **typed, Origin="https://evil.example") == 403
        assert (data / "mlflow.sqlite").exists()
        process.child.send_signal(signal.SIGINT)
        process.ended()
        with pytest.raises(ConnectionRefusedError):
            asked(port)
    finally:
        if process.child.poll() is None:
            process.end()  # killed, it would leave its own child behind
