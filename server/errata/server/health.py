"""Whether each service serves, for `grpc.health.v1`: not while its models are loaded, not while the server drains.

`ModelService` needs no model in memory. The others, and the server as a whole (""), wait until every model that is
configured to be there from the start is, or has failed; then they serve as long as one model can answer. Calls on a
model that failed say why, and try it again.
"""

import asyncio
from collections.abc import Collection

from grpc_health.v1.health import aio
from grpc_health.v1.health_pb2 import HealthCheckResponse

from errata.server.models import LoadState

SERVER = ""
"""The name of the whole server."""


class Health:
    """Follows the models' states. Made in the server's event loop; `changed` may be called from any thread.

    `from_start` and `on_demand` are the models by when they are loaded.
    """

    def __init__(
        self,
        at_once: Collection[str],
        when_loaded: Collection[str],
        from_start: Collection[str],
        on_demand: Collection[str] = (),
    ) -> None:
        self.servicer = aio.HealthServicer()
        self._at_once, self._when_loaded = at_once, (SERVER, *when_loaded)
        self._awaited, self._usable = set(from_start), {*from_start, *on_demand}
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
        return not self._awaited and bool(self._usable) and not self._draining

    async def _changed(self, model: str, state: LoadState) -> None:
        if state is LoadState.READY:
            self._usable.add(model)
        elif state is LoadState.FAILED:
            self._usable.discard(model)
        else:
            return
        self._awaited.discard(model)
        await self._say()

    async def _say(self) -> None:
        status = HealthCheckResponse.SERVING if self.serving else HealthCheckResponse.NOT_SERVING
        for service in self._when_loaded:
            await self.servicer.set(service, status)
