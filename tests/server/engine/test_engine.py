import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from alone import WAIT, StartEngine, alone, prompts_of
from tiny import picture, question, random_delta

from errata.editor.delta import Delta, applied
from errata.editor.errors import CancelledError, PromptError
from errata.editor.model import EditableModel
from errata.editor.prompts import Prompt
from errata.server.engine import (
    DeadlineExceededError,
    Engine,
    EngineError,
    FinishReason,
    Generation,
    Sampling,
    Scoring,
)
from errata.server.engine.observer import Silent
from errata.server.errors import BusyError, DrainingError


def lineages_of(model: EditableModel) -> dict[int, list[Delta]]:
    """The base, an edit, an edit of that edit, and another edit of the base, of ranks that pad differently."""
    one, two, three = (
        random_delta(model, ranks, seed=i) for i, ranks in enumerate(({1: 1}, {1: 3, 2: 17}, {0: 8, 3: 2}))
    )
    return {0: [], 1: [one], 2: [one, two], 3: [three]}


class Gate(Silent):
    """Holds the engine after its first step of the batch until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.outcomes: list[str] = []
        self.rows: list[int] = []

    def stepped(self, rows: int, versions: int, seconds: float) -> None:
        self.rows.append(rows)
        self.reached.set()
        assert self.opened.wait(WAIT)

    def finished(self, outcome: str, seconds: float, tokens: int) -> None:
        self.outcomes.append(outcome)


@pytest.mark.parametrize("max_rows", [3, 32])
def test_a_mixed_batch_answers_like_each_version_alone(
    model: EditableModel, start_engine: StartEngine, max_rows: int
) -> None:
    """With 3 rows for 32 requests every slot is left and joined again, by other lengths and versions."""
    lineages = lineages_of(model)
    asked = [(v, p, 3 + (5 * i + v) % 9) for i, p in enumerate(prompts_of(model)) for v in lineages]
    engine = start_engine(model, lineages, max_rows=max_rows, max_prefill_tokens=64)
    handles = [engine.generate(Generation(version=v, prompt=p, max_new_tokens=n)) for v, p, n in asked]
    for (version, prompt, tokens), handle in zip(asked, handles, strict=True):
        found, expected = handle.result(WAIT), alone(model, prompt, lineages[version], tokens)
        assert found.text == expected.text
        assert found.generated_tokens == len(expected.tokens) + expected.finished
        assert found.finish_reason is (FinishReason.END if expected.finished else FinishReason.LENGTH)
        assert found.prompt_tokens == len(model.encode(prompt).ids)
        assert found.seed is None
    assert len({h.result().text for h in handles[: len(lineages)]}) > 1
    assert engine.rows == engine.queue_length == 0


def test_pieces_joined_are_the_text(model: EditableModel, start_engine: StartEngine) -> None:
    gate = Gate()
    engine = start_engine(model, lineages_of(model), observer=gate)
    handles = [
        engine.generate(Generation(version=v, prompt=p, max_new_tokens=24)) for p in prompts_of(model) for v in range(4)
    ]
    reading = [handle.pieces() for handle in handles]
    gate.opened.set()
    several = 0
    for handle, growing in zip(handles, reading, strict=True):
        pieces = list(growing)
        assert "".join(pieces) == handle.result().text
        several += len(pieces) > 1
    assert several > 4


def test_asyncio_reads_pieces_and_results(llama: EditableModel, start_engine: StartEngine) -> None:
    engine = start_engine(llama)
    request = Generation(version=0, prompt=question(llama), max_new_tokens=16)

    async def read() -> tuple[str, str]:
        handle = engine.generate(request)
        pieces = [piece async for piece in handle]
        return "".join(pieces), (await engine.generate(request)).text

    pieces, text = asyncio.run(read())
    assert pieces == text == engine.generate(request).result(WAIT).text


def test_a_cancelled_task_frees_its_row(llama: EditableModel, start_engine: StartEngine) -> None:
    gate = Gate()
    engine = start_engine(llama, observer=gate)
    handle = engine.generate(endless(llama))

    async def read() -> None:
        task = asyncio.ensure_future(handle._awaited())
        await asyncio.to_thread(gate.reached.wait, WAIT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(read())
    gate.opened.set()
    with pytest.raises(CancelledError):
        handle.result(WAIT)
    assert gate.outcomes == ["CANCELLED"]


def endless(model: EditableModel, version: int = 0) -> Generation:
    """A prompt whose answer takes many steps."""
    return Generation(version=version, prompt=Prompt(text="What is this?"), max_new_tokens=200, stop=("\0never",))


def test_a_row_that_is_cancelled_or_late_leaves_at_the_next_step(
    llama: EditableModel, start_engine: StartEngine
) -> None:
    gate, now = Gate(), [0.0]
    engine = start_engine(llama, observer=gate, clock=lambda: now[0])
    request = Generation(version=0, prompt=Prompt(text="Rome"), max_new_tokens=6)
    expected = alone(llama, request.prompt, (), 6)
    cancelled, late = engine.generate(endless(llama)), engine.generate(endless(llama), deadline=5.0)
    assert gate.reached.wait(WAIT)
    kept = engine.generate(request)
    cancelled.cancel()
    now[0] = 6.0
    gate.opened.set()
    with pytest.raises(CancelledError):
        cancelled.result(WAIT)
    with pytest.raises(DeadlineExceededError):
        late.result(WAIT)
    assert kept.result(WAIT).text == expected.text
    assert sum(gate.rows) < 20
    assert engine.rows == 0


def test_a_waiting_request_can_be_withdrawn(llama: EditableModel, start_engine: StartEngine) -> None:
    gate, now = Gate(), [0.0]
    engine = start_engine(llama, observer=gate, clock=lambda: now[0], max_rows=1)
    running = engine.generate(Generation(version=0, prompt=Prompt(text="Rome"), max_new_tokens=4))
    assert gate.reached.wait(WAIT)
    waiting, late = engine.generate(endless(llama)), engine.generate(endless(llama), deadline=1.0)
    waiting.cancel()
    now[0] = 2.0
    gate.opened.set()
    with pytest.raises(CancelledError):
        waiting.result(WAIT)
    with pytest.raises(DeadlineExceededError):
        late.result(WAIT)
    assert running.result(WAIT).text == alone(llama, Prompt(text="Rome"), (), 4).text


def test_a_full_queue_says_when_to_come_back(llama: EditableModel, start_engine: StartEngine) -> None:
    gate = Gate()
    engine = start_engine(llama, observer=gate, max_rows=1, max_queue=2)
    first = engine.generate(endless(llama))
    assert gate.reached.wait(WAIT)
    waiting = [engine.generate(Generation(version=0, prompt=Prompt(text="Rome"), max_new_tokens=2)) for _ in range(2)]
    for ask in (lambda: engine.generate(endless(llama)), lambda: engine.score(scoring(llama))):
        with pytest.raises(BusyError) as raised:
            ask()
        assert raised.value.retry_after is not None
        assert 0.1 <= raised.value.retry_after <= 30
    first.cancel()
    gate.opened.set()
    assert len({h.result(WAIT).text for h in waiting}) == 1


def scoring(model: EditableModel, version: int = 0) -> Scoring:
    return Scoring(version=version, prompt=question(model), candidates=("Paris", "Rome is the capital", "Rome"))


def test_closing_lets_what_is_open_end_and_takes_nothing_new(llama: EditableModel, start_engine: StartEngine) -> None:
    gate = Gate()
    engine = start_engine(llama, observer=gate)
    handle = engine.generate(Generation(version=0, prompt=Prompt(text="Rome"), max_new_tokens=4))
    assert gate.reached.wait(WAIT)
    closing = threading.Thread(target=engine.close, args=(WAIT,))
    closing.start()
    while True:  # until close() has begun
        try:
            engine.generate(endless(llama)).cancel()
        except BusyError:
            continue
        except DrainingError:
            break
    gate.opened.set()
    closing.join()
    assert handle.result(0).text == alone(llama, Prompt(text="Rome"), (), 4).text


def test_closing_at_once_ends_what_is_open(llama: EditableModel, start_engine: StartEngine) -> None:
    gate = Gate()
    engine = start_engine(llama, observer=gate)
    handle = engine.generate(endless(llama))
    assert gate.reached.wait(WAIT)
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.opened.set()
    closing.join()
    with pytest.raises(DrainingError):
        handle.result(0)


def test_requests_that_cannot_be_used_harm_no_other(model: EditableModel, start_engine: StartEngine) -> None:
    lineages = lineages_of(model)
    engine = start_engine(model, lineages)
    good = [engine.generate(Generation(version=v, prompt=p)) for p in prompts_of(model) for v in lineages]
    long = engine.generate(Generation(version=1, prompt=Prompt(text="What " * 300)))
    unknown = engine.generate(Generation(version=99, prompt=Prompt(text="Rome")))
    pictures = 1 if model.image_token_id is None else 2
    wrong = engine.generate(
        Generation(version=0, prompt=Prompt(text="<image> Rome" * 3, images=(picture(),) * pictures, chat=False))
    )
    for handle, error in ((long, PromptError), (unknown, EngineError), (wrong, PromptError)):
        with pytest.raises(error):
            handle.result(WAIT)
    with pytest.raises(PromptError, match=r"candidates\[1\]"):
        engine.score(Scoring(version=0, prompt=Prompt(text="Rome"), candidates=("a", "Rome " * 300))).result(WAIT)
    asked = [(v, p) for p in prompts_of(model) for v in lineages]
    for (version, prompt), handle in zip(asked, good, strict=True):
        assert handle.result(WAIT).text == alone(model, prompt, lineages[version], 32).text


def test_an_answer_ends_where_the_context_does(llama: EditableModel, start_engine: StartEngine) -> None:
    prompt = Prompt(text="What " * 120)
    length = len(llama.encode(prompt).ids)
    assert length < 256
    asked = Generation(version=0, prompt=prompt, max_new_tokens=4096, sampling=Sampling(temperature=10, seed=1))
    found = start_engine(llama).generate(asked).result(WAIT)
    assert found.generated_tokens == 256 - length
    assert found.finish_reason is FinishReason.LENGTH


class _Failing:
    """Fails one forward pass of the engine's model where `should` says so."""

    def __init__(self, engine: Engine, should: Callable[[Mapping[str, torch.Tensor]], bool]) -> None:
        self._should, self.failed = should, 0
        engine._model.model.register_forward_pre_hook(self._hook, with_kwargs=True)

    def _hook(self, _module: object, _args: object, kwargs: Mapping[str, torch.Tensor]) -> None:
        if self._should(kwargs):
            self.failed += 1
            raise RuntimeError("a kernel failed")


def test_a_prompt_that_fails_fails_alone(llama: EditableModel, start_engine: StartEngine) -> None:
    engine = start_engine(llama)
    poison = llama.encode(Prompt(text="Lima")).ids
    texts = ("Rome", "Oslo", "Lima", "Bern")
    assert len({len(llama.encode(Prompt(text=t)).ids) for t in texts[1:]}) == 1
    failing = _Failing(engine, lambda k: any(torch.equal(row, poison) for row in k["input_ids"]))
    handles = {t: engine.generate(Generation(version=0, prompt=Prompt(text=t), max_new_tokens=5)) for t in texts}
    with pytest.raises(EngineError, match="reading the prompt failed: RuntimeError") as raised:
        handles.pop("Lima").result(WAIT)
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert failing.failed >= 1
    for text, handle in handles.items():
        assert handle.result(WAIT).text == alone(llama, Prompt(text=text), (), 5).text


def test_the_engine_goes_on_after_a_step_that_failed(llama: EditableModel, start_engine: StartEngine) -> None:
    engine = start_engine(llama)
    once = iter([True])
    _Failing(engine, lambda k: k["input_ids"].shape[1] == 1 and next(once, False))
    request = Generation(version=0, prompt=Prompt(text="Rome"), max_new_tokens=5)
    with pytest.raises(EngineError, match="a step of the batch failed"):
        engine.generate(request).result(WAIT)
    assert engine.generate(request).result(WAIT).text == alone(llama, request.prompt, (), 5).text


def test_a_seed_repeats_whatever_the_neighbours(model: EditableModel, start_engine: StartEngine) -> None:
    lineages = lineages_of(model)
    rules = [
        Sampling(temperature=1.5, seed=7),
        Sampling(temperature=0.8, top_k=20, seed=2**64 - 1),
        Sampling(temperature=1.2, top_p=0.7, seed=0),
    ]
    asked = [
        Generation(version=v, prompt=question(model), max_new_tokens=12, sampling=s) for s in rules for v in lineages
    ]
    engine = start_engine(model, lineages)
    single = [engine.generate(r).result(WAIT) for r in asked]
    neighbours = [engine.generate(Generation(version=1, prompt=p, sampling=Sampling())) for p in prompts_of(model)]
    together = [engine.generate(r) for r in asked]
    for first, handle in zip(single, together, strict=True):
        found = handle.result(WAIT)
        assert (found.text, found.generated_tokens, found.seed) == (first.text, first.generated_tokens, first.seed)
    assert [a.seed for a in single] == [r.seed for r in rules for _ in lineages]
    assert len({h.result(WAIT).seed for h in neighbours}) == len(neighbours)
    assert len({a.text for a in single}) > 8


def test_stop_strings_end_an_answer_before_them(model: EditableModel, start_engine: StartEngine) -> None:
    engine = start_engine(model)
    whole = engine.generate(Generation(version=0, prompt=question(model), max_new_tokens=24)).result(WAIT).text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    handle = engine.generate(Generation(version=0, prompt=question(model), max_new_tokens=24, stop=(stop, "\0never")))
    pieces = list(handle.pieces())
    found = handle.result()
    assert found.finish_reason is FinishReason.STOP
    assert found.text == whole[: whole.index(stop)].strip() == "".join(pieces)


def log_p(model: EditableModel, prompt: Prompt, answer: Sequence[int], lineage: Sequence[Delta]) -> float:
    """The log p of the answer's tokens by one full forward pass."""
    row = model.encode(prompt)
    ids = torch.cat([row.ids, torch.tensor(answer)])
    with applied(model, *lineage), torch.inference_mode():
        logits = model.model(**model.inputs([row.replaced(ids)])).logits[0, len(row.ids) - 1 : -1]
    return float(logits.double().log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())


@pytest.mark.parametrize("max_prefill_tokens", [8, 4096])
def test_scores_are_the_log_probabilities_of_whole_answers(
    model: EditableModel, start_engine: StartEngine, max_prefill_tokens: int
) -> None:
    lineages = lineages_of(model)
    engine = start_engine(model, lineages, max_prefill_tokens=max_prefill_tokens)
    futures = {v: engine.score(scoring(model, v)) for v in lineages}
    for version, future in futures.items():
        request = scoring(model, version)
        for candidate, score in zip(request.candidates, future.result(WAIT), strict=True):
            answer = model.encode(request.prompt, candidate).answer.tolist()
            answer += [] if answer[-1] == model.end_token_id else [model.end_token_id]
            assert (score.candidate, score.tokens) == (candidate, len(answer))
            expected = log_p(model, request.prompt, answer, lineages[version])
            assert score.log_probability == pytest.approx(expected, abs=1e-3)


def test_an_answers_log_probability_is_that_of_its_tokens(model: EditableModel, start_engine: StartEngine) -> None:
    lineages = lineages_of(model)
    engine = start_engine(model, lineages)
    for version, lineage in lineages.items():
        found = engine.generate(Generation(version=version, prompt=question(model), max_new_tokens=10)).result(WAIT)
        answer = alone(model, question(model), lineage, 10)
        tokens = [*answer.tokens, *([model.end_token_id] if answer.finished else [])]
        expected = log_p(model, question(model), tokens, lineage)
        assert found.log_probability == pytest.approx(expected, abs=1e-3)


def test_versions_are_loaded_once_and_forgotten_beyond_the_limit(
    llama: EditableModel, start_engine: StartEngine
) -> None:
    size = 4 * (48 + 32) * 4
    lineages = {v: [random_delta(llama, {1: 4}, seed=v)] for v in range(1, 5)}
    engine = start_engine(llama, lineages, version_bytes=2 * size)

    def ask(version: int) -> None:
        engine.generate(Generation(version=version, prompt=Prompt(text="Rome"), max_new_tokens=2)).result(WAIT)

    for version in (1, 2, 1, 3):
        ask(version)
    assert engine.loaded_versions == (1, 3)
    assert engine.versions_memory_bytes == 2 * size
    engine.evict(1)
    assert engine.loaded_versions == (3,)
    assert engine.versions_memory_bytes == size


def test_the_model_given_to_the_engine_stays_free_for_edits(llama: EditableModel, start_engine: StartEngine) -> None:
    """An edit in this thread and the engine in its own: one copy of the weights, neither sees the other."""
    lineages = lineages_of(llama)
    engine = start_engine(llama, lineages)
    prompt = Prompt(text="What is this?")
    expected = {v: alone(llama, prompt, lineage, 12).text for v, lineage in lineages.items()}
    handles = [
        (v, engine.generate(Generation(version=v, prompt=prompt, max_new_tokens=12)))
        for _ in range(8)
        for v in lineages
    ]
    for version in lineages:
        assert alone(llama, prompt, lineages[version], 12).text == expected[version]
    assert all(h.result(WAIT).text == expected[v] for v, h in handles)
