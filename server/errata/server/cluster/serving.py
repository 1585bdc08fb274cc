"""Replicas on Ray Serve, behind its gRPC proxies and the same `errata.v1.InferenceService`.

    client ──► Serve's gRPC proxy ──► Front ──► a replica: gate ──► service ──► engine ──► all versions in one batch
                                      by version (Serve's model multiplexing)     │
                                                          the server's ledger and deltas, read only

Any replica answers for any version: what a version adds to the base is loaded in milliseconds. Multiplexing sends a
version's calls to replicas that have it, as long as these are not busy, so that each holds a part of many versions.
Edits, traces and all that writes stay with the one server that owns the ledger.
"""

import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from grpc import StatusCode
from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import HTTPOptions, gRPCOptions
from sqlalchemy import make_url

from errata.server.app import ledger_url
from errata.server.cluster.front import CALLS, Front
from errata.server.cluster.replica import Replica
from errata.server.cluster.reply import Metadata, Reply
from errata.server.cluster.workers import fault_of_gpus
from errata.server.settings import Settings, SettingsError, load_settings

SERVICERS = ["errata.v1.inference_pb2_grpc.add_InferenceServiceServicer_to_server"]
"""What Serve's `grpc_options` name as `grpc_servicer_functions`."""

NAME = "errata"
"""The application's."""

_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
"""Of a model: "atlas", or OWNER/NAME."""

_VERSIONS = 1000
"""Names of versions that a replica is remembered for; how many it holds is bounded in bytes, by its engine."""


class ReplicaSettings(BaseModel):
    """The application's arguments in Serve's configuration. `config` is the server's TOML file, on the head node."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: Path | None = None
    replicas: int = Field(default=1, ge=1)
    cpus: int = Field(default=1, ge=1)
    gpus: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    @field_validator("gpus")
    @classmethod
    def _can_be_placed(cls, gpus: float) -> float:
        if fault := fault_of_gpus(gpus):
            raise ValueError(fault)
        return gpus


@serve.deployment(max_ongoing_requests=CALLS)
class Replicas:
    """A replica in a process of its own."""

    def __init__(self, settings: Settings, threads: int) -> None:
        torch.set_num_threads(threads)
        self._replica = Replica(settings)
        self._id = serve.get_replica_context().replica_id.unique_id

    async def call(self, method: str, request: bytes, metadata: Metadata) -> Reply:
        """One answer."""
        return await self._noted(await self._replica.call(method, request, metadata))

    async def stream(self, method: str, request: bytes, metadata: Metadata) -> AsyncIterator[Reply]:
        """An answer as it grows."""
        async for reply in self._replica.stream(method, request, metadata):
            yield await self._noted(reply)

    async def _noted(self, reply: Reply) -> Reply:
        version = serve.get_multiplexed_model_id()
        if version and reply.code is StatusCode.OK:  # a name that stands for nothing is not remembered
            await self._held(version)
        return replace(reply, replica=self._id)

    @serve.multiplexed(max_num_models_per_replica=_VERSIONS)  # type: ignore[untyped-decorator]
    async def _held(self, version: str) -> str:
        """Tells Serve that this replica has answered for a version, and so has loaded it."""
        return version

    def __del__(self) -> None:
        if hasattr(self, "_replica"):
            self._replica.close()


def application(given: ReplicaSettings) -> Application:
    """The application, for `serve run` and `serve deploy`. Raises SettingsError."""
    return bound(load_settings(given.config), given)


def bound(settings: Settings, given: ReplicaSettings) -> Application:
    """The application with a server's settings, of which it takes models, ledger, data_dir, limits and tokens.

    As many fronts as replicas. Raises SettingsError unless they have `insecure_ok`, as Serve's proxies listen on all
    addresses without TLS, and full paths, as their processes start in folders of their own.
    """
    if not settings.insecure_ok:
        raise SettingsError(
            "Ray Serve's gRPC proxies listen on every address and without TLS; set insecure_ok = true where something "
            "else protects the port, and auth = true so that callers need tokens"
        )
    if relative := [f"{name} is {path!r}" for name, path in _relative(settings)]:
        raise SettingsError(f"{', '.join(relative)}; give full paths, the same on all nodes")
    replicas = _deployment(Replicas).options(
        num_replicas=given.replicas,
        ray_actor_options={"num_cpus": given.cpus, "num_gpus": given.gpus},
        graceful_shutdown_timeout_s=settings.drain_seconds,
    )
    front = _deployment(Front).options(num_replicas=given.replicas, ray_actor_options={"num_cpus": 0})
    return front.bind(replicas.bind(settings, given.cpus), settings.max_message_bytes)


def _relative(settings: Settings) -> Iterator[tuple[str, str]]:
    """Settings of replicas that are paths from the folder of whoever reads them. A hub's name looks like one, too."""
    places = {"data_dir": settings.data_dir, **{f"image_folders.{i}": f for i, f in enumerate(settings.image_folders)}}
    url = make_url(ledger_url(settings))
    if url.get_backend_name() == "sqlite":
        places["ledger_url"] = Path(url.database or "")
    for name, model in settings.models.items():
        if not _HUB_NAME.fullmatch(model.source) or Path(model.source).is_dir():
            places[f"models.{name}.source"] = Path(model.source)
    return ((name, str(place)) for name, place in places.items() if not place.is_absolute())


@contextmanager
def serving(application: Application, *, port: int, http_port: int) -> Iterator[str]:
    """While open, the cluster that this process is connected to serves the application; the address for clients.

    What `serve run` does, for programs. Nothing of ours answers on the HTTP port, which Serve opens on this machine.
    """
    try:
        serve.start(
            http_options=HTTPOptions(host="127.0.0.1", port=http_port),
            grpc_options=gRPCOptions(port=port, grpc_servicer_functions=SERVICERS),
        )
        # With no route at all the proxies would not find the application.
        serve.run(application, name=NAME, route_prefix=f"/{NAME}")
        yield f"127.0.0.1:{port}"
    finally:
        serve.shutdown()


def _deployment(decorated: object) -> Deployment:
    """What `serve.deployment` makes of a class, and says is still the class."""
    assert isinstance(decorated, Deployment)
    return decorated
