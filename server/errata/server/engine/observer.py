"""Who wants to know what the engine does: metrics, logs. Called in its threads: be quick and raise nothing."""

from typing import Protocol


class EngineObserver(Protocol):
    """Everything the engine tells about its work. Times are in seconds."""

    def first_token(self, seconds: float) -> None:
        """A generation's first token is there; since its request came."""

    def stepped(self, rows: int, versions: int, seconds: float) -> None:
        """The batch made one step: one token for each of its rows, of so many distinct versions."""

    def finished(self, outcome: str, seconds: float, tokens: int) -> None:
        """A request ended: a finish reason, `scored`, or an error's reason; since it came, and tokens generated."""


class Silent:
    """An observer that listens to nothing."""

    def first_token(self, seconds: float) -> None:
        """See EngineObserver."""

    def stepped(self, rows: int, versions: int, seconds: float) -> None:
        """See EngineObserver."""

    def finished(self, outcome: str, seconds: float, tokens: int) -> None:
        """See EngineObserver."""
