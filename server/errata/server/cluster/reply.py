"""What passes between the front and the replicas. Imports no model: the front is small."""

from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from errata.server.status import TrailingMetadata

Metadata = Sequence[tuple[str, str]]
"""What a caller sent beside its request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A message of an answer, or how the call ended where it did not end well. `replica` is who answered."""

    message: bytes = b""
    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""
    trailing: TrailingMetadata = ()
    replica: str = ""
