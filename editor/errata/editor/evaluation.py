"""What an edit did: probes asked of the untouched parent and of the edited child (metrics: methods of ROME, MEMIT, …).

Judged by what the model really generates, greedily and stopping by itself; teacher-forced accuracy stands beside it,
because it is what the literature mostly reports and it flatters (Yang et al. 2025).

Prompts are read once. The expected answer is the draft of what is generated (`answering`), so that one pass tells both,
and questions about one picture share it.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import compress

import numpy as np
import torch

from errata.editor.answering import Answered, answer_rows
from errata.editor.errors import InvalidInputError
from errata.editor.memory import Memory
from errata.editor.model import EditableModel, Encoded, ReadPrompt, by_length, naming, same_answer
from errata.editor.prompts import Prompt


class Metric(StrEnum):
    """What a probe measures."""

    EFFICACY = "efficacy"
    IMAGE_GENERALIZATION = "image generalization"
    PHRASING_GENERALIZATION = "phrasing generalization"
    OTHER_SUBJECTS = "specificity: other subjects"
    SAME_IMAGE = "specificity: same image, other questions"
    UNRELATED = "specificity: unrelated prompts"
    PORTABILITY = "portability"


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One question. `expected` is the right answer after the edit; None: whatever the parent answers.

    `believed` makes it count only where the parent answers that: what it gets wrong cannot be lost.
    """

    metric: Metric
    prompt: Prompt
    expected: str | None = None
    request: str | None = None
    believed: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """A probe with its answers before and after, by generation, and what teacher forcing makes of it.

    `forced` is the share of the expected answer's tokens that are most likely, each after the right ones before it.
    """

    probe: Probe = field(repr=False)
    before: str
    after: str
    expected: str
    forced_before: float
    forced: float

    @property
    def passed(self) -> bool:
        """Whether the child generates the expected answer."""
        return same_answer(self.after, self.expected)

    @property
    def passed_before(self) -> bool:
        """Whether the parent did."""
        return same_answer(self.before, self.expected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """A metric over n probes: shares between 0 and 1, by generation and by teacher forcing, before and after."""

    metric: Metric
    n: int
    before: float
    after: float
    forced_before: float
    forced: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `after`."""
        z, p, n = 1.96, self.after, self.n
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Every probe's result, and what was measured on the reference prompts.

    `drift` is the mean KL(parent ‖ child) of the next token on reference prompts, in nats. `fluency_before` and
    `fluency` are the weighted 2- and 3-gram entropies of freely generated text, in bits (Meng et al. 2022, §3.3).
    """

    results: tuple[ProbeResult, ...]
    drift: float
    fluency_before: float
    fluency: float

    @property
    def scores(self) -> tuple[Score, ...]:
        """One score for every metric that was probed."""
        found = []
        for metric in Metric:
            rows = [r for r in self.results if r.probe.metric is metric]
            if rows:
                found.append(
                    Score(
                        metric=metric,
                        n=len(rows),
                        before=float(np.mean([r.passed_before for r in rows])),
                        after=float(np.mean([r.passed for r in rows])),
                        forced_before=_mean([r.forced_before for r in rows]),
                        forced=_mean([r.forced for r in rows]),
                    )
                )
        return tuple(found)

    def score(self, metric: Metric) -> Score:
        """The score of one metric. Raises InvalidInputError where no probe measured it."""
        found = next((s for s in self.scores if s.metric is metric), None)
        if found is None:
            raise InvalidInputError(f"no probe measured {metric.value!r}; ask one that does", field="probes")
        return found

    @property
    def harmonic_mean(self) -> float:
        """Of all scores by generation: 0 as soon as one of them is."""
        shares = [s.after for s in self.scores]
        return len(shares) / sum(1 / s for s in shares) if shares and all(shares) else 0.0

    def to_json(self) -> dict[str, object]:
        """The evaluation as plain values, pictures left out."""
        return {
            "harmonic_mean": self.harmonic_mean,
            "drift_nats": self.drift,
            "fluency_bits": {"before": self.fluency_before, "after": self.fluency},
            "scores": [
                {
                    "metric": s.metric.value,
                    "n": s.n,
                    "before": s.before,
                    "after": s.after,
                    "interval95": list(s.interval),
                    "teacher_forced": {"before": _known(s.forced_before), "after": _known(s.forced)},
                }
                for s in self.scores
            ],
            "probes": [
                {
                    "metric": r.probe.metric.value,
                    "request": r.probe.request,
                    "prompt": r.probe.prompt.text,
                    "images": len(r.probe.prompt.images),
                    "expected": r.expected,
                    "before": r.before,
                    "after": r.after,
                    "passed": r.passed,
                    "teacher_forced": {"before": _known(r.forced_before), "after": _known(r.forced)},
                }
                for r in self.results
            ],
        }


def _known(share: float) -> float | None:
    return None if math.isnan(share) else share


def _mean(shares: Sequence[float]) -> float:
    """The mean without the NaN of probes whose expected answer is empty; NaN where that are all."""
    known = [s for s in shares if not math.isnan(s)]
    return float(np.mean(known)) if known else math.nan


def evaluate(
    model: EditableModel,
    probes: Sequence[Probe],
    child: AbstractContextManager[object],
    *,
    reference: Sequence[Prompt] = (),
    max_new_tokens: int = 16,
    memory: Memory | None = None,
    field: Callable[[int], str] = "probes[{}]".format,
) -> Evaluation:
    """Asks every probe before and while `child` is open, which makes `model` answer as edited.

    Answers before come from the model as it is given, the parent. Probes whose `believed` the parent does not answer
    are left out. `reference` are prompts for drift and fluency. Batches are cut to what `memory` holds, None: the
    device's own; raises MemoryLimitError where not even one prompt fits, and InvalidInputError and its kinds, naming
    `field` of the probe's number or the reference, for a prompt that cannot be asked and an expected answer that cannot
    be written behind it.
    """

    def answers(rows: Sequence[Encoded]) -> list[Answered]:
        return answer_rows(model, rows, max_new_tokens=max_new_tokens, memory=memory)

    read, drafted = _drafted(model, probes, field)
    # Before anything is generated, as the probes' own prompts are.
    references = model.encode_all(reference, lambda i: f"reference[{i}]")
    asked = answers(drafted)
    counted = [p.believed is None or same_answer(p.believed, b.answer.text) for p, b in zip(probes, asked, strict=True)]
    probes, before, read = (
        list(compress(probes, counted)),
        list(compress(asked, counted)),
        list(compress(read, counted)),
    )
    expected = [p.expected if p.expected is not None else b.answer.text for p, b in zip(probes, before, strict=True)]
    rows = [
        r.said(b.answer) if p.expected is None else _behind(r, p.expected)
        for r, p, b in zip(read, probes, before, strict=True)
    ]
    forced_before = [b.agreed if p.expected else math.nan for p, b in zip(probes, before, strict=True)]
    # Of its own tokens the parent finds each the likeliest; they are read again where its text is written in others.
    own = [n for n, p in enumerate(probes) if not p.expected]
    others = [n for n in own if rows[n].answer.tolist() != list(before[n].tokens[: len(rows[n].answer)])]
    for n in own:
        forced_before[n] = 1.0 if len(rows[n].answer) else math.nan
    for n, told in zip(others, answers([rows[n] for n in others]), strict=True):
        forced_before[n] = told.agreed
    distributions, text_before = _next_token(model, references, memory), _free_text(model, references, memory)
    with child:
        after = answers(rows)
        drifted, text = _next_token(model, references, memory), _free_text(model, references, memory)
    results = tuple(
        ProbeResult(
            probe=p, before=b.answer.text, after=a.answer.text, expected=e, forced_before=forced, forced=a.agreed
        )
        for p, b, a, e, forced in zip(probes, before, after, expected, forced_before, strict=True)
    )
    return Evaluation(
        results=results,
        drift=_mean_kl(distributions, drifted),
        fluency_before=_entropy(text_before),
        fluency=_entropy(text),
    )


def _drafted(
    model: EditableModel, probes: Sequence[Probe], field: Callable[[int], str]
) -> tuple[list[ReadPrompt], list[Encoded]]:
    """Every probe's prompt, alone and with a draft of what the parent says; errors name the probe's part."""
    read, drafted = [], []
    for i, probe in enumerate(probes):
        with naming(field(i)):
            prompt = model.read(probe.prompt)
            read.append(prompt)
            try:
                drafted.append(_behind(prompt, probe.expected or probe.believed or ""))
            except InvalidInputError as error:
                if probe.expected:
                    error.field = "expected"
                    raise
                # What the parent is believed to say is a good draft of it, and no more than that.
                drafted.append(prompt.row)
    return read, drafted


def _behind(prompt: ReadPrompt, answer: str) -> Encoded:
    """The prompt's row with the answer behind it, if there is one."""
    return prompt.answered(answer) if answer else prompt.row


def next_token_logits(model: EditableModel, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
    """The next token's logits after each prompt, in float64 on the CPU."""
    return _next_token_logits(model, model.encode_all(prompts))


def _next_token_logits(
    model: EditableModel, rows: Sequence[Encoded], memory: Memory | None = None
) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}

    def run(batch: Sequence[int]) -> None:
        with torch.inference_mode():
            logits = model.model(**model.inputs([rows[i] for i in batch]), use_cache=False, logits_to_keep=1).logits
        found.update(zip(batch, logits[:, -1].double().cpu(), strict=True))

    memory = memory or Memory.of(model.device)
    for batch in by_length(rows, 64):
        memory.parts(run, batch, most=64, row_bytes=len(rows[batch[0]].ids) * model.token_bytes)
    return [found[i] for i in range(len(rows))]


def _next_token(model: EditableModel, rows: Sequence[Encoded], memory: Memory | None) -> list[torch.Tensor]:
    return [logits.log_softmax(-1) for logits in _next_token_logits(model, rows, memory)]


def _mean_kl(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float:
    pairs = zip(before, after, strict=True)
    return float(np.mean([float((b.exp() * (b - a)).sum()) for b, a in pairs])) if before else 0.0


def _free_text(model: EditableModel, rows: Sequence[Encoded], memory: Memory | None) -> list[tuple[int, ...]]:
    return [a.answer.tokens for a in answer_rows(model, rows, max_new_tokens=32, memory=memory)]


def _entropy(texts: Sequence[Sequence[int]]) -> float:
    """Weighted 2- and 3-gram entropy of all texts together, in bits, weights 2/3 and 4/3 (Meng et al. 2022)."""

    def bits(n: int) -> float:
        grams: Mapping[tuple[int, ...], int] = Counter(
            tuple(t[i : i + n]) for t in texts for i in range(len(t) - n + 1)
        )
        total = sum(grams.values())
        return -sum(c / total * math.log2(c / total) for c in grams.values()) if total else 0.0

    return (2 * bits(2) + 4 * bits(3)) / 3 / 2
