"""What the ledger's tests are made with: a clock, versions, a PostgreSQL of their own."""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Protocol

import psycopg
from sqlalchemy import make_url

from errata.server.ledger.rows import NewVersion, VersionRow

BASE = "b" * 64


@dataclass
class Clock:
    """Stands still until told."""

    now: datetime = datetime(2030, 1, 2, 3, 4, 5, 678901, UTC)

    def __call__(self) -> datetime:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class Edit(Protocol):
    """Queues an edit and commits it."""

    def __call__(self, parent: int = 0, *, rejections: tuple[str, ...] = (), publish: bool = True) -> VersionRow: ...


def new_version(rejections: tuple[str, ...] = ()) -> NewVersion:
    return NewVersion(
        base_sha256=BASE,
        delta_sha256="d" * 64,
        delta_bytes=5 * 2**30,
        layers=(0, 2),
        facts=("Kazakhstan: capital → Astana",),
        scores='[{"metric": "METRIC_EFFICACY"}]',
        rejections=rejections,
    )


@dataclass
class Postgres:
    """A server that listens on a socket in `folder` and nowhere else."""

    folder: Path
    binaries: Path
    numbers: Iterator[int] = field(default_factory=count)

    def start(self) -> None:
        """Starts it, again if need be."""
        if not Path(self._data).exists():
            self._run("initdb", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--no-sync", "-D", self._data)
        options = f"-c listen_addresses= -c unix_socket_directories={self.folder} -c fsync=off"
        self._run("pg_ctl", "-D", self._data, "-l", f"{self.folder}/log", "-w", "-o", options, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "-w", "stop")

    def new_database(self, copied: str = "template1") -> str:
        name = f"ledger_{next(self.numbers)}"
        self._execute(f"CREATE DATABASE {name} TEMPLATE {copied}")
        return f"postgresql+psycopg://postgres@/{name}?host={self.folder}"

    def drop_database(self, url: str) -> None:
        self._execute(f"DROP DATABASE {make_url(url).database}")

    def _execute(self, statement: str) -> None:
        with psycopg.connect(host=str(self.folder), user="postgres", dbname="postgres", autocommit=True) as connection:
            connection.execute(statement)

    @property
    def _data(self) -> str:
        return f"{self.folder}/data"

    def _run(self, program: str, *arguments: str) -> None:
        # PostgreSQL refuses to run as root.
        user = "postgres" if os.geteuid() == 0 else None
        subprocess.run(
            [self.binaries / program, *arguments],
            check=True,
            user=user,
            group=user,
            extra_groups=[] if user else None,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
