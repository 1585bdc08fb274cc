"""Two versions asked the same probes. Knows deltas and probes; nothing of jobs."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from errata.editor.delta import Delta, applied
from errata.editor.evaluation import Evaluation, Metric, Probe, evaluate
from errata.editor.model import EditableModel

_STAYING = (Metric.OTHER_SUBJECTS, Metric.SAME_IMAGE, Metric.UNRELATED)
"""Metrics whose probes must be answered as before: drift is measured on them."""


def compare(
    model: EditableModel, probes: Sequence[Probe], before: Sequence[Delta], after: Sequence[Delta], *, own: int = 0
) -> Evaluation:
    """Asks the version made of the deltas `before`, and then the one made of `after`.

    Neither needs to descend from the other: the first is taken off before the second is put on. The first `own` probes
    are not the caller's: errors number the others.
    """
    staying = [p.prompt for p in probes if p.metric in _STAYING]
    with ExitStack() as first:
        first.enter_context(applied(model, *before))

        @contextmanager
        def second() -> Iterator[None]:
            first.close()
            with applied(model, *after):
                yield

        return evaluate(
            model, probes, second(), reference=staying, field=lambda i: f"probes[{i - own}]" if i >= own else "requests"
        )
