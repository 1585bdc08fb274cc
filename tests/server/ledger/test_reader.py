"""The ledger as replicas see it: they read all of it and can write none, on both databases."""

import pytest
from ledgers import BASE
from sqlalchemy.exc import InternalError

from errata.server.cluster.ledger import LedgerReader
from errata.server.errors import BaseChangedError, LedgerUnavailableError, NotFoundError
from errata.server.ledger.ledger import Ledger


def test_a_reader_sees_what_is_written_and_writes_nothing(ledger: Ledger, url: str) -> None:
    reader = LedgerReader(url)
    try:
        reader.ensure_model("atlas")
        reader.describe_model("atlas", base_sha256=BASE, architecture="", layers=6)
        with pytest.raises(BaseChangedError, match="give both the same"):
            reader.describe_model("atlas", base_sha256="other", architecture="", layers=6)
        with pytest.raises(NotFoundError, match='the server has no model "later"; start it') as caught:
            reader.ensure_model("later")
        assert caught.value.said_reason == "MODEL_NOT_FOUND"
        ledger.ensure_model("later")
        reader.ensure_model("later")
        with pytest.raises((LedgerUnavailableError, InternalError)):  # SQLite, PostgreSQL
            reader.create_token("mine", {"*": "admin"})
        assert ledger.tokens() == []
    finally:
        reader.close()
