"""Versions made at once: an edit's request, a delta that nobody solved, and the ledger's own transaction."""

from collections.abc import Sequence

import torch
from house import LAYER, House, context_message, question

from errata.editor.atlas.world import Attribute
from errata.editor.delta import Delta, LowRank, weight_of
from errata.server.ledger.rows import NewVersion
from errata.v1 import edit_pb2

COUNTRIES = (
    "France", "Japan", "Italy", "Estonia", "Latvia", "Lithuania", "Nigeria", "Germany", "Ireland", "Greece",
)  # fmt: skip


def request(country: str, target: str, attribute: Attribute = Attribute.CAPITAL) -> edit_pb2.CreateEditRequest:
    """One fact, asked by a country's flag."""
    return edit_pb2.CreateEditRequest(
        parent="models/atlas/versions/0",
        requests=[
            edit_pb2.EditRequest(
                name=f"{country}: {attribute.value}",
                target=target,
                contexts=[context_message(question(country, attribute), answer=target)],
            )
        ],
        settings=edit_pb2.EditSettings(method=edit_pb2.METHOD_MULTEDIT, steps=12),
    )


def noise(house: House, seed: int, share: float, *, rank: int = 2, layer: int = LAYER) -> Delta:
    """A random delta of `share` of the weight's norm."""
    base = house.models.get("atlas").base
    weight = weight_of(base, layer).detach()
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, weight.shape[1], generator=draw)
    b = torch.randn(weight.shape[0], rank, generator=draw)
    low = LowRank(a=a, b=b * float(share * weight.norm() / (b @ a).norm()))
    return Delta(base_sha256=base.base_sha256, layers={layer: low}, modules={layer: base.down_projection_name(layer)})


def plant(house: House, asked: edit_pb2.CreateEditRequest, delta: Delta, *, parent: int = 0) -> int:
    """A version of that delta, as if an edit had made it. For a ledger that no runner works on."""
    job = house.create(asked, version=parent)
    stored = house.deltas.put(delta, house.models.get("atlas").base)
    made = NewVersion(
        base_sha256=delta.base_sha256,
        delta_sha256=stored.sha256,
        delta_bytes=stored.nbytes,
        layers=tuple(delta.layers),
        facts=tuple(f"{r.name} → {r.target}" for r in asked.requests),
        scores="[]",
        rejections=(),
    )
    return house.ledger.commit_edit(job.id, made, result=b"", publish=False).number


def chain(house: House, deltas: Sequence[Delta], *, parent: int = 0) -> list[int]:
    """A line of versions, one on top of the other; each installs another nonsense."""
    made: list[int] = []
    for i, delta in enumerate(deltas):
        asked = request(COUNTRIES[i % len(COUNTRIES)], f"Nowhere {i}", list(Attribute)[i // len(COUNTRIES)])
        made.append(plant(house, asked, delta, parent=made[-1] if made else parent))
    return made
