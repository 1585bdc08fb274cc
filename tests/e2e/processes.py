"""Real processes: an Errata server, an MLflow server. Waited for by what they say, never by the clock."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hosting import Stubs

from errata.server.__main__ import MLFLOW, mlflow_command

SECONDS = 240.0
ROOT = Path(__file__).parents[2]
PORTIONS = os.pathsep.join(str(ROOT / p) for p in ("editor", "proto", "server", "client"))


class Child(Protocol):
    """What is asked of a child: a `subprocess.Popen`, or a `forked.Fork`."""

    def poll(self) -> int | None: ...

    def wait(self, timeout: float) -> int: ...

    def send_signal(self, signal: int) -> None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class Process:
    """A child whose lines are read as they come. Its output goes to a file, too."""

    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str]) -> None:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("ERRATA_")}
        path = os.pathsep.join(filter(None, (PORTIONS, os.environ.get("PYTHONPATH", ""))))
        self._log = log.open("a")
        settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.child, self._output = self._start(command, {**inherited, **settings, **environment})
        self._seen, self._said = threading.Condition(), list[str]()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _start(self, command: list[str], environment: dict[str, str]) -> tuple[Child, IO[str]]:
        """A child of its own program, and what it says."""
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        assert child.stdout
        return child, child.stdout

    def _read(self) -> None:
        for line in self._output:
            self._log.write(line)
            with self._seen:
                self._said.append(line)
                self._seen.notify_all()
        self._log.flush()
        with self._seen:
            self._ended = True
            self._seen.notify_all()

    def line(self, wanted: Callable[[str], bool]) -> str:
        """The first line that is wanted, once it was said."""

        def found() -> str | None:
            return next((line for line in self._said if wanted(line)), None)

        with self._seen:
            assert self._seen.wait_for(lambda: found() or self._ended, SECONDS), "nothing was said in time"
            line = found()
            assert line, "the process ended:\n" + "".join(self._said[-40:])
            return line

    def lines(self, wanted: Callable[[str], bool], count: int) -> None:
        """Waits until `count` lines that are wanted were said."""

        def found() -> bool:
            return sum(map(wanted, self._said)) >= count

        with self._seen:
            assert self._seen.wait_for(lambda: found() or self._ended, SECONDS), "nothing was said in time"
            assert found(), "the process ended:\n" + "".join(self._said[-40:])

    @property
    def said(self) -> str:
        with self._seen:
            return "".join(self._said)

    def end(self) -> int:
        """Asks it to end; its exit status."""
        self.child.terminate()
        return self.ended()

    def ended(self) -> int:
        """Its exit status, once it has ended."""
        status = self.child.wait(SECONDS)
        self._reader.join(SECONDS)
        self._output.close()
        self._log.close()
        return status


class ServerProcess(Process):
    """`python -m errata.server` on a data folder, and a channel to it."""

    def __init__(self, data: Path, *, mlflow: str | None = None, fault: str = "") -> None:
        environment = {"ERRATA_REQUESTS_PER_MINUTE": "1000000", "ERRATA_DRAIN_SECONDS": "5"}
        environment |= {"ERRATA_MLFLOW_URI": mlflow} if mlflow else {}
        environment |= {"ERRATA_FAULT": fault} if fault else {}
        command = [sys.executable, "-m", "errata.server", "--data-dir", str(data), "--port", "0"]
        data.mkdir(parents=True, exist_ok=True)
        super().__init__(command, data / "server.log", environment)

    def connected(self) -> "ServerProcess":
        """The server, once its port is open."""
        where = json.loads(self.line(lambda line: line.startswith('{"address"')))
        self.channel = grpc.insecure_channel(where["address"], options=[("grpc.max_receive_message_length", -1)])
        self.call = Stubs(self.channel)
        return self

    def serving(self) -> "ServerProcess":
        """The server, once its model is loaded."""
        self.connected()
        watch = health_pb2_grpc.HealthStub(self.channel).Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        for said in watch:
            if said.status == health_pb2.HealthCheckResponse.SERVING:
                break
        watch.cancel()
        return self


@contextmanager
def server(
    data: Path, *, mlflow: str | None = None, kind: type[ServerProcess] = ServerProcess
) -> Iterator[ServerProcess]:
    """A server that serves; drained on the way out, and then its exit status is 0."""
    process = kind(data, mlflow=mlflow)
    try:
        yield process.serving()
        process.channel.close()
        assert process.end() == 0, process.said[-4000:]
    finally:
        if process.child.poll() is None:
            process.child.kill()
            process.ended()


class MlflowProcess(Process):
    """`mlflow server`, as the command `ui` starts it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.url = f"http://127.0.0.1:{port}"
        command = mlflow_command(f"sqlite:///{folder}/mlflow.sqlite", str(folder / "mlruns"), port)
        super().__init__(command, folder / "mlflow.log", MLFLOW)


@contextmanager
def mlflow_server(folder: Path) -> Iterator[MlflowProcess]:
    """An MLflow server that answers."""
    process = MlflowProcess(folder)
    try:
        process.line(lambda line: "Uvicorn running on" in line)
        yield process
    finally:
        process.end()
