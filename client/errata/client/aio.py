"""`AsyncErrata`, the client for asyncio: `Errata`, method by method, awaited."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Self, TypeVar, Unpack

from errata.client import calls
from errata.client.channel import DEFAULT_SERVER, DEFAULT_TIMEOUT, MAX_MESSAGE_BYTES, Connection, Tls
from errata.client.inputs import (
    EditOptions,
    EditRequest,
    EvaluationOptions,
    Probe,
    PromptLike,
    SamplingOptions,
    TracedQuestion,
    TraceOptions,
)
from errata.client.names import NameLike, full_name
from errata.client.operations import AsyncOperation
from errata.client.results import (
    Alias,
    AuditEntry,
    CausalTrace,
    Edit,
    Evaluation,
    Generation,
    Model,
    Scores,
    Version,
)
from errata.client.streams import AsyncTextStream
from errata.client.transport import AsyncReplies, AsyncTransport

T = TypeVar("T")
W = TypeVar("W", CausalTrace, Edit, Evaluation)


class AsyncErrata:
    """`Errata` for asyncio: the same methods, awaited; lists, progress and streams with `async for`.

    To be used within one event loop. Image files are read in a thread, so that the loop goes on.

    >>> async def ask() -> None:
    ...     async with AsyncErrata(server) as errata:
    ...         edit = await errata.edit("atlas", [astana])
    ...         async for progress in edit:
    ...             print(progress.stage)
    ...         version = (await edit.result()).version
    ...         async for text in errata.stream(version, "What is the capital of Kazakhstan?"):
    ...             print(text)
    >>> asyncio.run(ask())
    queued
    values
    values
    Astana
    """

    def __init__(
        self,
        server: str = DEFAULT_SERVER,
        *,
        token: str = "",
        tls: Tls | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        insecure_ok: bool = False,
    ) -> None:
        self._transport = AsyncTransport(
            Connection(
                server=server,
                token=token,
                tls=tls,
                timeout=timeout,
                max_message_bytes=max_message_bytes,
                insecure_ok=insecure_ok,
            )
        )

    async def close(self) -> None:
        """Ends the calls that run. Work that was queued goes on."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    # Models, versions, aliases

    def models(self, *, timeout: float | None = None) -> AsyncIterator[Model]:
        """The base models that the server is configured with."""
        return self._transport.pages(calls.list_models(), timeout)

    async def model(self, model: NameLike, *, timeout: float | None = None) -> Model:
        """One base model."""
        return await self._transport.run(calls.get_model(model), timeout)

    def versions(self, model: NameLike, *, timeout: float | None = None) -> AsyncIterator[Version]:
        """A model's versions, the newest first and the base last."""
        return self._transport.pages(calls.list_versions(model), timeout)

    async def version(self, version: NameLike, *, timeout: float | None = None) -> Version:
        """One version, by number or alias."""
        return await self._transport.run(calls.get_version(version), timeout)

    async def lineage(self, version: NameLike, *, timeout: float | None = None) -> tuple[Version, ...]:
        """A version and its ancestors, itself first and the base last."""
        return await self._transport.run(calls.get_lineage(version), timeout)

    async def promote(
        self,
        version: NameLike,
        alias: str = "champion",
        *,
        etag: str = "",
        override_reason: str = "",
        validate_only: bool = False,
        timeout: float | None = None,
    ) -> Alias:
        """Points an alias to a version.

        `etag`: move it only from where you saw it, EtagMismatchError otherwise. `override_reason`: promote a rejected
        version all the same, RejectedVersionError without it; it lands in the audit. `validate_only`: change nothing.
        """
        call = calls.promote(version, alias, etag=etag, override_reason=override_reason, validate_only=validate_only)
        return await self._transport.run(call, timeout)

    async def rollback(self, alias: NameLike, *, etag: str = "", timeout: float | None = None) -> Alias:
        """Points an alias back to the version that it named before its last change. `etag` as in `promote`."""
        return await self._transport.run(calls.rollback(alias, etag=etag), timeout)

    async def delete_version(self, version: NameLike, *, timeout: float | None = None) -> None:
        """Removes a version for good. VersionInUseError while an alias points to it or another is built on it."""
        await self._transport.run(calls.delete_version(version), timeout)

    def audit(self, model: NameLike, *, timeout: float | None = None) -> AsyncIterator[AuditEntry]:
        """What was changed by whom, the newest first."""
        return self._transport.pages(calls.list_audit_entries(model), timeout)

    # Traces

    async def trace(
        self,
        version: NameLike,
        questions: Sequence[TracedQuestion],
        *,
        timeout: float | None = None,
        **options: Unpack[TraceOptions],
    ) -> AsyncOperation[CausalTrace]:
        """Traces which layers and tokens carry a fact, averaged over the questions. Options: `TraceOptions`."""
        trace = await self._run_built(lambda: calls.create_trace(version, questions, **options), timeout)
        return self.operation(trace)

    async def validate_trace(
        self,
        version: NameLike,
        questions: Sequence[TracedQuestion],
        *,
        timeout: float | None = None,
        **options: Unpack[TraceOptions],
    ) -> CausalTrace:
        """Has the server check a trace, and queues nothing."""
        return await self._run_built(
            lambda: calls.create_trace(version, questions, **options, validate_only=True), timeout
        )

    async def get_trace(self, trace: NameLike, *, timeout: float | None = None) -> CausalTrace:
        """One trace, with its effects once it succeeded."""
        return await self._transport.run(calls.TRACES.get(full_name(trace)), timeout)

    def traces(self, model: NameLike, *, timeout: float | None = None) -> AsyncIterator[CausalTrace]:
        """A model's traces, the newest first, without their effects."""
        return self._transport.pages(calls.list_traces(model), timeout)

    # Edits

    async def edit(
        self,
        parent: NameLike,
        requests: Sequence[EditRequest],
        *,
        timeout: float | None = None,
        **options: Unpack[EditOptions],
    ) -> AsyncOperation[Edit]:
        """Corrects or inserts facts in closed form, as a new version on `parent`. Options: `EditOptions`."""
        edit = await self._run_built(lambda: calls.create_edit(parent, requests, **options), timeout)
        return self.operation(edit)

    async def validate_edit(
        self,
        parent: NameLike,
        requests: Sequence[EditRequest],
        *,
        timeout: float | None = None,
        **options: Unpack[EditOptions],
    ) -> Edit:
        """Has the server check an edit, and queues nothing."""
        return await self._run_built(
            lambda: calls.create_edit(parent, requests, **options, validate_only=True), timeout
        )

    async def get_edit(self, edit: NameLike, *, timeout: float | None = None) -> Edit:
        """One edit."""
        return await self._transport.run(calls.EDITS.get(full_name(edit)), timeout)

    def edits(self, model: NameLike, *, timeout: float | None = None) -> AsyncIterator[Edit]:
        """A model's edits, the newest first, without outcomes."""
        return self._transport.pages(calls.list_edits(model), timeout)

    # Evaluations

    async def evaluate(
        self,
        version: NameLike,
        probes: Sequence[Probe],
        *,
        timeout: float | None = None,
        **options: Unpack[EvaluationOptions],
    ) -> AsyncOperation[Evaluation]:
        """Asks a version and its parent, or another `baseline`, the same probes. Options: `EvaluationOptions`."""
        evaluation = await self._run_built(lambda: calls.create_evaluation(version, probes, **options), timeout)
        return self.operation(evaluation)

    async def validate_evaluation(
        self,
        version: NameLike,
        probes: Sequence[Probe],
        *,
        timeout: float | None = None,
        **options: Unpack[EvaluationOptions],
    ) -> Evaluation:
        """Has the server check an evaluation, and queues nothing."""
        return await self._run_built(
            lambda: calls.create_evaluation(version, probes, **options, validate_only=True), timeout
        )

    async def get_evaluation(self, evaluation: NameLike, *, timeout: float | None = None) -> Evaluation:
        """One evaluation, with every probe's result once it ended."""
        return await self._transport.run(calls.EVALUATIONS.get(full_name(evaluation)), timeout)

    def evaluations(self, model: NameLike, *, timeout: float | None = None) -> AsyncIterator[Evaluation]:
        """A model's evaluations, the newest first, without results."""
        return self._transport.pages(calls.list_evaluations(model), timeout)

    def operation(self, work: W) -> AsyncOperation[W]:
        """Follows a piece of work that was begun elsewhere."""
        return AsyncOperation(self._transport, calls.calls_of(work), work)

    # Inference

    async def generate(
        self,
        version: NameLike,
        prompt: PromptLike,
        *,
        timeout: float | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation:
        """One answer, greedy unless the options (`SamplingOptions`) say otherwise."""
        return await self._run_built(
            lambda: calls.generate(calls.generate_request(version, prompt, **options)), timeout
        )

    def stream(
        self,
        version: NameLike,
        prompt: PromptLike,
        *,
        timeout: float | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncTextStream:
        """The same answer as it grows, within `timeout` seconds in all; `AsyncTextStream.result` is the whole of it."""

        def build() -> calls.Call[calls.Piece]:
            return calls.stream_generate(calls.generate_request(version, prompt, **options))

        async def start() -> AsyncReplies[calls.Piece]:
            return self._transport.stream(await asyncio.to_thread(build), self._transport.seconds(timeout))

        return AsyncTextStream(start)

    async def score(
        self, version: NameLike, prompt: PromptLike, candidates: Sequence[str], *, timeout: float | None = None
    ) -> Scores:
        """How likely each of several answers is."""
        return await self._run_built(lambda: calls.score(version, prompt, candidates), timeout)

    async def _run_built(self, build: Callable[[], calls.Call[T]], timeout: float | None) -> T:
        return await self._transport.run(await asyncio.to_thread(build), timeout)
