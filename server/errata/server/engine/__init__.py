"""The inference engine: one thread owns the model and answers for every version in one running batch."""

from errata.server.engine.engine import Engine, EngineSettings
from errata.server.engine.handle import GenerationHandle
from errata.server.engine.observer import EngineObserver
from errata.server.engine.requests import (
    CandidateScore,
    FinishReason,
    Generated,
    Generation,
    Sampling,
    Scoring,
)
from errata.server.errors import DeadlineExceededError, EngineError

__all__ = [
    "CandidateScore",
    "DeadlineExceededError",
    "Engine",
    "EngineError",
    "EngineObserver",
    "EngineSettings",
    "FinishReason",
    "Generated",
    "Generation",
    "GenerationHandle",
    "Sampling",
    "Scoring",
]
