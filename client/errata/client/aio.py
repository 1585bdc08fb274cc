"""`AsyncErrata`, the client for asyncio: `Errata`, method by method, awaited."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, Unpack

from errata.client import calls, history, measuring
from errata.client.channel import DEFAULT_SERVER, DEFAULT_TIMEOUT, MAX_MESSAGE_BYTES, Connection, Tls
from errata.client.export import Export, ExportDtype, ExportFormat, FolderWriter, export_version
from errata.client.findings import Measurement
from errata.client.inputs import (
    BisectionOptions,
    DerivationOptions,
    EditOptions,
    EditRequest,
    EvaluationOptions,
    Probe,
    PromptLike,
    SamplingOptions,
    TracedQuestion,
    TraceOptions,
)
from errata.client.measurements import MeasuredQuestion, MeasurementOptions, MeasurementSettings
from errata.client.names import NameLike, full_name
from errata.client.operations import AsyncOperation, calls_of
from errata.client.results import (
    Alias,
    AuditEntry,
    Bisection,
    CausalTrace,
    Comparison,
    Derivation,
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
W = TypeVar("W", CausalTrace, Edit, Evaluation, Derivation, Bisection, Measurement)


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
        """Points an alias to a version, or to the one that another alias names now.

        `etag`: move it only from where you saw it, EtagMismatchError otherwise. `override_reason`: promote a rejected
        version all the same, RejectedVersionError without it; it lands in the audit. `validate_only`: change nothing.
        """
        found = version if calls.is_numbered(version) else await self.version(version, timeout=timeout)
        call = calls.promote(found, alias, etag=etag, override_reason=override_reason, validate_only=validate_only)
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
        return self._transport.pages(calls.TRACES.list(model), timeout)

    # Measurements

    async def measure(
        self,
        version: NameLike,
        settings: MeasurementSettings | str,
        questions: Sequence[MeasuredQuestion] = (),
        *,
        timeout: float | None = None,
        **options: Unpack[MeasurementOptions],
    ) -> AsyncOperation[Measurement]:
        """Measures a version over a set of questions. Options: `MeasurementOptions`."""
        measurement = await self._run_built(
            lambda: measuring.create_measurement(version, settings, questions, **options), timeout
        )
        return self.operation(measurement)

    async def validate_measurement(
        self,
        version: NameLike,
        settings: MeasurementSettings | str,
        questions: Sequence[MeasuredQuestion] = (),
        *,
        timeout: float | None = None,
        **options: Unpack[MeasurementOptions],
    ) -> Measurement:
        """Has the server check a measurement, and queues nothing."""
        return await self._run_built(
            lambda: measuring.create_measurement(version, settings, questions, **options, validate_only=True), timeout
        )

    async def get_measurement(self, measurement: NameLike, *, timeout: float | None = None) -> Measurement:
        """One measurement, with what it found once it succeeded."""
        return await self._transport.run(measuring.MEASUREMENTS.get(full_name(measurement)), timeout)

    def measurements(self, model: NameLike, *, timeout: float | None = None) -> AsyncIterator[Measurement]:
        """A model's measurements, the newest first, without what they found."""
        return self._transport.pages(measuring.MEASUREMENTS.list(model), timeout)

    async def measurement_file(self, measurement: NameLike, file: str, *, timeout: float | None = None) -> bytes:
        """One of a measurement's `files`: a figure, the page of all of them, the numbers."""
        return await self._transport.run(measuring.measurement_file(measurement, file), timeout)

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
        return self._transport.pages(calls.EDITS.list(model), timeout)

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
        return self._transport.pages(calls.EVALUATIONS.list(model), timeout)

    # History

    async def revert(
        self,
        parent: NameLike,
        version: NameLike,
        *,
        timeout: float | None = None,
        **options: Unpack[DerivationOptions],
    ) -> AsyncOperation[Derivation]:
        """Takes one version's delta away, wherever in the parent's lineage it is. Options: `DerivationOptions`."""
        derivation = await self._run_built(lambda: history.revert(parent, version, **options), timeout)
        return self.operation(derivation)

    async def compose(
        self,
        parent: NameLike,
        versions: Sequence[NameLike],
        *,
        timeout: float | None = None,
        **options: Unpack[DerivationOptions],
    ) -> AsyncOperation[Derivation]:
        """Adds other versions' own deltas to the parent: cherry-picks. Options: `DerivationOptions`.

        `result` raises EditsConflictError where edits speak against each other, unless `allow_conflicts`; the
        operation's `latest.conflicts` name them.
        """
        derivation = await self._run_built(lambda: history.compose(parent, versions, **options), timeout)
        return self.operation(derivation)

    async def rebase(
        self,
        parent: NameLike,
        version: NameLike,
        *,
        timeout: float | None = None,
        **options: Unpack[DerivationOptions],
    ) -> AsyncOperation[Derivation]:
        """Moves a version of another model onto a base that has some of its deltas merged in."""
        derivation = await self._run_built(lambda: history.rebase(parent, version, **options), timeout)
        return self.operation(derivation)

    async def squash(
        self,
        parent: NameLike,
        version: NameLike,
        *,
        resolve: bool = False,
        timeout: float | None = None,
        **options: Unpack[DerivationOptions],
    ) -> AsyncOperation[Derivation]:
        """Joins all deltas between the parent and a version into one.

        `resolve`: solve all their requests again as one batch, rather than add the deltas up.
        """
        derivation = await self._run_built(lambda: history.squash(parent, version, resolve=resolve, **options), timeout)
        return self.operation(derivation)

    async def import_adapter(
        self,
        parent: NameLike,
        folder: str | Path,
        *,
        facts: Sequence[str] = (),
        base_sha256: str = "",
        timeout: float | None = None,
        **options: Unpack[DerivationOptions],
    ) -> AsyncOperation[Derivation]:
        """Makes a version of a PEFT adapter folder; `facts` say what it changes.

        One that Errata exported names its base itself; `base_sha256` names that of one that was trained elsewhere.
        """
        most = self._transport.connection.max_message_bytes
        derivation = await self._run_built(
            lambda: history.import_adapter(
                parent, folder, facts=facts, base_sha256=base_sha256, max_bytes=most, **options
            ),
            timeout,
        )
        return self.operation(derivation)

    async def get_derivation(self, derivation: NameLike, *, timeout: float | None = None) -> Derivation:
        """One derivation."""
        return await self._transport.run(history.DERIVATIONS.get(full_name(derivation)), timeout)

    def derivations(self, model: NameLike, *, timeout: float | None = None) -> AsyncIterator[Derivation]:
        """A model's derivations, the newest first, without conflicts, later edits and reverted probes."""
        return self._transport.pages(history.DERIVATIONS.list(model), timeout)

    async def compare(
        self, first: NameLike, second: NameLike, probes: Sequence[Probe] = (), *, timeout: float | None = None
    ) -> Comparison:
        """What two versions of a model differ in: facts, layers, and the answers to `probes`.

        Without probes, the first questions of all edits that only one of them has are asked.
        """
        return await self._run_built(lambda: history.compare(first, second, probes), timeout)

    async def bisect(
        self,
        bad: NameLike,
        probes: Sequence[Probe],
        *,
        timeout: float | None = None,
        **options: Unpack[BisectionOptions],
    ) -> AsyncOperation[Bisection]:
        """Finds the earliest version in the lineage of `bad` that fails a probe. Options: `BisectionOptions`."""
        bisection = await self._run_built(lambda: history.bisect(bad, probes, **options), timeout)
        return self.operation(bisection)

    async def get_bisection(self, bisection: NameLike, *, timeout: float | None = None) -> Bisection:
        """One search, with its steps so far."""
        return await self._transport.run(history.BISECTIONS.get(full_name(bisection)), timeout)

    def bisections(self, model: NameLike, *, timeout: float | None = None) -> AsyncIterator[Bisection]:
        """A model's searches, the newest first, without steps."""
        return self._transport.pages(history.BISECTIONS.list(model), timeout)

    def operation(self, work: W) -> AsyncOperation[W]:
        """Follows a piece of work that was begun elsewhere."""
        return AsyncOperation(self._transport, calls_of(work), work)

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

    # Export

    async def export(
        self,
        version: NameLike,
        folder: str | PathLike[str],
        *,
        format: ExportFormat | str = ExportFormat.ADAPTER,
        dtype: ExportDtype | str | None = None,
        license: str = "",
        overwrite: bool = False,
        timeout: float | None = None,
    ) -> Export:
        """Writes a version as a folder that other software loads, and returns what it holds.

        `format`: "adapter" is a PEFT adapter, "uniform" the same at one rank for vLLM and SGLang, "merged" the whole
        checkpoint, in `dtype` ("float32", "bfloat16", "float16"; by default the base's own). `license` is an SPDX
        identifier for the model card. The folder appears whole or not at all, within `timeout` seconds in all; give a
        large checkpoint its time. `overwrite` replaces an earlier export.
        """
        call = export_version(version, format=format, dtype=dtype, license=license)
        with FolderWriter(folder, overwrite=overwrite) as writer:
            replies = self._transport.stream(call, self._transport.seconds(timeout))
            try:
                async for part in replies:
                    await asyncio.to_thread(writer.add, part)
            finally:
                replies.cancel()
            return await asyncio.to_thread(writer.finish)

    async def _run_built(self, build: Callable[[], calls.Call[T]], timeout: float | None) -> T:
        return await self._transport.run(await asyncio.to_thread(build), timeout)
