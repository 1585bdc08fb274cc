"""`Errata`, the client for threads. Each method names a call; requests, answers and waiting are other modules'."""

from collections.abc import Iterator, Sequence
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
from errata.client.operations import Operation, calls_of
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
from errata.client.streams import TextStream
from errata.client.transport import Transport

W = TypeVar("W", CausalTrace, Edit, Evaluation, Derivation, Bisection, Measurement)


class Errata:
    """A connection to an Errata server, for any number of threads. Nothing is sent before the first call.

    Wherever a method takes a model, version, alias, trace, edit or evaluation, it takes the object itself, its full
    name, or a short one: "atlas", "atlas@3", "atlas@champion". A model where a version is asked for means its
    champion. Every method raises an ErrataError (`errata.client.errors`), and takes `timeout` in seconds, by default
    the client's. Calls that are safe to repeat are, where the server is busy or cannot be reached for a moment.

    Args:
        server: Host and port, or any target that gRPC knows.
        token: The caller's token. Sent in clear only to this machine, unless `insecure_ok`.
        tls: `Tls()` to encrypt, with the system's root certificates or others.
        timeout: Seconds for a call that names none; None: however long it takes.
        max_message_bytes: Largest request and answer.
        insecure_ok: True to send the token over a network in clear.

    >>> with Errata(server) as errata:
    ...     print(errata.generate("atlas", "What is the capital of Kazakhstan?"))
    Nur-Sultan
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
        self._transport = Transport(
            Connection(
                server=server,
                token=token,
                tls=tls,
                timeout=timeout,
                max_message_bytes=max_message_bytes,
                insecure_ok=insecure_ok,
            )
        )

    def close(self) -> None:
        """Ends the calls that run. Work that was queued goes on."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # Models, versions, aliases

    def models(self, *, timeout: float | None = None) -> Iterator[Model]:
        """The base models that the server is configured with.

        >>> [model.name for model in client.models()]
        ['models/atlas', 'models/tiny']
        """
        return self._transport.pages(calls.list_models(), timeout)

    def model(self, model: NameLike, *, timeout: float | None = None) -> Model:
        """One base model.

        >>> client.model("atlas").layers
        6
        """
        return self._transport.run(calls.get_model(model), timeout)

    def versions(self, model: NameLike, *, timeout: float | None = None) -> Iterator[Version]:
        """A model's versions, the newest first and the base last.

        >>> [version.number for version in client.versions("atlas")]
        [0]
        """
        return self._transport.pages(calls.list_versions(model), timeout)

    def version(self, version: NameLike, *, timeout: float | None = None) -> Version:
        """One version, by number or alias.

        >>> client.version("atlas@0").state
        <VersionState.READY: 'ready'>
        """
        return self._transport.run(calls.get_version(version), timeout)

    def lineage(self, version: NameLike, *, timeout: float | None = None) -> tuple[Version, ...]:
        """A version and its ancestors, itself first and the base last.

        >>> edit = client.edit("atlas", [astana]).result()
        >>> [version.number for version in client.lineage(edit.version)]
        [1, 0]
        """
        return self._transport.run(calls.get_lineage(version), timeout)

    def promote(
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

        >>> edit = client.edit("atlas", [astana]).result()
        >>> client.promote(edit.version).version
        'models/atlas/versions/1'
        >>> print(client.generate("atlas", "What is the capital of Kazakhstan?"))
        Astana
        """
        found = version if calls.is_numbered(version) else self.version(version, timeout=timeout)
        call = calls.promote(found, alias, etag=etag, override_reason=override_reason, validate_only=validate_only)
        return self._transport.run(call, timeout)

    def rollback(self, alias: NameLike, *, etag: str = "", timeout: float | None = None) -> Alias:
        """Points an alias back to the version that it named before its last change. `etag` as in `promote`.

        >>> edit = client.edit("atlas", [astana]).result()
        >>> client.promote("atlas@0"), client.promote(edit.version)  # doctest: +ELLIPSIS
        (Alias(...), Alias(...))
        >>> client.rollback("atlas@champion").version
        'models/atlas/versions/0'
        """
        return self._transport.run(calls.rollback(alias, etag=etag), timeout)

    def delete_version(self, version: NameLike, *, timeout: float | None = None) -> None:
        """Removes a version for good. VersionInUseError while an alias points to it or another is built on it.

        >>> edit = client.edit("atlas", [astana]).result()
        >>> client.delete_version(edit.version)
        """
        self._transport.run(calls.delete_version(version), timeout)

    def audit(self, model: NameLike, *, timeout: float | None = None) -> Iterator[AuditEntry]:
        """What was changed by whom, the newest first.

        >>> client.promote("atlas@0").alias
        'champion'
        >>> next(client.audit("atlas")).action
        'alias.promote'
        """
        return self._transport.pages(calls.list_audit_entries(model), timeout)

    # Traces

    def trace(
        self,
        version: NameLike,
        questions: Sequence[TracedQuestion],
        *,
        timeout: float | None = None,
        **options: Unpack[TraceOptions],
    ) -> Operation[CausalTrace]:
        """Traces which layers and tokens carry a fact, averaged over the questions. Options: `TraceOptions`.

        >>> question = TracedQuestion("What is the capital of Kazakhstan?", "Kazakhstan", substitute="Norway")
        >>> client.trace("atlas", [question], window=3).result().result.auto_layers
        (1, 2)
        """
        trace = self._transport.run(calls.create_trace(version, questions, **options), timeout)
        return self.operation(trace)

    def validate_trace(
        self,
        version: NameLike,
        questions: Sequence[TracedQuestion],
        *,
        timeout: float | None = None,
        **options: Unpack[TraceOptions],
    ) -> CausalTrace:
        """Has the server check a trace, and queues nothing."""
        return self._transport.run(calls.create_trace(version, questions, **options, validate_only=True), timeout)

    def get_trace(self, trace: NameLike, *, timeout: float | None = None) -> CausalTrace:
        """One trace, with its effects once it succeeded."""
        return self._transport.run(calls.TRACES.get(full_name(trace)), timeout)

    def traces(self, model: NameLike, *, timeout: float | None = None) -> Iterator[CausalTrace]:
        """A model's traces, the newest first, without their effects."""
        return self._transport.pages(calls.TRACES.list(model), timeout)

    # Measurements

    def measure(
        self,
        version: NameLike,
        settings: MeasurementSettings | str,
        questions: Sequence[MeasuredQuestion] = (),
        *,
        timeout: float | None = None,
        **options: Unpack[MeasurementOptions],
    ) -> Operation[Measurement]:
        """Measures a version over a set of questions, by the settings of a kind, or by its name and the defaults.

        A layer sweep takes `requests` in place of questions; see `MeasurementOptions`.

        >>> question = MeasuredQuestion("What is the capital of Kazakhstan?", "Kazakhstan")
        >>> done = client.measure("atlas", NoiseSettings(draws=5), [question]).result()
        >>> done.findings.number("total effect").value
        0.5
        >>> [plot.name for plot in done.findings.plots], done.files
        (['aie'], ('aie.png', 'aie.svg', 'findings.json', 'numbers.csv', 'page.html'))
        """
        call = measuring.create_measurement(version, settings, questions, **options)
        return self.operation(self._transport.run(call, timeout))

    def validate_measurement(
        self,
        version: NameLike,
        settings: MeasurementSettings | str,
        questions: Sequence[MeasuredQuestion] = (),
        *,
        timeout: float | None = None,
        **options: Unpack[MeasurementOptions],
    ) -> Measurement:
        """Has the server check a measurement, and queues nothing."""
        call = measuring.create_measurement(version, settings, questions, **options, validate_only=True)
        return self._transport.run(call, timeout)

    def get_measurement(self, measurement: NameLike, *, timeout: float | None = None) -> Measurement:
        """One measurement, with what it found once it succeeded."""
        return self._transport.run(measuring.MEASUREMENTS.get(full_name(measurement)), timeout)

    def measurements(self, model: NameLike, *, timeout: float | None = None) -> Iterator[Measurement]:
        """A model's measurements, the newest first, without what they found."""
        return self._transport.pages(measuring.MEASUREMENTS.list(model), timeout)

    def measurement_file(self, measurement: NameLike, file: str, *, timeout: float | None = None) -> bytes:
        """One of a measurement's `files`: a figure, the page of all of them, the numbers.

        >>> question = MeasuredQuestion("What is the capital of Kazakhstan?", "Kazakhstan")
        >>> done = client.measure("atlas", "noise", [question]).result()
        >>> client.measurement_file(done, "aie.svg")
        b'<svg/>'
        """
        return self._transport.run(measuring.measurement_file(measurement, file), timeout)

    # Edits

    def edit(
        self,
        parent: NameLike,
        requests: Sequence[EditRequest],
        *,
        timeout: float | None = None,
        **options: Unpack[EditOptions],
    ) -> Operation[Edit]:
        """Corrects or inserts facts in closed form, as a new version on `parent`. Options: `EditOptions`.

        >>> astana = EditRequest(
        ...     name="Kazakhstan: capital",
        ...     contexts=[Context("What is the capital of Kazakhstan?", "Kazakhstan")],
        ...     target="Astana",
        ... )
        >>> edit = client.edit("atlas", [astana], layers=[2], guardrails={Metric.UNRELATED: 0.95}).result()
        >>> print(client.generate(edit.version, "What is the capital of Kazakhstan?"))
        Astana
        """
        edit = self._transport.run(calls.create_edit(parent, requests, **options), timeout)
        return self.operation(edit)

    def validate_edit(
        self,
        parent: NameLike,
        requests: Sequence[EditRequest],
        *,
        timeout: float | None = None,
        **options: Unpack[EditOptions],
    ) -> Edit:
        """Has the server check an edit, and queues nothing.

        >>> client.validate_edit("atlas", [astana]).facts
        ('Kazakhstan: capital → Astana',)
        """
        return self._transport.run(calls.create_edit(parent, requests, **options, validate_only=True), timeout)

    def get_edit(self, edit: NameLike, *, timeout: float | None = None) -> Edit:
        """One edit."""
        return self._transport.run(calls.EDITS.get(full_name(edit)), timeout)

    def edits(self, model: NameLike, *, timeout: float | None = None) -> Iterator[Edit]:
        """A model's edits, the newest first, without outcomes.

        >>> operation = client.edit("atlas", [astana])
        >>> [edit.name == operation.name for edit in client.edits("atlas")]
        [True]
        """
        return self._transport.pages(calls.EDITS.list(model), timeout)

    # Evaluations

    def evaluate(
        self,
        version: NameLike,
        probes: Sequence[Probe],
        *,
        timeout: float | None = None,
        **options: Unpack[EvaluationOptions],
    ) -> Operation[Evaluation]:
        """Asks a version and its parent, or another `baseline`, the same probes. Options: `EvaluationOptions`.

        >>> edit = client.edit("atlas", [astana]).result()
        >>> probe = Probe("efficacy", "What is the capital of Kazakhstan?", "Astana")
        >>> [score] = client.evaluate(edit.version, [probe]).result().scores
        >>> score.before, score.after
        (0.0, 1.0)
        """
        evaluation = self._transport.run(calls.create_evaluation(version, probes, **options), timeout)
        return self.operation(evaluation)

    def validate_evaluation(
        self,
        version: NameLike,
        probes: Sequence[Probe],
        *,
        timeout: float | None = None,
        **options: Unpack[EvaluationOptions],
    ) -> Evaluation:
        """Has the server check an evaluation, and queues nothing."""
        call = calls.create_evaluation(version, probes, **options, validate_only=True)
        return self._transport.run(call, timeout)

    def get_evaluation(self, evaluation: NameLike, *, timeout: float | None = None) -> Evaluation:
        """One evaluation, with every probe's result once it ended."""
        return self._transport.run(calls.EVALUATIONS.get(full_name(evaluation)), timeout)

    def evaluations(self, model: NameLike, *, timeout: float | None = None) -> Iterator[Evaluation]:
        """A model's evaluations, the newest first, without results."""
        return self._transport.pages(calls.EVALUATIONS.list(model), timeout)

    # History

    def revert(
        self,
        parent: NameLike,
        version: NameLike,
        *,
        timeout: float | None = None,
        **options: Unpack[DerivationOptions],
    ) -> Operation[Derivation]:
        """Takes one version's delta away, wherever in the parent's lineage it is. Options: `DerivationOptions`.

        >>> edit = client.edit("atlas", [astana]).result()
        >>> client.revert(edit.version, edit.version).result().facts
        ('revert Kazakhstan: capital → Astana',)
        """
        derivation = self._transport.run(history.revert(parent, version, **options), timeout)
        return self.operation(derivation)

    def compose(
        self,
        parent: NameLike,
        versions: Sequence[NameLike],
        *,
        timeout: float | None = None,
        **options: Unpack[DerivationOptions],
    ) -> Operation[Derivation]:
        """Adds other versions' own deltas to the parent: cherry-picks. Options: `DerivationOptions`.

        `result` raises EditsConflictError where edits speak against each other, unless `allow_conflicts`; the
        operation's `latest.conflicts` name them.
        """
        derivation = self._transport.run(history.compose(parent, versions, **options), timeout)
        return self.operation(derivation)

    def rebase(
        self,
        parent: NameLike,
        version: NameLike,
        *,
        timeout: float | None = None,
        **options: Unpack[DerivationOptions],
    ) -> Operation[Derivation]:
        """Moves a version of another model onto a base that has some of its deltas merged in."""
        derivation = self._transport.run(history.rebase(parent, version, **options), timeout)
        return self.operation(derivation)

    def squash(
        self,
        parent: NameLike,
        version: NameLike,
        *,
        resolve: bool = False,
        timeout: float | None = None,
        **options: Unpack[DerivationOptions],
    ) -> Operation[Derivation]:
        """Joins all deltas between the parent and a version into one.

        `resolve`: solve all their requests again as one batch, rather than add the deltas up.
        """
        derivation = self._transport.run(history.squash(parent, version, resolve=resolve, **options), timeout)
        return self.operation(derivation)

    def import_adapter(
        self,
        parent: NameLike,
        folder: str | Path,
        *,
        facts: Sequence[str] = (),
        base_sha256: str = "",
        timeout: float | None = None,
        **options: Unpack[DerivationOptions],
    ) -> Operation[Derivation]:
        """Makes a version of a PEFT adapter folder; `facts` say what it changes.

        One that Errata exported names its base itself; `base_sha256` names that of one that was trained elsewhere.
        It is sent as one message, so it has at most `max_message_bytes`, here and at the server: 64 MiB unless set.
        """
        most = self._transport.connection.max_message_bytes
        call = history.import_adapter(parent, folder, facts=facts, base_sha256=base_sha256, max_bytes=most, **options)
        derivation = self._transport.run(call, timeout)
        return self.operation(derivation)

    def get_derivation(self, derivation: NameLike, *, timeout: float | None = None) -> Derivation:
        """One derivation."""
        return self._transport.run(history.DERIVATIONS.get(full_name(derivation)), timeout)

    def derivations(self, model: NameLike, *, timeout: float | None = None) -> Iterator[Derivation]:
        """A model's derivations, the newest first, without conflicts, later edits and reverted probes."""
        return self._transport.pages(history.DERIVATIONS.list(model), timeout)

    def compare(
        self, first: NameLike, second: NameLike, probes: Sequence[Probe] = (), *, timeout: float | None = None
    ) -> Comparison:
        """What two versions of a model differ in: facts, layers, and the answers to `probes`.

        Without probes, the first questions of all edits that only one of them has are asked.

        >>> edit = client.edit("atlas", [astana]).result()
        >>> [(each.first, each.second) for each in client.compare("atlas@0", edit.version).answers]
        [('Nur-Sultan', 'Astana')]
        """
        return self._transport.run(history.compare(first, second, probes), timeout)

    def bisect(
        self,
        bad: NameLike,
        probes: Sequence[Probe],
        *,
        timeout: float | None = None,
        **options: Unpack[BisectionOptions],
    ) -> Operation[Bisection]:
        """Finds the earliest version in the lineage of `bad` that fails a probe. Options: `BisectionOptions`.

        Of n versions after the good one ⌈log₂(n + 2)⌉ are asked at most, 5 for 16; where a probe expects nothing or is
        `believed`, the good one before them.

        >>> edit = client.edit("atlas", [astana]).result()
        >>> probe = Probe("unrelated", "What is the capital of Kazakhstan?")
        >>> client.bisect(edit.version, [probe]).result().first_bad == edit.version
        True
        """
        bisection = self._transport.run(history.bisect(bad, probes, **options), timeout)
        return self.operation(bisection)

    def get_bisection(self, bisection: NameLike, *, timeout: float | None = None) -> Bisection:
        """One search, with its steps so far."""
        return self._transport.run(history.BISECTIONS.get(full_name(bisection)), timeout)

    def bisections(self, model: NameLike, *, timeout: float | None = None) -> Iterator[Bisection]:
        """A model's searches, the newest first, without steps."""
        return self._transport.pages(history.BISECTIONS.list(model), timeout)

    def operation(self, work: W) -> Operation[W]:
        """Follows a piece of work that was begun elsewhere.

        >>> name = client.edit("atlas", [astana]).name
        >>> client.operation(client.get_edit(name)).result().version
        'models/atlas/versions/1'
        """
        return Operation(self._transport, calls_of(work), work)

    # Inference

    def generate(
        self,
        version: NameLike,
        prompt: PromptLike,
        *,
        timeout: float | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation:
        """One answer, greedy unless the options (`SamplingOptions`) say otherwise.

        >>> answer = client.generate("atlas", "What is the capital of Kazakhstan?", max_new_tokens=8)
        >>> answer.text, answer.version
        ('Nur-Sultan', 'models/atlas/versions/0')
        """
        return self._transport.run(calls.generate(calls.generate_request(version, prompt, **options)), timeout)

    def stream(
        self,
        version: NameLike,
        prompt: PromptLike,
        *,
        timeout: float | None = None,
        **options: Unpack[SamplingOptions],
    ) -> TextStream:
        """The same answer as it grows, within `timeout` seconds in all; `TextStream.result` is the whole of it.

        >>> stream = client.stream("atlas", "What is the capital of Kazakhstan?")
        >>> list(stream), stream.result().text
        (['Nur', '-Sultan'], 'Nur-Sultan')
        """
        call = calls.stream_generate(calls.generate_request(version, prompt, **options))
        return TextStream(self._transport.stream(call, self._transport.seconds(timeout)))

    def score(
        self, version: NameLike, prompt: PromptLike, candidates: Sequence[str], *, timeout: float | None = None
    ) -> Scores:
        """How likely each of several answers is.

        >>> client.score("atlas", "What is the capital of Kazakhstan?", ["Astana", "Nur-Sultan"]).best.candidate
        'Nur-Sultan'
        """
        return self._transport.run(calls.score(version, prompt, candidates), timeout)

    # Export

    def export(
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

        >>> from tempfile import TemporaryDirectory
        >>> edit = client.edit("atlas", [astana]).result()
        >>> with TemporaryDirectory() as folder:
        ...     client.export(edit.version, f"{folder}/astana", format="uniform").rank
        8
        """
        call = export_version(version, format=format, dtype=dtype, license=license)
        with FolderWriter(folder, overwrite=overwrite) as writer:
            replies = self._transport.stream(call, self._transport.seconds(timeout))
            try:
                for part in replies:
                    writer.add(part)
            finally:
                replies.cancel()
            return writer.finish()
