"""Probes of parent and child, judged by what they really generate (methods.md §6)."""

import dataclasses
import json
import math
from contextlib import nullcontext

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import picture, question, random_delta, tiny_model

from errata.editor.delta import applied, empty_delta, merged
from errata.editor.errors import InvalidInputError, MemoryLimitError, PromptError, TargetError
from errata.editor.evaluation import (
    Evaluation,
    Metric,
    Probe,
    ProbeResult,
    Score,
    _entropy,
    evaluate,
    same_answer,
)
from errata.editor.memory import Memory
from errata.editor.model import EditableModel
from errata.editor.prompts import Prompt

TEXTS = ("What is the capital of this country?", "Where?", "What is this?", "Where is it?")


def probes(model: EditableModel) -> list[Probe]:
    return [Probe(metric=Metric.OTHER_SUBJECTS, prompt=question(model, t, s)) for s, t in enumerate(TEXTS)]


def reference(model: EditableModel) -> list[Prompt]:
    return [question(model, "Is this Rome?", 5), question(model, "Paris", 6)]


def test_answers_before_are_the_parents_and_answers_after_the_childs(model: EditableModel) -> None:
    delta = random_delta(model, {1: 3})
    prompts = [p.prompt for p in probes(model)]
    before = [a.text for a in model.generate(prompts)]
    with applied(model, delta):
        after = [a.text for a in model.generate(prompts)]
    found = evaluate(model, probes(model), applied(model, delta))
    assert [r.before for r in found.results] == before == [r.expected for r in found.results]
    assert [r.after for r in found.results] == after != before
    score = found.score(Metric.OTHER_SUBJECTS)
    assert (score.n, score.before) == (4, 1.0)
    assert score.after == sum(same_answer(a, b) for a, b in zip(after, before, strict=True)) / 4


def test_the_parent_of_a_chain_is_the_model_as_it_is_given(model: EditableModel) -> None:
    parent, edit = random_delta(model, {1: 3}), random_delta(model, {2: 2}, seed=4)
    with applied(model, parent):
        expected = [a.text for a in model.generate([p.prompt for p in probes(model)])]
        found = evaluate(model, probes(model), applied(model, edit))
    assert [r.before for r in found.results] == expected


def test_an_empty_edit_changes_no_answer_and_drifts_by_nothing(model: EditableModel) -> None:
    for child in (applied(model, empty_delta(model)), nullcontext()):
        found = evaluate(model, probes(model), child, reference=reference(model))
        assert found.drift == 0
        assert found.fluency == found.fluency_before
        assert all(r.passed and r.passed_before and r.forced == r.forced_before for r in found.results)
        assert found.harmonic_mean == 1


def test_drift_is_the_mean_kl_of_the_next_token_in_nats(model: EditableModel) -> None:
    delta = random_delta(model, {1: 3})
    found = evaluate(model, [], applied(model, delta), reference=reference(model))

    def next_token() -> torch.Tensor:
        last = [oracle.logits(model, model.encode(p))[-1] for p in reference(model)]
        return torch.stack(last).double().log_softmax(-1)

    before = next_token()
    with merged(model, delta):
        after = next_token()
    assert found.drift == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-4)
    assert found.drift > 0.01


def test_teacher_forcing_counts_the_tokens_that_are_likeliest_after_the_right_ones(model: EditableModel) -> None:
    probe = Probe(metric=Metric.EFFICACY, prompt=question(model), expected="the capital of Rome")
    row = model.encode(probe.prompt, probe.expected)
    guesses = oracle.logits(model, row).argmax(-1)[row.prompt_length - 1 : -1]
    found = evaluate(model, [probe], nullcontext()).results[0]
    assert found.forced == found.forced_before == float((guesses == row.answer).float().mean())
    assert (found.expected, found.passed) == ("the capital of Rome", False)


def test_what_the_model_generates_itself_is_what_teacher_forcing_calls_likeliest(llava: EditableModel) -> None:
    """Where its text is read back as the tokens it generated; an untrained model seldom writes such text."""
    found = evaluate(llava, probes(llava), nullcontext())
    for result in found.results:
        own = llava.generate([result.probe.prompt])[0]
        row = llava.encode(result.probe.prompt, own.text)
        if row.answer.tolist() == [*own.tokens, llava.end_token_id]:
            assert result.forced_before == 1.0


def test_probes_are_scored_by_metric_in_the_order_of_the_metrics(llama: EditableModel) -> None:
    answers = {t: llama.generate([question(llama, t)])[0].text for t in TEXTS}
    asked = [
        Probe(metric=Metric.PORTABILITY, prompt=question(llama, TEXTS[0]), expected=answers[TEXTS[0]], request="a"),
        Probe(metric=Metric.EFFICACY, prompt=question(llama, TEXTS[1]), expected=answers[TEXTS[1]]),
        Probe(metric=Metric.EFFICACY, prompt=question(llama, TEXTS[2]), expected="no such answer"),
    ]
    found = evaluate(llama, asked, nullcontext())
    assert [(s.metric, s.n, s.after) for s in found.scores] == [
        (Metric.EFFICACY, 2, 0.5),
        (Metric.PORTABILITY, 1, 1.0),
    ]
    assert found.harmonic_mean == pytest.approx(2 / (1 / 0.5 + 1 / 1.0))


def test_one_metric_at_zero_makes_the_harmonic_mean_zero(llama: EditableModel) -> None:
    asked = [*probes(llama), Probe(metric=Metric.EFFICACY, prompt=question(llama), expected="no such answer")]
    assert evaluate(llama, asked, nullcontext()).harmonic_mean == 0


def test_nothing_to_probe_is_an_empty_evaluation(llama: EditableModel) -> None:
    found = evaluate(llama, [], nullcontext())
    assert (found.results, found.scores, found.drift, found.fluency, found.harmonic_mean) == ((), (), 0, 0, 0)


def test_an_evaluation_is_plain_json_without_pictures(llava: EditableModel) -> None:
    found = evaluate(llava, probes(llava), applied(llava, random_delta(llava, {1: 2})), reference=reference(llava))
    told = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [p["prompt"] for p in told["probes"]] == list(TEXTS)
    assert {p["images"] for p in told["probes"]} == {1}
    assert told["scores"][0]["n"] == 4
    assert told["fluency_bits"]["before"] == pytest.approx(found.fluency_before)


def test_a_parent_that_answers_nothing_still_makes_a_score_and_json() -> None:
    model = tiny_model("llama")
    head = model.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(1e3 * torch.nn.functional.one_hot(torch.tensor(2), head.out_features).float())
    asked = [Probe(metric=Metric.UNRELATED, prompt=Prompt(text=t)) for t in TEXTS]
    asked.append(Probe(metric=Metric.EFFICACY, prompt=Prompt(text="What?"), expected="Rome"))
    found = evaluate(model, asked, nullcontext())
    assert found.score(Metric.UNRELATED).after == 1
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("passed", "n", "expected"),
    [(0, 10, (0.0, 0.2775)), (5, 10, (0.2366, 0.7634)), (10, 10, (0.7225, 1.0)), (81, 263, (0.2553, 0.3662))],
)
def test_the_interval_is_wilsons(passed: int, n: int, expected: tuple[float, float]) -> None:
    """The last one is Newcombe's example (1998, table I)."""
    score = Score(metric=Metric.EFFICACY, n=n, before=0, after=passed / n, forced_before=0, forced=0)
    assert score.interval == pytest.approx(expected, abs=1e-4)


@given(n=st.integers(1, 500), data=st.data())
def test_an_interval_holds_its_share_and_stays_between_0_and_1(n: int, data: st.DataObject) -> None:
    share = data.draw(st.integers(0, n)) / n
    low, high = Score(metric=Metric.EFFICACY, n=n, before=0, after=share, forced_before=0, forced=0).interval
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1


def test_fluency_is_the_weighted_entropy_of_two_and_three_grams_in_bits() -> None:
    """By hand: bigrams 12 12 23 31 are 1.5 bits, trigrams 123 231 312 are log₂3; weights 2/3 and 4/3, halved."""
    expected = (2 / 3 * 1.5 + 4 / 3 * math.log2(3)) / 2
    assert _entropy([(1, 2, 3, 1, 2)]) == pytest.approx(expected)
    assert _entropy([(1, 2), (3, 1, 2, 3)]) == pytest.approx((2 / 3 * 1.5 + 4 / 3 * 1) / 2)
    assert _entropy([(7,) * 32]) == 0
    assert _entropy([]) == _entropy([(), (1,)]) == 0


@pytest.mark.parametrize("chat", [False, True])
def test_a_parent_whose_answer_fills_the_context_is_evaluated(model: EditableModel, chat: bool) -> None:
    """Its text is often more tokens than it generated, and a chat template's end is one more."""
    holds = model.context_length
    assert holds is not None
    short = dataclasses.replace(question(model, "What"), chat=chat)
    for left in (1, 5):
        words = holds - left - len(model.encode(short).ids)
        prompt = dataclasses.replace(short, text="What" + " capital" * words)
        (result,) = evaluate(model, [Probe(metric=Metric.UNRELATED, prompt=prompt)], nullcontext()).results
        assert result.before == result.after == model.generate([prompt])[0].text
        assert result.passed
        assert result.forced == result.forced_before or (math.isnan(result.forced) and not result.before)


@pytest.mark.parametrize("believed", ["Rome " * 300, "</s>", " "])
def test_what_a_parent_cannot_have_said_is_not_counted(llama: EditableModel, believed: str) -> None:
    asked = [Probe(metric=Metric.SAME_IMAGE, prompt=question(llama), believed=believed), probes(llama)[1]]
    assert [r.probe for r in evaluate(llama, asked, nullcontext()).results] == asked[1:]


@pytest.mark.parametrize(
    ("text", "expected", "error", "field"),
    [
        ("q" * 300, None, PromptError, "probes[1].prompt.text"),
        ("What?", " ", TargetError, "probes[1].expected"),
        ("What?", "</s>", TargetError, "probes[1].expected"),
        ("What?", "Rome " * 300, PromptError, "probes[1].expected"),
    ],
)
def test_an_error_names_the_probe_and_its_part(
    llama: EditableModel, text: str, expected: str | None, error: type[InvalidInputError], field: str
) -> None:
    bad = Probe(metric=Metric.EFFICACY, prompt=Prompt(text=text), expected=expected)
    with pytest.raises(error) as refused:
        evaluate(llama, [probes(llama)[0], bad], nullcontext())
    assert refused.value.field == field
    with pytest.raises(PromptError) as refused:
        evaluate(llama, [], nullcontext(), reference=[*reference(llama), Prompt(text="q" * 300)])
    assert refused.value.field == "reference[2].prompt.text"


def test_reference_prompts_that_memory_does_not_hold_together_are_read_one_by_one(llama: EditableModel) -> None:
    whole = evaluate(llama, [], applied(llama, random_delta(llama, {1: 3})), reference=reference(llama) * 3)
    rows = [len(llama.encode(p).ids) + 32 for p in reference(llama)]
    little = Memory(free=lambda: int(1.3 * max(rows) * llama.token_bytes))
    found = evaluate(
        llama, [], applied(llama, random_delta(llama, {1: 3})), reference=reference(llama) * 3, memory=little
    )
    assert found.fluency == whole.fluency
    assert found.drift == pytest.approx(whole.drift, rel=1e-4)
    with pytest.raises(MemoryLimitError, match="one row takes about"):
        evaluate(llama, [], nullcontext(), reference=reference(llama), memory=Memory(free=lambda: 1000))


def test_fluency_is_measured_on_freely_generated_text(llama: EditableModel) -> None:
    found = evaluate(llama, [], nullcontext(), reference=reference(llama))
    texts = [a.tokens for a in llama.generate(reference(llama), max_new_tokens=32)]
    assert found.fluency_before == _entropy(texts) > 0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Paris", " paris. ", True),
        ("STRASSE", "straße", True),
        ("Dar es Salaam", "Dar es  Salaam", False),
        ("Paris", "Pari", False),
        ("", "", True),
        ("3.5", "35", False),
    ],
)
def test_answers_are_the_same_but_for_case_spaces_and_a_full_stop(one: str, other: str, same: bool) -> None:
    assert same_answer(one, other) is same is same_answer(other, one)


def test_a_result_passes_by_what_was_generated_not_by_teacher_forcing() -> None:
    probe = Probe(metric=Metric.EFFICACY, prompt=Prompt(text="What?", images=(picture(),)))
    result = ProbeResult(probe=probe, before="Rome", after="Oslo", expected="rome.", forced_before=0.0, forced=1.0)
    assert (result.passed_before, result.passed) == (True, False)
    assert Evaluation(results=(result,), drift=0, fluency_before=0, fluency=0).score(Metric.EFFICACY).forced == 1.0
