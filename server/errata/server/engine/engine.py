"""The engine: requests from any thread, one thread that owns the model, continuous batching over versions.

    generate(), score() ──► preparing thread ──► waiting ──► engine thread: prefill ──► running batch ──► handle
                            tokens, images,                  by length                 one step for
                            the version's factors                                      all rows, again

Prompts are made into tokens beside the batch, not between its steps, and a request that cannot be used ends there.
Architecture invariant: only the engine thread touches the replica and its hooks, only the preparing thread encodes.
Every request ends exactly once: with its answer, its own error, or EngineError.
"""

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from queue import SimpleQueue

import torch

from errata.editor.delta import Delta
from errata.editor.errors import CancelledError, ErrataError, InvalidInputError
from errata.editor.mixed import MixedDeltas, VersionFactors, replica
from errata.editor.model import EditableModel, Encoded
from errata.server.engine.batch import Chosen, Row, RunningBatch
from errata.server.engine.handle import GenerationHandle
from errata.server.engine.observer import EngineObserver, Silent
from errata.server.engine.requests import CandidateScore, FinishReason, Generated, Generation, Scoring
from errata.server.engine.sampling import row_sampling
from errata.server.engine.scoring import log_probabilities
from errata.server.engine.text import TextStream
from errata.server.engine.versions import LoadedVersions
from errata.server.engine.work import Answering, Judging, Work
from errata.server.errors import BusyError, DeadlineExceededError, DrainingError, EngineError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """`max_rows` of the running batch; `max_queue` requests may wait to join it, then callers are told to come back.

    Before each step of the batch at most `max_prefill_tokens` of waiting prompts are read, but at least one prompt;
    as many tokens are scored at a time. `version_bytes` bounds the factors kept of versions that no row uses.
    """

    max_rows: int = 32
    max_queue: int = 256
    max_prefill_tokens: int = 4096
    version_bytes: int = 2**30


class Engine:
    """Answers for every version of one model.

    `deltas_of(version)` gives the deltas of a version's lineage; it is called in the preparing thread, once for as
    long as the version stays loaded, and what it raises ends the request. Deadlines are points of `clock`.
    Make it while no other thread uses `model`: it takes a replica.
    """

    def __init__(
        self,
        model: EditableModel,
        deltas_of: Callable[[int], Sequence[Delta]],
        settings: EngineSettings | None = None,
        *,
        observer: EngineObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings or EngineSettings()
        self._observer, self._clock = observer or Silent(), clock
        self._model = replica(model)
        # Encoding sets a tokenizer's options, which must not happen while another thread reads it.
        self._encoder = replace(self._model, processor=copy.deepcopy(self._model.processor))
        self._ends = _end_tokens(self._model)
        self._versions = LoadedVersions(self._model, deltas_of, self._settings.version_bytes)
        self._incoming: SimpleQueue[Work | None] = SimpleQueue()
        self._changed = threading.Condition()
        self._open: set[Work] = set()
        self._queued: set[Work] = set()
        self._ready: deque[Work] = deque()
        self._taken: deque[float] = deque(maxlen=64)
        self._closing = self._stopped = False
        self._running: dict[Row, Answering] = {}
        self._threads = [
            threading.Thread(target=self._prepare_all, name=f"errata-prepare-{model.name}", daemon=True),
            threading.Thread(target=self._run, name=f"errata-engine-{model.name}", daemon=True),
        ]

    def start(self) -> None:
        """Starts its two threads. Requests made before wait."""
        for thread in self._threads:
            thread.start()

    def close(self, drain_seconds: float = 0.0) -> None:
        """Takes nothing new, lets what is open end for so long, ends the rest with DrainingError, stops the threads."""
        with self._changed:
            self._closing = True
            if self._threads[1].is_alive():
                self._changed.wait_for(lambda: not self._open, drain_seconds)
            self._stopped = True
            self._changed.notify_all()
        self._incoming.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        for work in list(self._open):
            self._fail(work, DrainingError("the server is shutting down; ask again later", retry_after=1.0))

    def generate(self, request: Generation, *, deadline: float | None = None) -> GenerationHandle:
        """Answers a prompt. Raises BusyError with `retry_after` while the queue is full, DrainingError once closing.

        Everything else that can be wrong ends the handle.
        """
        handle = GenerationHandle(on_cancel=self._wake)
        self._submit(Answering(submitted=self._clock(), deadline=deadline, request=request, handle=handle))
        return handle

    def score(self, request: Scoring, *, deadline: float | None = None) -> Future[list[CandidateScore]]:
        """How likely each candidate is, in the request's order. Raises as `generate` does.

        Its future can be cancelled until its turn comes.
        """
        future: Future[list[CandidateScore]] = Future()
        self._submit(Judging(submitted=self._clock(), deadline=deadline, request=request, future=future))
        return future

    def evict(self, version: int) -> None:
        """Forgets a version's factors; rows in flight keep them to their end."""
        self._versions.evict(version)

    @property
    def loaded_versions(self) -> tuple[int, ...]:
        """Versions whose factors are held, the one asked for last at the end."""
        return self._versions.loaded

    @property
    def versions_memory_bytes(self) -> int:
        """Bytes of the factors held: what the versions take beside the one copy of the base."""
        return self._versions.nbytes

    @property
    def queue_length(self) -> int:
        """Requests that wait to join the batch."""
        return len(self._queued)

    @property
    def rows(self) -> int:
        """Rows of the running batch."""
        return len(self._running)

    def _submit(self, work: Work) -> None:
        with self._changed:
            if self._closing:
                raise DrainingError("the server is shutting down; ask again later", retry_after=1.0)
            if len(self._queued) >= self._settings.max_queue:
                raise BusyError(
                    f"{len(self._queued)} requests are waiting for {self._model.name!r}; come back later",
                    retry_after=self._retry_after(),
                )
            self._open.add(work)
            self._queued.add(work)
        self._incoming.put(work)

    def _retry_after(self) -> float:
        """Until half of the queue is gone, at the rate of the requests taken last: 0.1 to 30 s."""
        if len(self._taken) < 2:
            return 1.0
        each = (self._clock() - self._taken[0]) / len(self._taken)
        return min(30.0, max(0.1, each * len(self._queued) / 2))

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # The preparing thread

    def _prepare_all(self) -> None:
        while (work := self._incoming.get()) is not None:
            if self._stopped:  # close() ends all that is open
                continue
            try:
                self._check(work)
                self._prepare(work)
            except ErrataError as error:
                self._fail(work, error)
            except Exception as error:
                self._fail(work, _unexpected("preparing the request", error))
            else:
                with self._changed:
                    self._ready.append(work)
                    self._changed.notify_all()

    def _prepare(self, work: Work) -> None:
        if isinstance(work, Answering):
            encoded = self._encoder.encode(work.request.prompt)
            work.limit = min(work.request.max_new_tokens, self._room(encoded))
            sampling = row_sampling(work.request.sampling, work.limit)
            work.row = Row(encoded=encoded, version=self._version(work.request.version), sampling=sampling)
            work.text = TextStream(self._model.tokenizer, work.request.stop)
        elif isinstance(work, Judging):
            work.rows = list(self._candidates(work.request))
            work.version = self._version(work.request.version)

    def _version(self, version: int) -> VersionFactors | None:
        factors = self._versions.get(version)
        return factors if factors.layers else None

    def _candidates(self, request: Scoring) -> Iterator[Encoded]:
        """The prompt with each candidate and the end token after it."""
        end = self._model.end_token_id
        rows = self._encoder.encode_each(request.prompt, request.candidates)
        for i in range(len(request.candidates)):
            try:
                row = next(rows)
            except InvalidInputError as error:
                if error.field == "target":
                    error.field = f"candidates[{i}]"
                raise
            whole = end < 0 or int(row.ids[-1]) == end
            yield row if whole else row.replaced(torch.cat([row.ids, torch.tensor([end])]))

    def _room(self, encoded: Encoded) -> int:
        """Tokens that fit the model's context after the prompt."""
        holds = self._model.context_length
        return 2**31 if holds is None else holds - encoded.prompt_length

    # The engine thread

    def _run(self) -> None:
        with torch.inference_mode(), MixedDeltas(self._model) as deltas:
            batch = RunningBatch(self._model, deltas)
            judging: deque[Judging] = deque()
            while self._await_work(batch, judging):
                try:
                    self._sweep(batch, judging)
                    self._admit(batch, judging)
                    self._judge(deltas, judging)
                    self._step(batch)
                except Exception as error:
                    batch.clear()
                    failed, self._running = self._running, {}
                    for work in failed.values():
                        self._fail(work, _unexpected("a step of the batch", error))

    def _await_work(self, batch: RunningBatch, judging: Sequence[Judging]) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._ready or batch.rows or judging)
            return not self._stopped

    def _check(self, work: Work) -> None:
        """Raises where nobody waits for it any more."""
        if work.withdrawn():
            raise CancelledError("the caller cancelled the request")
        if work.deadline is not None and self._clock() >= work.deadline:
            raise DeadlineExceededError("the request's deadline passed before its answer was complete")

    def _lives(self, work: Work) -> bool:
        try:
            self._check(work)
        except (CancelledError, DeadlineExceededError) as error:
            self._fail(work, error)
            return False
        return True

    def _sweep(self, batch: RunningBatch, judging: deque[Judging]) -> None:
        ended = [i for i, row in enumerate(batch.rows) if not self._lives(self._running[row])]
        self._leave(batch, ended)
        with self._changed:
            waiting = list(self._ready)
        gone = {work for work in (*waiting, *judging) if not self._lives(work)}
        if gone:
            with self._changed:
                self._ready = deque(w for w in self._ready if w not in gone)
            for work in gone & set(judging):
                judging.remove(work)  # type: ignore[arg-type]

    def _admit(self, batch: RunningBatch, judging: deque[Judging]) -> None:
        tokens = self._settings.max_prefill_tokens
        first = True
        while group := self._next_group(self._settings.max_rows - len(batch.rows), tokens, first, judging):
            first = False
            tokens -= sum(len(w.row.encoded.ids) for w in group if w.row)
            self._prefill(batch, group)

    def _next_group(self, free: int, tokens: int, first: bool, judging: deque[Judging]) -> list[Answering]:
        """Requests with prompts alike in length and images to the oldest's, as many as there is room for."""
        with self._changed:
            for work in [w for w in self._ready if isinstance(w, Judging)]:
                self._ready.remove(work)
                judging.append(work)
            waiting = [w for w in self._ready if isinstance(w, Answering)]
            if not waiting or free <= 0:
                return []
            length = waiting[0].shape[0]
            room = min(free, max(tokens // length, 1 if first else 0))
            group = [w for w in waiting if w.shape == waiting[0].shape][:room]
            taken = set(group)
            self._ready = deque(w for w in self._ready if w not in taken)
        return group

    def _prefill(self, batch: RunningBatch, group: Sequence[Answering]) -> None:
        rows = [w.row for w in group if w.row]
        try:
            prefilled = batch.prefill(rows)
        except Exception as error:
            if len(group) == 1:
                self._fail(group[0], _unexpected("reading the prompt", error))
            else:  # one of them may be to blame, and the others are not
                for work in group:
                    self._prefill(batch, [work])
            return
        staying = []
        for i, (work, chosen) in enumerate(zip(group, prefilled.chosen, strict=True)):
            self._took(work)
            self._observer.first_token(self._clock() - work.submitted)
            if not self._accept(work, chosen):
                staying.append(i)
        self._running |= {rows[i]: group[i] for i in staying}
        batch.join(prefilled, staying)

    def _step(self, batch: RunningBatch) -> None:
        if not batch.rows:
            return
        began = self._clock()
        chosen = batch.step()
        ended = [i for i, row in enumerate(batch.rows) if self._accept(self._running[row], chosen[i])]
        self._observer.stepped(len(chosen), batch.versions, self._clock() - began)
        self._leave(batch, ended)

    def _leave(self, batch: RunningBatch, ended: Sequence[int]) -> None:
        for i in ended:
            del self._running[batch.rows[i]]
        batch.leave(ended)

    def _accept(self, work: Answering, chosen: Chosen) -> bool:
        """Takes a row's next token; whether it was the last."""
        try:
            return self._take(work, chosen)
        except Exception as error:
            self._fail(work, _unexpected("reading a token", error))
            return True

    def _take(self, work: Answering, chosen: Chosen) -> bool:
        assert work.text is not None
        work.tokens += 1
        work.log_probability += chosen.log_probability
        if not work.log_probability > -torch.inf:
            self._fail(work, EngineError(f"version {work.request.version} gives no finite probabilities"))
            return True
        if chosen.token in self._ends:
            return self._answered(work, FinishReason.END)
        work.text.push(chosen.token)
        if work.request.stop or work.handle.read:
            work.handle.add(work.text.advance())
            if work.text.stopped:
                return self._answered(work, FinishReason.STOP)
        return work.tokens == work.limit and self._answered(work, FinishReason.LENGTH)

    def _answered(self, work: Answering, reason: FinishReason) -> bool:
        assert work.text is not None
        assert work.row is not None
        work.handle.add(work.text.end())
        if work.text.stopped:  # in characters that waited for bytes that never came
            reason = FinishReason.STOP
        answer = Generated(
            text=work.text.text,
            finish_reason=reason,
            prompt_tokens=len(work.row.encoded.ids),
            generated_tokens=work.tokens,
            log_probability=work.log_probability,
            seed=work.row.sampling.seed if work.row.sampling else None,
        )
        if self._close_work(work, reason.value):
            work.handle.end(answer)
        return True

    def _judge(self, deltas: MixedDeltas, judging: deque[Judging]) -> None:
        """Scores one chunk of the oldest scoring request: the batch must not wait for all of it."""
        if not judging:
            return
        work = judging[0]
        try:
            if work.chunks is None:
                if not work.future.set_running_or_notify_cancel():
                    raise CancelledError("the caller cancelled the request")
                self._took(work)
                work.chunks = self._chunks(work, deltas)
            chunk = next(work.chunks, None)
        except Exception as error:
            judging.popleft()
            self._fail(work, error if isinstance(error, ErrataError) else _unexpected("scoring", error))
            return
        if chunk is not None:
            work.scores += chunk
        if len(work.scores) == len(work.rows):
            judging.popleft()
            self._judged(work)

    def _chunks(self, work: Judging, deltas: MixedDeltas) -> Iterator[list[float]]:
        row = work.rows[0]
        return log_probabilities(
            self._model,
            deltas,
            work.version,
            row.replaced(row.ids[: row.prompt_length]),
            [r.answer for r in work.rows],
            max_tokens=self._settings.max_prefill_tokens,
        )

    def _judged(self, work: Judging) -> None:
        scores = [
            CandidateScore(candidate=c, log_probability=p, tokens=len(r.answer))
            for c, p, r in zip(work.request.candidates, work.scores, work.rows, strict=True)
        ]
        if self._close_work(work, "scored"):
            work.future.set_result(scores)

    # Both threads

    def _took(self, work: Work) -> None:
        """The request no longer waits."""
        with self._changed:
            self._queued.discard(work)
            self._taken.append(self._clock())

    def _fail(self, work: Work, error: Exception) -> None:
        if self._close_work(work, error.reason if isinstance(error, ErrataError) else EngineError.reason):
            work.end(error)

    def _close_work(self, work: Work, outcome: str) -> bool:
        """Takes the request off the books; False where that was done before."""
        with self._changed:
            if work.ended:
                return False
            work.ended = True
            self._queued.discard(work)
            self._open.discard(work)
            self._changed.notify_all()
        self._observer.finished(outcome, self._clock() - work.submitted, work.tokens)
        return True


def _end_tokens(model: EditableModel) -> frozenset[int]:
    """The tokens that end an answer, as `EditableModel.generate` takes them."""
    configured = model.model.generation_config.eos_token_id
    several = configured if isinstance(configured, list) else [configured]
    return frozenset({model.end_token_id, *(int(t) for t in several if t is not None)} - {-1})


def _unexpected(doing: str, error: Exception) -> EngineError:
    found = EngineError(f"{doing} failed: {type(error).__name__}")
    found.__cause__ = error
    return found
