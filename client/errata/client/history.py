"""The calls of the history of versions, as `calls.py` has those of everything else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from errata.client import requests, responses, results
from errata.client.calls import Call, call_of, work_calls
from errata.client.errors import InvalidInputError, MessageTooLargeError
from errata.client.inputs import DerivationOptions, Probe
from errata.client.names import NameLike, full_name
from errata.v1 import history_pb2

DERIVATIONS = work_calls("HistoryService", "Derivation", history_pb2, responses.derivation)
BISECTIONS = work_calls("HistoryService", "Bisection", history_pb2, responses.bisection)


def revert(parent: NameLike, version: NameLike, **options: Unpack[DerivationOptions]) -> Call[results.Derivation]:
    """Undoes one version's edit."""
    asked = history_pb2.CreateDerivationRequest(revert=history_pb2.Revert(version=full_name(version)))
    return _derive(parent, asked, options)


def compose(
    parent: NameLike, versions: Sequence[NameLike], **options: Unpack[DerivationOptions]
) -> Call[results.Derivation]:
    """Adds versions' own deltas. One name alone is one version, not its letters."""
    several = [versions] if isinstance(versions, str) else versions
    compose = history_pb2.Compose(versions=[full_name(each) for each in several])
    return _derive(parent, history_pb2.CreateDerivationRequest(compose=compose), options)


def rebase(parent: NameLike, version: NameLike, **options: Unpack[DerivationOptions]) -> Call[results.Derivation]:
    """Moves a version onto a merged base."""
    asked = history_pb2.CreateDerivationRequest(rebase=history_pb2.Rebase(version=full_name(version)))
    return _derive(parent, asked, options)


def squash(
    parent: NameLike, version: NameLike, *, resolve: bool, **options: Unpack[DerivationOptions]
) -> Call[results.Derivation]:
    """Joins a chain."""
    squash = history_pb2.Squash(version=full_name(version), resolve=resolve)
    return _derive(parent, history_pb2.CreateDerivationRequest(squash=squash), options)


def import_adapter(
    parent: NameLike,
    folder: str | Path,
    *,
    facts: Sequence[str],
    base_sha256: str,
    max_bytes: int,
    **options: Unpack[DerivationOptions],
) -> Call[results.Derivation]:
    """Takes in an adapter folder. Raises InvalidInputError where it cannot be read, or has more than `max_bytes`."""
    manifest = Path(folder, "errata.json")
    try:
        if (size := Path(folder, "adapter_model.safetensors").stat().st_size) > max_bytes:
            raise MessageTooLargeError.at(
                "folder",
                f"{str(folder)!r} has {size} bytes, and an adapter of at most {max_bytes} is taken: it is one message. "
                "Export it at a lower rank, or give client and server a larger max_message_bytes",
            )
        adapter = history_pb2.Import(
            manifest=manifest.read_bytes() if manifest.is_file() else b"",
            adapter_config=Path(folder, "adapter_config.json").read_bytes(),
            adapter_model=Path(folder, "adapter_model.safetensors").read_bytes(),
            base_sha256=base_sha256,
            facts=requests.texts(facts),
        )
    except OSError as error:
        raise InvalidInputError.at(
            "folder", f"{str(folder)!r} is no adapter folder: {error.strerror}: {Path(error.filename).name}"
        ) from error
    return _derive(parent, history_pb2.CreateDerivationRequest(adapter=adapter), options)


def _derive(
    parent: NameLike, asked: history_pb2.CreateDerivationRequest, options: DerivationOptions
) -> Call[results.Derivation]:
    """Queues what is asked for, with what every derivation has besides."""
    asked.MergeFrom(
        history_pb2.CreateDerivationRequest(
            parent=full_name(parent),
            probes=requests.probes(options.get("probes", ())),
            guardrails=requests.guardrails(options.get("guardrails", {})),
            allow_conflicts=options.get("allow_conflicts", False),
            description=options.get("description", ""),
            alias=options.get("alias", ""),
            request_id=options.get("request_id") or requests.new_request_id(),
            validate_only=options.get("validate_only", False),
        )
    )
    return call_of(
        "HistoryService/CreateDerivation",
        asked,
        history_pb2.CreateDerivationResponse.FromString,
        lambda said: responses.derivation(said.derivation),
    )


def compare(first: NameLike, second: NameLike, probes: Sequence[Probe]) -> Call[results.Comparison]:
    """What two versions differ in."""
    return call_of(
        "HistoryService/CompareVersions",
        history_pb2.CompareVersionsRequest(
            first=full_name(first), second=full_name(second), probes=requests.probes(probes)
        ),
        history_pb2.CompareVersionsResponse.FromString,
        responses.comparison,
    )


def bisect(
    bad: NameLike,
    probes: Sequence[Probe],
    *,
    good: NameLike | None = None,
    request_id: str = "",
    validate_only: bool = False,
) -> Call[results.Bisection]:
    """Queues a search."""
    request = history_pb2.CreateBisectionRequest(
        bad=full_name(bad),
        good=full_name(good) if good else "",
        probes=requests.probes(probes),
        request_id=request_id or requests.new_request_id(),
        validate_only=validate_only,
    )
    return call_of(
        "HistoryService/CreateBisection",
        request,
        history_pb2.CreateBisectionResponse.FromString,
        lambda said: responses.bisection(said.bisection),
    )
