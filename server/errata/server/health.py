"""Whether each service serves, for `grpc.health.v1`: not before its models are loaded, not while the server drains.

`ModelService` needs no model in memory. The others, and the server as a whole (""), wait for every model that is
configured to be there from the start; one that cannot be loaded keeps them waiting.
"""

import asyncio
from collections.abc import Collection

from grpc_health.v1.health import aio
from grpc_health.v1.health_pb2 import HealthCheckResponse

from errata.server.models import LoadState

SERVER = ""
"""The name of the whole server."""


class Health:
    """Follows the models' states. Made in the server's event loop; `changed` may be called from any thread."""

    def __init__(self, at_once: Collection[str], when_loaded: Collection[str], models: Collection[str]) -> None:
        self.servicer = aio.HealthServicer()
        self._at_once, self._when_loaded = at_once, (SERVER, *when_loaded)
        self._missing = set(models)
        self._loop = asyncio.get_running_loop()
        self._draining = False

    async def start(self) -> None:
        """Says which services serve from now on."""
        for service in self._at_once:
            await self.servicer.set(service, HealthCheckResponse.SERVING)
        await self._say()

    def changed(self, model: str, state: LoadState) -> None:
        """Takes in a model's new state."""
        if not self._loop.is_closed():
            asyncio.run_coroutine_threadsafe(self._changed(model, state), self._loop)

    async def drain(self) -> None:
        """Says that nothing serves, for good."""
        self._draining = True
        await self.servicer.enter_graceful_shutdown()

    @property
    def serving(self) -> bool:
        """Whether all of the server serves."""
        return not self._missing and not self._draining

    async def _changed(self, model: str, state: LoadState) -> None:
        if state is LoadState.READY:
            self._missing.discard(model)
            await self._say()

    async def _say(self) -> None:
        status = HealthCheckResponse.NOT_SERVING if self._missing else HealthCheckResponse.SERVING
        for service in self._when_loaded:
            await self.servicer.set(service, status)
