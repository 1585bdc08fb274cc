"""Every model family answers in mixed batches as each version does alone: sliding windows, other positions and all."""

import oracle
import pytest
import torch
from alone import WAIT, StartEngine, alone, prompts_of
from tiny import ARCHITECTURES, question, random_delta, tiny_model, whole_window_model

from errata.editor.delta import applied
from errata.editor.mixed import MixedDeltas, version_factors
from errata.server.engine import Generation
from errata.server.engine.scoring import log_probabilities

# PaliGemma's processor, of its own code.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_mixed_batch_of_any_architecture_answers_like_each_version_alone(
    name: str, start_engine: StartEngine
) -> None:
    model = tiny_model(name)
    lineages = {0: [], 1: [random_delta(model, {1: 1}, seed=1)], 2: [random_delta(model, {1: 3, 2: 5}, seed=2)]}
    asked = [(v, p, 3 + (5 * i + v) % 9) for i, p in enumerate(prompts_of(model)) for v in lineages]
    engine = start_engine(model, lineages, max_rows=8)
    handles = [engine.generate(Generation(version=v, prompt=p, max_new_tokens=n)) for v, p, n in asked]
    for (version, prompt, tokens), handle in zip(asked, handles, strict=True):
        assert handle.result(WAIT).text == alone(model, prompt, lineages[version], tokens).text


def test_a_window_that_no_layer_slides_by_hides_nothing_in_a_batch(start_engine: StartEngine) -> None:
    model = whole_window_model()
    engine = start_engine(model, {0: []}, max_rows=8)
    handles = [engine.generate(Generation(version=0, prompt=p, max_new_tokens=6)) for p in prompts_of(model)]
    for prompt, handle in zip(prompts_of(model), handles, strict=True):
        assert handle.result(WAIT).text == alone(model, prompt, [], 6).text


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_of_any_architecture_are_those_of_the_version_alone(name: str) -> None:
    model = tiny_model(name)
    delta, prompt = random_delta(model, {1: 2}, 1), question(model)
    rows = [model.encode(prompt, answer) for answer in ("Rome", "Paris Rome Paris", "the capital")]
    with MixedDeltas(model) as mixed, torch.inference_mode():
        factors, answers = version_factors(model, [delta]), [row.answer for row in rows]
        chunks = list(log_probabilities(model, mixed, factors, model.encode(prompt), answers, max_tokens=10**6))
    with applied(model, delta):
        expected = [float(oracle.answer_log_probabilities(model, row).sum()) for row in rows]
    assert [score for chunk in chunks for score in chunk] == pytest.approx(expected, rel=1e-4, abs=1e-4)
