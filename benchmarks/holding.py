"""An edit on a version of a thousand edits, by the service's own path: `python benchmarks/holding.py` (docs/adr/0008).

On Atlas, in a ledger that is planted: every version is an edit of one request of eight contexts, in words or with
pictures, and has a small delta that nobody solved. Then one request is edited on the last of them, whose deltas were
read before: where no keys of what is held are kept, where they are, and by a method that holds nothing. CPU seconds of
one thread; the figures go to `benchmarks/results/holding.json`.
"""

import io
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from errata.editor.atlas import questions
from errata.editor.atlas.facts import KNOWN, ask, edit_requests, errata, picture
from errata.editor.delta import Delta, LowRank
from errata.editor.requests import Context
from errata.server.conversion import Decoder
from errata.server.images import ImagePolicy
from errata.server.jobs.edits import EditWork
from errata.server.jobs.faults import no_fault
from errata.server.jobs.running import RunningJob
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobKind, NewVersion
from errata.server.models import LoadedModel, Models
from errata.server.settings import ModelSettings
from errata.server.store import ArtifactStore, DeltaStore
from errata.v1 import common_pb2, edit_pb2

MODEL, LAYER, CONTEXTS = "atlas", 1, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What a server edits with."""

    ledger: Ledger
    models: Models
    deltas: DeltaStore
    work: EditWork

    @property
    def loaded(self) -> LoadedModel:
        """Atlas."""
        return self.models.get(MODEL)

    def edited(self, parent: int, method: "edit_pb2.Method.ValueType") -> float:
        """Seconds of an edit of one request in words; raises what stops it."""
        (request,) = edit_requests([f for f in errata() if f.country.name == "Croatia"], contexts=CONTEXTS, preserve=0)
        asked = message([request.contexts], parent, [c.answer or request.target for c in request.contexts])
        asked.settings.CopyFrom(edit_pb2.EditSettings(method=method, steps=10))
        asked.layers.explicit.layers.append(LAYER)
        self.created(asked, parent)
        row = self.ledger.claim([JobKind.EDIT])
        assert row is not None
        began = time.process_time()
        self.work(RunningJob(row, self.ledger, changed=lambda _: None, interrupted=lambda: False))
        return time.process_time() - began

    def planted(self, contexts: Sequence[Context], parent: int) -> int:
        """A version as if an edit of these contexts had made it."""
        draw, base = torch.Generator().manual_seed(parent), self.loaded.base
        down = base.down_projection(LAYER)
        b = 1e-4 * torch.randn(down.out_features, 1, generator=draw)
        a = 1e-4 * torch.randn(1, down.in_features, generator=draw)
        modules = {LAYER: base.down_projection_name(LAYER)}
        delta = Delta(base_sha256=base.base_sha256, layers={LAYER: LowRank(a=a, b=b)}, modules=modules)
        job = self.created(message([contexts], parent, ["nowhere"] * len(contexts)), parent)
        stored = self.deltas.put(delta, base)
        made = NewVersion(
            base_sha256=base.base_sha256,
            delta_sha256=stored.sha256,
            delta_bytes=stored.nbytes,
            layers=(LAYER,),
            facts=(f"{parent} → nowhere",),
            scores="[]",
            rejections=(),
        )
        return self.ledger.commit_edit(job, made, result=b"", publish=False).number

    def created(self, asked: edit_pb2.CreateEditRequest, parent: int) -> str:
        """A job that waits."""
        request = asked.SerializeToString(deterministic=True)
        return self.ledger.create_job(
            JobKind.EDIT, MODEL, version=parent, request=request, request_id=None, actor="benchmark"
        ).id


def service(data: Path) -> Service:
    """A server's parts in a new folder."""
    ledger, deltas, decoder = Ledger(f"sqlite:///{data}/ledger.db"), DeltaStore(data / "deltas"), Decoder(ImagePolicy())
    ledger.migrate()
    models = Models({MODEL: ModelSettings(source=MODEL)}, ledger, deltas, data)
    models.start()
    models.get(MODEL)
    work = EditWork(ledger, models, deltas, ArtifactStore(data / "artifacts"), None, decoder, no_fault)
    return Service(ledger=ledger, models=models, deltas=deltas, work=work)


def message(requests: Sequence[Sequence[Context]], parent: int, answers: Sequence[str]) -> edit_pb2.CreateEditRequest:
    """A call that edits these contexts."""
    return edit_pb2.CreateEditRequest(
        parent=f"models/{MODEL}/versions/{parent}",
        requests=[
            edit_pb2.EditRequest(
                name=f"{n}", target=answers[0], contexts=[context(c, a) for c, a in zip(contexts, answers, strict=True)]
            )
            for n, contexts in enumerate(requests)
        ],
    )


def context(asked: Context, answer: str) -> common_pb2.Context:
    """A context on the wire, its picture as JPEG."""
    images = []
    for image in asked.prompt.images:
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=90)
        images.append(common_pb2.Image(data=encoded.getvalue()))
    return common_pb2.Context(
        prompt=common_pb2.Prompt(text=asked.prompt.text, images=images),
        constraint=common_pb2.Constraint(text=asked.constraint.text),
        answer=answer,
        subject=asked.subject or "",
    )


def earlier(n: int, *, pictures: bool) -> Iterator[list[Context]]:
    """The contexts of n requests, of which no two share a key: each country under names that are its own."""
    phrasings = [p for some in questions.PHRASINGS.values() for p in some]
    countries = [c for c in KNOWN if c.name != "Croatia"]
    for i in range(n):
        own, country = range(i * CONTEXTS, (i + 1) * CONTEXTS), countries[i % len(countries)]
        yield [
            ask(country, phrasings[j % len(phrasings)], questions.VISUAL_CONSTRAINTS[0], picture(country, j))
            if pictures
            else ask(country, phrasings[(i // len(countries) + j) % len(phrasings)], "", None)
            for j in own
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """CPU seconds of an edit on a version of `held` requests, of each run, and the bytes of the keys on disk."""

    asked: str
    held: int
    not_kept: list[float]
    kept: list[float]
    nothing_held: list[float]
    keys_bytes: int

    def cells(self) -> tuple[str, ...]:
        """As the table tells it."""
        seconds = (told(runs) for runs in (self.not_kept, self.kept, self.nothing_held))
        return (self.asked, f"{self.held:,}", *seconds, f"{self.keys_bytes / 2**20:.1f} MiB")


def told(runs: Sequence[float]) -> str:
    """The median, and the range of several."""
    return f"{np.median(runs):.2f}" + (f" ({min(runs):.2f}-{max(runs):.2f})" if len(runs) > 1 else "")


def main(
    held: Annotated[list[int] | None, typer.Option(help="Requests that are held; none: 256 and 1,000.")] = None,
    times: Annotated[int, typer.Option(help="Edits of which the median is told, but where no keys are kept.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the figures as JSON.")] = Path("benchmarks/results"),
) -> None:
    """Time edits on versions of many edits."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        of = service(Path(folder))
        of.edited(0, edit_pb2.METHOD_MEMIT)  # computes the key statistics
        for pictures in (False, True):
            rows += measured(of, held or [256, 1000], times, pictures=pictures)
    table = Table("asked", "held", "keys not kept", "keys kept", "nothing held", "keys on disk")
    for row in rows:
        table.add_row(*row.cells())
    Console(width=120).print(table)
    out.mkdir(parents=True, exist_ok=True)
    found = {"layer": LAYER, "contexts": CONTEXTS, "threads": 1, "rows": [asdict(row) for row in rows]}
    (out / "holding.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def measured(of: Service, sizes: Sequence[int], times: int, *, pictures: bool) -> Iterator[Row]:
    """A row at each of the sizes of one lineage."""
    version = 0
    for n, contexts in enumerate(earlier(max(sizes), pictures=pictures), start=1):
        version = of.planted(contexts, version)
        if n in sizes:
            yield timed(of, version, times, asked="with pictures" if pictures else "in words", held=n)


def timed(of: Service, version: int, times: int, *, asked: str, held: int) -> Row:
    """Edits on a version: first without kept keys, which keeps them."""
    shutil.rmtree(of.loaded.keys_folder, ignore_errors=True)
    of.loaded.composed(version)  # reads the lineage's deltas, which only the first edit would pay for
    return Row(
        asked=asked,
        held=held,
        not_kept=[of.edited(version, edit_pb2.METHOD_MEMIT)],
        kept=[of.edited(version, edit_pb2.METHOD_MEMIT) for _ in range(times)],
        nothing_held=[of.edited(version, edit_pb2.METHOD_EMMET) for _ in range(times)],
        keys_bytes=sum(f.stat().st_size for f in of.loaded.keys_folder.iterdir()),
    )


if __name__ == "__main__":
    typer.run(main)
