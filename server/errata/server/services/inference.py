"""Answers from any version. The version that answers is settled when the call arrives, and named in the answer."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from errata.editor.errors import InvalidInputError
from errata.server.conversion import Decoder, GenerateOrder
from errata.server.engine import CandidateScore, Engine, FinishReason, Generated, Generation, Sampling, Scoring
from errata.server.ledger.ledger import Ledger
from errata.server.ledger.rows import VersionRow
from errata.server.models import Models
from errata.server.names import VersionRef, version_name
from errata.server.services.calls import Context
from errata.v1 import inference_pb2, inference_pb2_grpc

_REASONS = {
    FinishReason.END: inference_pb2.FINISH_REASON_END,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
}


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """`answered` is told a model's name and the tokens of prompt and answer."""

    def __init__(
        self, ledger: Ledger, models: Models, decoder: Decoder, answered: Callable[[str, int, int], None]
    ) -> None:
        self._ledger, self._models, self._decoder, self._answered = ledger, models, decoder, answered

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        """One answer. A caller that leaves frees its row."""
        order = await asyncio.to_thread(self._decoder.generate, request)
        version, engine = await self._asked(order.version)
        generated = await engine.generate(_generation(order, version), deadline=_deadline(context))
        return self._answer(version, generated)

    async def StreamGenerate(  # noqa: N802
        self, request: inference_pb2.StreamGenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        """The same answer as it grows; the last message holds the whole of it."""
        order = await asyncio.to_thread(self._decoder.generate, request.request, "request")
        version, engine = await self._asked(order.version)
        handle = engine.generate(_generation(order, version), deadline=_deadline(context))
        try:
            with _within("request"):
                async for piece in handle:
                    yield inference_pb2.StreamGenerateResponse(text=piece)
                answer = self._answer(version, await handle)
        finally:
            handle.cancel()  # without effect once it has ended
        yield inference_pb2.StreamGenerateResponse(final=answer)

    async def Score(  # noqa: N802
        self, request: inference_pb2.ScoreRequest, context: Context
    ) -> inference_pb2.ScoreResponse:
        """How likely each of several answers is."""
        order = await asyncio.to_thread(self._decoder.score, request)
        version, engine = await self._asked(order.version)
        scoring = Scoring(version=version.number, prompt=order.prompt, candidates=order.candidates)
        scores = await asyncio.wrap_future(engine.score(scoring, deadline=_deadline(context)))
        return inference_pb2.ScoreResponse(
            version=version_name(version.model, version.number), scores=map(_candidate, scores)
        )

    async def _asked(self, ref: VersionRef) -> tuple[VersionRow, Engine]:
        """The version that a name means now, and the engine that answers for it, once its model is loaded."""
        # First, so that a mistyped version does not load a model.
        version = await asyncio.to_thread(self._ledger.resolve, ref.model, ref.number, ref.alias)
        # Shielded: others wait for the same model.
        loaded = await asyncio.shield(asyncio.wrap_future(self._models.load(ref.model)))
        return version, loaded.engine

    def _answer(self, version: VersionRow, generated: Generated) -> inference_pb2.GenerateResponse:
        self._answered(version.model, generated.prompt_tokens, generated.generated_tokens)
        return inference_pb2.GenerateResponse(
            version=version_name(version.model, version.number),
            text=generated.text,
            finish_reason=_REASONS[generated.finish_reason],
            usage=inference_pb2.Usage(
                prompt_tokens=generated.prompt_tokens, generated_tokens=generated.generated_tokens
            ),
            log_probability=generated.log_probability,
            seed=generated.seed,
            risk=generated.risk,
        )


def _generation(order: GenerateOrder, version: VersionRow) -> Generation:
    sampling = Sampling(temperature=order.temperature, top_p=order.top_p, top_k=order.top_k, seed=order.seed)
    return Generation(
        version=version.number,
        prompt=order.prompt,
        max_new_tokens=order.max_new_tokens,
        sampling=sampling if order.temperature > 0 else None,
        stop=order.stop,
    )


def _candidate(score: CandidateScore) -> inference_pb2.CandidateScore:
    return inference_pb2.CandidateScore(
        candidate=score.candidate, log_probability=score.log_probability, tokens=score.tokens
    )


def _deadline(context: Context) -> float | None:
    """When the caller stops waiting, on the monotonic clock."""
    remaining = context.time_remaining()
    return None if remaining is None else monotonic() + remaining


@contextmanager
def _within(field: str) -> Iterator[None]:
    """Errors of a part of the request name it as the whole request does."""
    try:
        yield
    except InvalidInputError as error:
        error.within(field)
        raise
