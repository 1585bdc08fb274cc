"""Versions on their way out: export."""

from pathlib import Path
from typing import Annotated

import typer

from errata.client.cli.models import VersionName
from errata.client.cli.output import facts
from errata.client.cli.plain import short, size
from errata.client.cli.session import Session

_SECONDS = 3600.0
"""For the whole folder, unless the caller gives a --timeout: a merged checkpoint is large."""


def export(
    session: Session,
    version: VersionName,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write it; made where it is missing.")],
    format: Annotated[str, typer.Option(metavar="NAME", help="adapter (PEFT), uniform (vLLM), merged.")] = "adapter",
    dtype: Annotated[str | None, typer.Option(metavar="NAME", help="Merged: float32, bfloat16, float16.")] = None,
    license: Annotated[str, typer.Option(metavar="SPDX", help="For the model card.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write a version as a folder that PEFT, vLLM or transformers load."""
    done = session.client.export(
        session.version(version),
        folder,
        format=format,
        dtype=dtype,
        license=license,
        overwrite=overwrite,
        timeout=session.settings.timeout or _SECONDS,
    )
    worst = max(done.rounding, key=lambda each: each.relative_error, default=None)
    told = [
        ("folder", str(done.folder)),
        ("version", short(done.version)),
        ("files", "\n".join(f"{each.file}  {size(each.size)}" for each in done.files)),
        ("rank", str(done.rank or "")),
    ]
    if worst is not None:
        said = f"at most {worst.relative_error:.2%} of the edit, in layer {worst.layer}"
        told.append(("rounding", said))
    session.output.show(done, facts(told))
