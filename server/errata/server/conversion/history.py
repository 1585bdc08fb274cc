"""The history's calls, checked, and what it answers.

A derivation's or bisection's job stores the whole message as its result; its summary is the same without what lists
leave out. So the message of a job is the one that it has, with its name and where it stands.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from errata.editor.evaluation import Metric, Probe
from errata.server.conversion import limits
from errata.server.conversion.decode import Decoder
from errata.server.conversion.encode import job_message
from errata.server.errors import MalformedError
from errata.server.ledger.rows import JobKind, JobRow
from errata.server.names import VersionRef, alias_part, job_name, version_name, version_ref
from errata.v1 import history_pb2

_MOST_SOURCES = _MOST_FACTS = _MOST_PROBES = 1000
_LONGEST_FACT = 200
_LARGEST_MANIFEST = 10**6

_LISTS_LEAVE_OUT = ("conflicts", "later", "reverted", "steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class RevertOrder:
    """Take one version's delta away."""

    version: VersionRef


@dataclass(frozen=True, slots=True, kw_only=True)
class ComposeOrder:
    """Add versions' own deltas."""

    versions: tuple[VersionRef, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RebaseOrder:
    """Move a version onto a merged base."""

    version: VersionRef


@dataclass(frozen=True, slots=True, kw_only=True)
class SquashOrder:
    """Join a chain; with `resolve`, solve its requests again."""

    version: VersionRef
    resolve: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOrder:
    """Take in an adapter: its files, the base it stands on, and what it changes. One of the first two is there."""

    manifest: bytes = field(repr=False)
    config: bytes = field(repr=False)
    weights: bytes = field(repr=False)
    base_sha256: str
    facts: tuple[str, ...]


Operation = RevertOrder | ComposeOrder | RebaseOrder | SquashOrder | ImportOrder

KINDS: Mapping[type[Operation], history_pb2.DerivationKind.ValueType] = {
    RevertOrder: history_pb2.DERIVATION_KIND_REVERT,
    ComposeOrder: history_pb2.DERIVATION_KIND_COMPOSE,
    RebaseOrder: history_pb2.DERIVATION_KIND_REBASE,
    SquashOrder: history_pb2.DERIVATION_KIND_SQUASH,
    ImportOrder: history_pb2.DERIVATION_KIND_IMPORT,
}
"""The proto's kind of each operation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DerivationOrder:
    """A CreateDerivationRequest."""

    parent: VersionRef
    operation: Operation
    probes: tuple[Probe, ...] = field(repr=False)
    guardrails: Mapping[Metric, float]
    allow_conflicts: bool
    request_id: str | None
    validate_only: bool
    description: str
    alias: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonOrder:
    """A CompareVersionsRequest."""

    first: VersionRef
    second: VersionRef
    probes: tuple[Probe, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class BisectionOrder:
    """A CreateBisectionRequest. Without `good` the base is meant."""

    bad: VersionRef
    good: VersionRef
    probes: tuple[Probe, ...] = field(repr=False)
    request_id: str | None
    validate_only: bool


def derivation_order(message: history_pb2.CreateDerivationRequest, decoder: Decoder) -> DerivationOrder:
    """A whole CreateDerivationRequest. Raises as `Decoder`'s methods do."""
    return DerivationOrder(
        parent=version_ref(message.parent, "parent"),
        operation=_operation(message),
        probes=decoder.probes(message.probes),
        guardrails=decoder.guardrails(message.guardrails, "guardrails"),
        allow_conflicts=message.allow_conflicts,
        request_id=limits.request_id(message.request_id),
        validate_only=message.validate_only,
        description=limits.note(message.description, "description", most=4000),
        alias=alias_part(message.alias, "alias") if message.alias else "",
    )


def _operation(message: history_pb2.CreateDerivationRequest) -> Operation:
    match message.WhichOneof("operation"):
        case "revert":
            return RevertOrder(version=version_ref(message.revert.version, "revert.version"))
        case "compose":
            versions = message.compose.versions
            limits.count(versions, "compose.versions", 1, _MOST_SOURCES)
            refs = (version_ref(v, f"compose.versions[{i}]") for i, v in enumerate(versions))
            return ComposeOrder(versions=tuple(refs))
        case "rebase":
            return RebaseOrder(version=version_ref(message.rebase.version, "rebase.version"))
        case "squash":
            squash = message.squash
            return SquashOrder(version=version_ref(squash.version, "squash.version"), resolve=squash.resolve)
        case "adapter":
            return _import(message.adapter)
        case _:
            raise MalformedError(
                "the request has no operation; set one of revert, compose, rebase, squash and adapter",
                field="operation",
                reason="MISSING_FIELD",
            )


def _import(message: history_pb2.Import) -> ImportOrder:
    limits.present(bool(message.adapter_model), "adapter.adapter_model")
    for name, part in (("manifest", message.manifest), ("adapter_config", message.adapter_config)):
        if len(part) > _LARGEST_MANIFEST:
            where = f"adapter.{name}"
            raise MalformedError(f"{where} has {len(part)} bytes; give at most {_LARGEST_MANIFEST}", field=where)
    if not message.manifest:
        limits.present(bool(message.adapter_config), "adapter.adapter_config")
        limits.present(bool(message.base_sha256), "adapter.base_sha256")
    limits.count(message.facts, "adapter.facts", 0, _MOST_FACTS)
    facts = (
        limits.text(fact, f"adapter.facts[{i}]", most=_LONGEST_FACT, one_line=True)
        for i, fact in enumerate(message.facts)
    )
    return ImportOrder(
        manifest=message.manifest,
        config=message.adapter_config,
        weights=message.adapter_model,
        base_sha256=message.base_sha256,
        facts=tuple(facts),
    )


def comparison_order(message: history_pb2.CompareVersionsRequest, decoder: Decoder) -> ComparisonOrder:
    """A whole CompareVersionsRequest."""
    first, second = version_ref(message.first, "first"), version_ref(message.second, "second")
    same_model(second, first.model, "second")
    limits.count(message.probes, "probes", 0, _MOST_PROBES)
    return ComparisonOrder(first=first, second=second, probes=decoder.probes(message.probes))


def bisection_order(message: history_pb2.CreateBisectionRequest, decoder: Decoder) -> BisectionOrder:
    """A whole CreateBisectionRequest."""
    bad = version_ref(message.bad, "bad")
    good = version_ref(message.good, "good") if message.good else VersionRef(bad.model, 0, None)
    same_model(good, bad.model, "good")
    limits.count(message.probes, "probes", 1, _MOST_PROBES)
    return BisectionOrder(
        bad=bad,
        good=good,
        probes=decoder.probes(message.probes),
        request_id=limits.request_id(message.request_id),
        validate_only=message.validate_only,
    )


def same_model(ref: VersionRef, model: str, field: str) -> None:
    """Raises MalformedError (ANOTHER_MODEL) for a version of another model."""
    if ref.model != model:
        raise MalformedError(
            f"{field} is a version of model {ref.model!r}, and the call is about {model!r}; name one of the same model",
            field=field,
            reason="ANOTHER_MODEL",
        )


def derivation_message(row: JobRow) -> history_pb2.Derivation:
    """A derivation as it stands; one of a list is without what lists leave out."""
    message = history_pb2.Derivation.FromString(row.result or row.summary)
    message.name = job_name(JobKind.DERIVATION, row.model, row.id)
    message.version = version_name(row.model, row.made) if row.made is not None else ""
    message.job.CopyFrom(job_message(row))
    return message


def bisection_message(row: JobRow) -> history_pb2.Bisection:
    """A search as it stands; one of a list is without steps."""
    message = history_pb2.Bisection.FromString(row.result or row.summary)
    message.name = job_name(JobKind.BISECTION, row.model, row.id)
    message.job.CopyFrom(job_message(row))
    return message


def history_summary(message: history_pb2.Derivation | history_pb2.Bisection) -> bytes:
    """What lists show of it."""
    listed = type(message).FromString(message.SerializeToString())
    for name in _LISTS_LEAVE_OUT:
        if name in listed.DESCRIPTOR.fields_by_name:
            listed.ClearField(name)  # type: ignore[arg-type]
    return listed.SerializeToString(deterministic=True)
