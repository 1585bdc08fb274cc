"""Groups of positions of an encoded question: what attention is blocked between (Zhang et al. 2025, §3; methods.md §4).

The groups leave no way around them: from the first image token or the first word of the prompt on, every position of
the prompt is in the image, a constraint, the question or the last position. What a template puts before them can carry
nothing of the prompt and is in none; the answer's positions are in none either.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from transformers import ProcessorMixin

from errata.editor.errors import InvalidInputError
from errata.editor.measurements.questions import Question
from errata.editor.model import EditableModel, Encoded


class Group(StrEnum):
    """A group of positions.

    `image`: all image tokens; `box`: those of the patches that `Question.box` touches; `outside`: the other patches;
    `constraint`: the tokens of all constraints; `question`: the text without them, with what the template puts
    around it, but for the last position; `last`: the prompt's last position, where the answer is read.
    """

    IMAGE = "image"
    BOX = "box"
    OUTSIDE = "outside"
    CONSTRAINT = "constraint"
    QUESTION = "question"
    LAST = "last"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Where something goes from and to: what a knockout hides from what, and what carries to what."""

    sources: tuple[Group, ...]
    targets: tuple[Group, ...]

    @property
    def label(self) -> str:
        """As a figure says it."""
        return f"{' + '.join(self.sources)} → {' + '.join(self.targets)}"

    @property
    def name(self) -> str:
        """As a file is named."""
        return "_".join((*self.sources, *self.targets))

    @staticmethod
    def parse(text: str, *, field: str = "pairs") -> "Pair":
        """Of `source->target`, each a group or several joined by `+`. Raises InvalidInputError with the groups."""
        parts = [[name.strip() for name in side.split("+")] for side in text.split("->")]
        names = [name for side in parts for name in side]
        if len(parts) != 2 or not set(names) <= set(Group) or any(len(set(side)) < len(side) for side in parts):
            raise InvalidInputError(
                f"{text!r} is no pair of groups of positions; give source->target, each one of {', '.join(Group)}, or "
                "several joined by +",
                field=field,
            )
        sources, targets = (tuple(Group(name) for name in side) for side in parts)
        return Pair(sources=sources, targets=targets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Positions:
    """The positions of each group in one row, in order, and for each group that has none the reason."""

    groups: Mapping[Group, tuple[int, ...]]
    empty: Mapping[Group, str]

    def of(self, groups: Sequence[Group]) -> tuple[int, ...]:
        """The positions of all `groups` together, in order."""
        return tuple(sorted({t for g in groups for t in self.groups[g]}))

    def empty_of(self, pair: Pair) -> str:
        """The reason why a group of the pair has no positions; nothing where all have."""
        return next((self.empty[g] for g in (*pair.sources, *pair.targets) if g in self.empty), "")

    def between(self, pair: Pair, begin_of: Callable[[int], int] = lambda t: t) -> dict[int, tuple[int, ...]]:
        """For each target the sources that it may attend to: it keeps itself, and is left out where there are none.

        Those are the sources before it, and where attention sees ahead (`Recording.begin_of`) later ones, too.
        """
        sources, targets = self.of(pair.sources), self.of(pair.targets)
        begins = {s: begin_of(s) for s in sources if targets and s > targets[0]}
        blocked = {t: tuple(s for s in sources if s < t or (s > t and begins[s] <= t)) for t in targets}
        return {t: s for t, s in blocked.items() if s}


def positions(model: EditableModel, question: Question, row: Encoded) -> Positions:
    """The groups of `row`, which is `question` as the model is given it.

    Raises ConstraintNotFoundError for a constraint that the prompt does not hold.
    """
    text, last = question.prompt.text, row.prompt_length - 1
    image = {t for run in row.images for t in run}
    constraint = {t for c in question.constraints for t in row.positions(*c.span(text))} - image
    first = min(t for t in range(row.prompt_length) if row.spans[t] is not None or t in image)
    box, reason = _box(model, question, row)
    found = {
        Group.IMAGE: image,
        Group.BOX: box,
        Group.OUTSIDE: image - box if box else set(),
        Group.CONSTRAINT: constraint,
        Group.QUESTION: set(range(first, last)) - image - constraint,
        Group.LAST: {last},
    }
    reasons = {
        Group.IMAGE: "the prompt has no image",
        Group.BOX: reason,
        Group.OUTSIDE: reason or "the box holds every patch",
        Group.CONSTRAINT: "the constraint is an image placeholder",
        Group.QUESTION: "the prompt has no text but its constraint",
    }
    return Positions(
        groups={g: tuple(sorted(p)) for g, p in found.items()},
        empty={g: reasons[g] for g, p in found.items() if not p},
    )


def _box(model: EditableModel, question: Question, row: Encoded) -> tuple[set[int], str]:
    """The tokens of the patches that the question's box touches; where there are none, the reason."""
    if question.box is None:
        return set(), "the question gives no box"
    if len(row.images) != 1:
        return set(), f"the prompt has {len(row.images)} images, and a box needs one"
    run = row.images[0]
    patched = grid(row, 0)
    if patched is None:
        return set(), f"an image's {len(run)} tokens are not one grid of patches"
    left, top, right, bottom = seen(model, question.prompt.images[0].size)
    rows = _touched(question.box.top, question.box.bottom, top, bottom, patched[0])
    columns = _touched(question.box.left, question.box.right, left, right, patched[1])
    patches = {run.start + r * patched[1] + c for r in rows for c in columns}
    return patches, "" if patches else "the box lies where the processor cuts the image off"


def grid(row: Encoded, image: int) -> tuple[int, int] | None:
    """Rows and columns of an image's tokens; None where they are of several frames, or hold more than patches."""
    tokens = len(row.images[image])
    if "image_grid_thw" in row.vision:
        _, height, width = row.vision["image_grid_thw"][image].tolist()
        merged = math.isqrt(height * width // tokens)
        return height // merged, width // merged
    if "pixel_values" not in row.vision:
        return None
    frames, side = math.prod(row.vision["pixel_values"].shape[:-3]), math.isqrt(tokens)
    return (side, side) if frames == len(row.images) and side * side == tokens else None


def _touched(low: float, high: float, start: float, stop: float, patches: int) -> range:
    """The patches of one axis, `patches` of them from `start` to `stop`, that low … high overlaps. All are shares."""
    # 0.6 of 5 patches are 3, not 3.0000000000000004.
    a, b = (round((x - start) / (stop - start) * patches, 9) for x in (low, high))
    # A box of no width that a patch begins at is in that patch.
    return range(max(0, math.floor(a)), min(patches, max(math.ceil(b), math.floor(a) + 1)))


def seen(model: EditableModel, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what the tower sees of an image of `size` pixels, as shares of the image.

    Processors that pad an image to a square or cut its middle out show the tower another frame than the image's; the
    shares are below 0 or above 1 where it is larger.
    """
    assert isinstance(model.processor, ProcessorMixin)
    processor = model.processor.image_processor
    squared = (max(size), max(size)) if getattr(processor, "do_pad", False) else size
    resized = processor.size if getattr(processor, "do_resize", True) else {}
    shortest = (resized.get("shortest_edge") or min(squared)) / min(squared)
    crop = processor.crop_size if getattr(processor, "do_center_crop", False) else {}
    edges = []
    for name, own, whole in zip(("width", "height"), size, squared, strict=True):
        scale = resized[name] / whole if resized.get(name) else shortest
        shown = crop[name] / scale if crop else whole
        edges.append(((own - shown) / 2 / own, (own + shown) / 2 / own))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom
