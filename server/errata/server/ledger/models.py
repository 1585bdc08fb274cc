"""The base models."""

from datetime import datetime

from sqlalchemy import exists, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from errata.server.errors import BaseChangedError, NotFoundError
from errata.server.ledger.database import Database
from errata.server.ledger.rows import ModelRow, PublishState
from errata.server.ledger.tables import Model, Version

SERVER = "server"
"""Who did what no caller asked for."""


def known_model(session: Session, name: str, *, lock: bool = False) -> Model:
    """The model. `lock` holds back everybody else who numbers versions, moves aliases or queues work for it.

    Raises NotFoundError (MODEL_NOT_FOUND).
    """
    model = session.get(Model, name, with_for_update=lock)
    if model is None:
        raise NotFoundError(f'there is no model "{name}"; ListModels names those there are', reason="MODEL_NOT_FOUND")
    return model


class ModelLedger(Database):
    """Base models."""

    def ensure_model(self, model: str) -> None:
        """Registers the model and its version 0. Idempotent, also from several processes at once."""
        with self._write.begin() as session:
            insert = sqlite.insert if session.get_bind().dialect.name == "sqlite" else postgresql.insert
            for table, row in ((Model, _new_model(model, self._now())), (Version, _base(model, self._now()))):
                session.execute(insert(table).values(row).on_conflict_do_nothing())

    def describe_model(self, model: str, *, base_sha256: str, architecture: str, layers: int) -> None:
        """Records what loading the checkpoint showed. Idempotent.

        Raises BaseChangedError if it was another checkpoint before and versions were made for that one.
        """
        with self._write.begin() as session:
            known = known_model(session, model, lock=True)
            if known.base_sha256 not in ("", base_sha256) and _has_edits(session, model):
                raise BaseChangedError(
                    f'the checkpoint of model "{model}" is {base_sha256}, but its versions were made for '
                    f"{known.base_sha256}; bring that checkpoint back, or configure this one as a model of its own"
                )
            known.base_sha256, known.architecture, known.layers = base_sha256, architecture, layers
            session.get_one(Version, (model, 0)).base_sha256 = base_sha256

    def model(self, model: str) -> ModelRow:
        """One model. Raises NotFoundError."""
        with self._read() as session:
            return _row(known_model(session, model))

    def models(self, after: str | None, limit: int) -> list[ModelRow]:
        """The models by name, from those after the name `after`."""
        query = select(Model).where(Model.name > (after or "")).order_by(Model.name).limit(limit)
        with self._read() as session:
            return [_row(model) for model in session.scalars(query)]


def _new_model(name: str, time: datetime) -> dict[str, object]:
    return {
        "name": name,
        "base_sha256": "",
        "architecture": "",
        "layers": 0,
        "next_number": 1,
        "create_time": time,
    }


def _base(model: str, time: datetime) -> dict[str, object]:
    return {
        "model": model,
        "number": 0,
        "base_sha256": "",
        "delta_sha256": "",
        "delta_bytes": 0,
        "layers": [],
        "facts": [],
        "scores": "[]",
        "rejections": [],
        "publish_state": PublishState.NONE,
        "mlflow_version": 0,
        "mlflow_run_id": "",
        "created_by": SERVER,
        "create_time": time,
    }


def _has_edits(session: Session, model: str) -> bool:
    live = exists().where(Version.model == model, Version.number > 0, Version.delete_time.is_(None))
    return bool(session.scalar(select(live)))


def _row(model: Model) -> ModelRow:
    return ModelRow(
        name=model.name, base_sha256=model.base_sha256, architecture=model.architecture, layers=model.layers
    )
