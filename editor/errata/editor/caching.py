"""Tensors on disk under the name of what they were computed from, so that nobody computes them twice.

A file is whole or not there: it is written beside its place and moved into it. Whoever reads one judges whether it can
be used; what cannot is computed anew.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from secrets import token_hex

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_log = logging.getLogger(__name__)


def digest_of(parts: Iterable[str | bytes]) -> str:
    """A name, in hexadecimal, for what the parts say in this order."""
    digest = hashlib.sha256()
    for part in parts:
        said = part.encode() if isinstance(part, str) else part
        digest.update(f"{len(said)} ".encode() + said)
    return digest.hexdigest()


def write_whole(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, from any number of threads and processes at once: the last one stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{token_hex(8)}.partial")
    try:
        save_file(dict(tensors), partial, dict(metadata))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def written(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
    """Whether `write_whole` could; what could not is computed again next time, and a warning says so."""
    try:
        write_whole(path, tensors, metadata)
    except (OSError, SafetensorError) as error:
        _log.warning("%s cannot be written (%s); what it would hold is computed again next time", path, error)
        return False
    return True
