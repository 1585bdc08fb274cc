"""Answers over the wire, against the editor's own."""

import math
import threading
from collections.abc import Iterator

import grpc
import pytest
from hosting import BASE, SECONDS, Hosted, edit_message, generate_message, prompt_message, question, refused

from errata.server.engine import Generation, GenerationHandle
from errata.v1 import common_pb2, inference_pb2, model_pb2


def test_a_version_answers_as_the_editor_does(hosted: Hosted) -> None:
    with hosted.server.models.get("atlas").borrow() as model:
        expected = model.generate([question("France").prompt])[0]
    answer = hosted.call.inference.Generate(generate_message("France"))
    assert answer.text == expected.text == "Paris"
    assert answer.version == BASE
    assert answer.finish_reason == inference_pb2.FINISH_REASON_END
    assert answer.usage.generated_tokens == len(expected.tokens) + 1  # its end, too
    assert not answer.HasField("seed")


def test_the_bare_name_of_a_model_means_the_base_until_a_version_is_champion(hosted: Hosted) -> None:
    assert hosted.call.inference.Generate(generate_message(version="models/atlas")).version == BASE


def test_an_edited_version_answers_anew_and_the_base_as_before(hosted: Hosted) -> None:
    version = hosted.version("Estonia")
    asked = edit_message("Estonia").requests[0]
    request = inference_pb2.GenerateRequest(version=version, prompt=asked.contexts[0].prompt)
    assert hosted.call.inference.Generate(request).text == asked.target
    request.version = BASE
    assert hosted.call.inference.Generate(request).text != asked.target


def test_pieces_join_to_the_answer_which_comes_last(hosted: Hosted) -> None:
    request = inference_pb2.StreamGenerateRequest(request=generate_message("France"))
    *pieces, last = hosted.call.inference.StreamGenerate(request)
    assert "".join(p.text for p in pieces).strip() == last.final.text == "Paris"
    assert not last.text
    assert all(not p.HasField("final") for p in pieces)


def test_the_seed_of_a_sampled_answer_repeats_it(hosted: Hosted) -> None:
    sampling = inference_pb2.Sampling(temperature=3.0, top_p=0.9, top_k=50)
    first = hosted.call.inference.Generate(generate_message("France", sampling=sampling, max_new_tokens=8))
    sampling.seed = first.seed
    again = hosted.call.inference.Generate(generate_message("France", sampling=sampling, max_new_tokens=8))
    assert again == first


def test_the_risk_of_an_answer_is_what_its_probability_leaves(hosted: Hosted) -> None:
    """Basu et al. 2024, §5: the model's own confidence foresees failure."""
    believed = hosted.call.inference.Generate(generate_message("France"))
    assert believed.risk == pytest.approx(1 - math.exp(believed.log_probability), abs=1e-9)
    assert 0 <= believed.risk < 0.1
    sampling = inference_pb2.Sampling(temperature=10.0, seed=1)
    assert hosted.call.inference.Generate(generate_message("France", sampling=sampling)).risk > 0.9


def test_an_answer_ends_at_its_length_and_before_a_stop_string(hosted: Hosted) -> None:
    short = hosted.call.inference.Generate(generate_message("France", max_new_tokens=1))
    assert short.finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert short.usage.generated_tokens == 1
    stopped = hosted.call.inference.Generate(generate_message("France", stop=["ris"]))
    assert (stopped.text, stopped.finish_reason) == ("Pa", inference_pb2.FINISH_REASON_STOP)


def test_the_likeliest_candidate_is_what_the_model_says(hosted: Hosted) -> None:
    request = inference_pb2.ScoreRequest(
        version="models/atlas", prompt=prompt_message(question("France").prompt), candidates=["Rome", "Paris", "Oslo"]
    )
    answer = hosted.call.inference.Score(request)
    assert answer.version == BASE
    assert [s.candidate for s in answer.scores] == list(request.candidates)
    assert max(answer.scores, key=lambda s: s.log_probability).candidate == "Paris"


class Endless:
    """An engine whose answers say one thing and never end."""

    def __init__(self) -> None:
        self.asked, self.cancelled = threading.Event(), threading.Event()

    def generate(self, request: Generation, *, deadline: float | None) -> GenerationHandle:
        handle = GenerationHandle(on_cancel=self.cancelled.set)
        handle.add("Par")
        self.asked.set()
        return handle


@pytest.fixture
def endless(hosted: Hosted) -> Iterator[Endless]:
    model = hosted.server.models.get("atlas")
    real, model.engine = model.engine, Endless()  # type: ignore[assignment]
    yield model.engine  # type: ignore[misc]
    model.engine = real


def test_a_caller_who_hangs_up_cancels_the_generation(hosted: Hosted, endless: Endless) -> None:
    call = hosted.call.inference.StreamGenerate(inference_pb2.StreamGenerateRequest(request=generate_message()))
    assert next(call).text == "Par"
    call.cancel()
    assert endless.cancelled.wait(SECONDS)


def test_a_caller_who_no_longer_waits_cancels_the_generation(hosted: Hosted, endless: Endless) -> None:
    call = hosted.call.inference.Generate.future(generate_message())
    assert endless.asked.wait(SECONDS)
    assert not endless.cancelled.is_set()
    call.cancel()
    assert endless.cancelled.wait(SECONDS)


def test_a_deadline_cancels_the_generation(hosted: Hosted, endless: Endless) -> None:
    ended = refused(lambda: hosted.call.inference.Generate(generate_message(), timeout=1.0))
    assert ended.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert endless.cancelled.wait(SECONDS)


def test_what_the_model_cannot_take_names_the_field_of_the_whole_request(hosted: Hosted) -> None:
    prompt = common_pb2.Prompt(text="word " * 5000)
    asked = inference_pb2.GenerateRequest(version=BASE, prompt=prompt)
    unary = refused(lambda: hosted.call.inference.Generate(asked))
    assert (unary.code, unary.reason, unary.field) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_PROMPT",
        "prompt.text",
    )
    streamed = refused(lambda: hosted.call.inference.StreamGenerate(inference_pb2.StreamGenerateRequest(request=asked)))
    assert streamed.field == "request.prompt.text"


def test_an_alias_is_resolved_anew_by_every_call(hosted: Hosted) -> None:
    version = hosted.version("Latvia")
    hosted.call.models.Promote(model_pb2.PromoteRequest(version=version, alias="latest-try"))
    request = generate_message(version="models/atlas/aliases/latest-try")
    assert hosted.call.inference.Generate(request).version == version
    hosted.call.models.Promote(model_pb2.PromoteRequest(version=BASE, alias="latest-try"))
    assert hosted.call.inference.Generate(request).version == BASE
