"""What is true of a server at one moment, for its metrics: models, queues, memory, jobs, backlog.

Read when it is scraped. A ledger that does not answer takes its own figures out, and no others.
"""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import product

from errata.server.errors import LedgerUnavailableError
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import JobKind, JobState
from errata.server.metrics import State
from errata.server.models import LoadedModel, Models

_EVER, _MOST_TASKS = timedelta(days=3650), 10_000
"""Until when tasks count as backlog, and how many are counted."""

_UP = "Whether the ledger answers."


def states(models: Models, ledger: Ledger) -> Iterator[State]:
    """All of it. Blocks while the ledger is asked."""
    yield from _of_models(models)
    yield from _of_ledger(models, ledger)


def _of_models(models: Models) -> Iterator[State]:
    loaded = {name: found for name in models.names if (found := models.loaded(name))}

    def by_model(name: str, help: str, value: Callable[[LoadedModel], float]) -> State:
        values: dict[tuple[str, ...], float] = {(model,): value(found) for model, found in loaded.items()}
        return State(name=name, help=help, labels=("model",), values=values)

    yield State(
        name="errata_models",
        help="1 for the state that a model is in: unloaded, loading, ready, failed.",
        labels=("model", "state"),
        values={(name, models.state(name).value): 1.0 for name in models.names},
    )
    yield by_model("errata_queue_length", "Requests waiting to be answered.", lambda m: m.engine.queue_length)
    yield by_model("errata_rows", "Rows of the running batch.", lambda m: m.engine.rows)
    yield by_model("errata_versions_loaded", "Versions in memory.", lambda m: len(m.engine.loaded_versions))
    yield by_model("errata_versions_bytes", "Memory of versions.", lambda m: m.engine.versions_memory_bytes)
    yield by_model("errata_model_bytes", "Memory of base weights.", lambda m: m.memory_bytes)


def _of_ledger(models: Models, ledger: Ledger) -> Iterator[State]:
    try:
        jobs, due = ledger.open_jobs(), len(ledger.tasks_due(datetime.now(UTC) + _EVER, _MOST_TASKS))
    except LedgerUnavailableError:
        yield State(name="errata_ledger_up", help=_UP, values={(): 0.0})
        return
    yield State(name="errata_ledger_up", help=_UP, values={(): 1.0})
    known = {*product(models.names, JobKind, (JobState.PENDING, JobState.RUNNING)), *jobs}
    yield State(
        name="errata_jobs",
        help="Jobs that wait or are worked on.",
        labels=("model", "kind", "state"),
        values={(model, kind.value, state.value): float(jobs[model, kind, state]) for model, kind, state in known},
    )
    yield State(name="errata_outbox_backlog", help="What MLflow was not told yet.", values={(): float(due)})
