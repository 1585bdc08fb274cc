"""The model card of an export: what was edited, on what, how it is loaded, and its licence. Knows no model.

Facts are a caller's words; whatever Markdown or HTML is in them is shown and not obeyed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from errata.editor.merging import Rounding

UNKNOWN_LICENSE = "unknown"

_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#+!|~&-])")


@dataclass(frozen=True, slots=True, kw_only=True)
class CardVersion:
    """A version of the lineage: its name, the facts of its edit, its delta's hash."""

    name: str
    facts: tuple[str, ...]
    delta_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CardScore:
    """A metric over `n` probes, as shares before and after."""

    metric: str
    n: int
    before: float
    after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a card says of a version. `lineage` is the oldest first, without the base.

    `base` is what the base is called, and `license` an SPDX identifier; empty: the base's own, else "unknown".
    """

    version: str
    base: str
    lineage: tuple[CardVersion, ...] = ()
    scores: tuple[CardScore, ...] = field(default=(), repr=False)
    license: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedForm:
    """What the card must know of the folder. `dtype` is empty where each tensor kept its own; `rank` 0 unless uniform.

    `architecture` is the `transformers` class.
    """

    format: str
    architecture: str
    base_sha256: str
    rank: int
    dtype: str
    rounding: Sequence[Rounding]


def render_card(card: Card, form: ExportedForm) -> str:
    """The card, as Markdown with YAML before it."""
    environment = Environment(
        loader=PackageLoader("errata.editor", "."),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["plain"] = _plain
    about = ModelCardData(
        license=card.license or UNKNOWN_LICENSE,
        base_model=card.base,
        library_name="transformers" if form.format == "merged" else "peft",
        tags=["errata", "model-editing"],
    )
    template = environment.get_template("card.md.j2")
    return template.render(card=card, form=form, about=about.to_yaml(), license=about.license)


def license_of(folder: Path | None) -> str:
    """The licence that a checkpoint's own card names; empty where it has none."""
    if folder is None or not (folder / "README.md").is_file():
        return ""
    try:
        found = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.get("license")
    except (OSError, ValueError):
        return ""
    return found if isinstance(found, str) else ""


def _plain(text: str) -> str:
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))
