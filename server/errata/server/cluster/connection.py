"""A Ray cluster to work on: one that runs already, or one on this machine for as long as it is needed."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray._private.services import get_ray_address_from_environment
from ray.exceptions import AuthenticationError, RayError

from errata.server.cluster.errors import ClusterError

_SECONDS = 10.0
"""That the cluster's head may take to answer."""

LOCAL = "local"
"""The address of a cluster that is started here, and ends with its user."""

AUTO = "auto"
"""That of the cluster which this machine is part of, or which RAY_ADDRESS names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSettings:
    """Where the cluster is: `AUTO`, HOST:PORT of its head, or `LOCAL`.

    The rest is for a local one: `cpus` that it may give to workers (None: those there are), bytes of its object store
    (None: Ray's default, a third of the memory), the folder of its sockets and logs (None: Ray's own).
    """

    address: str = LOCAL
    cpus: int | None = None
    object_store_bytes: int | None = None
    folder: Path | None = None


@contextmanager
def connected(settings: ClusterSettings) -> Iterator[None]:
    """While open, this process is a driver of the cluster. Its workers end with it.

    Raises ClusterError where there is no cluster, or this process has one already.
    """
    if ray.is_initialized():
        raise ClusterError("this process is connected to a cluster already; end that connection first")
    # Ray would report to its makers what it is used for, unless whoever runs it says otherwise.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if settings.address == LOCAL:
            _start(settings)
        else:
            ray.init(address=_looked_for(settings.address), logging_level=logging.WARNING, log_to_driver=False)
    except (RayError, RuntimeError, ValueError, OSError) as error:
        if ray.is_initialized():
            ray.shutdown()
        raise _refused(settings.address, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _refused(address: str, error: Exception) -> ClusterError:
    if isinstance(error, AuthenticationError):
        return ClusterError(f"the cluster at {address!r} asks for its token; give it to this machine (RAY_AUTH_TOKEN)")
    said = " ".join(str(error).split())
    if "Version mismatch" in said:
        return ClusterError(f"the cluster at {address!r} has another release: {said}; all nodes need the same")
    # A wrong token also looks like a cluster that is not there.
    return ClusterError(
        f"there is no Ray cluster at {address!r}: {said}; check the address, and give this machine "
        "the cluster's token (RAY_AUTH_TOKEN) if it asks for one"
    )


def _looked_for(address: str) -> str:
    """HOST:PORT of a head that listens. Raises ClusterError for no address, OSError where nobody listens.

    Ray itself would try a head that is gone for minutes, and end the process then; `auto` may name one, too.
    """
    found = get_ray_address_from_environment(AUTO, None) if address == AUTO else address
    if found.startswith("ray://"):
        raise ClusterError("Ray's client cannot be used; run this on a node of the cluster, with auto or HOST:PORT")
    host, _, port = found.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ClusterError(f"{found!r} is no cluster; give auto, local, or HOST:PORT of a head")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS).close()
    return found


def _start(settings: ClusterSettings) -> None:
    ray.init(
        address=LOCAL,
        num_cpus=settings.cpus,
        object_store_memory=settings.object_store_bytes,
        include_dashboard=False,
        logging_level=logging.WARNING,
        log_to_driver=False,
        _temp_dir=str(settings.folder.absolute()) if settings.folder else None,
    )
