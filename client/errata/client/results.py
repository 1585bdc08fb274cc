"""What the server answers, frozen. Shares and probabilities are 0-1, log-probabilities and losses in nats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Protocol, TypeAlias

from errata.client.inputs import Component, Method, Metric
from errata.client.names import last_part, model_part

JsonValue: TypeAlias = "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
"""Anything that JSON says."""


class State(StrEnum):
    """Where a piece of work stands."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    REJECTED = "rejected"
    UNKNOWN = "unknown"
    """One that this release does not know."""

    @property
    def ended(self) -> bool:
        """Whether it will change no more."""
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED, State.REJECTED)


class VersionState(StrEnum):
    """Whether a version passed its guardrails, or has none. A rejected one is promoted only with an override."""

    READY = "ready"
    REJECTED = "rejected"
    UNKNOWN = "unknown"
    """One that this release does not know."""


class PublishState(StrEnum):
    """Whether a version is in MLflow yet. NONE: the base, or a server without MLflow."""

    PENDING = "pending"
    PUBLISHED = "published"
    NONE = "none"
    UNKNOWN = "unknown"
    """One that this release does not know."""


class DerivationKind(StrEnum):
    """Which operation a derivation is."""

    REVERT = "revert"
    COMPOSE = "compose"
    REBASE = "rebase"
    SQUASH = "squash"
    IMPORT = "import"
    UNKNOWN = "unknown"
    """One that this release does not know."""


class FinishReason(StrEnum):
    """Why an answer ended: by itself, at `max_new_tokens`, or at one of the `stop` strings."""

    END = "end"
    LENGTH = "length"
    STOP = "stop"
    UNKNOWN = "unknown"
    """One that this release does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """A name for a version. Give `etag` to `promote` to move it only from where you saw it."""

    name: str
    version: str
    etag: str

    @property
    def alias(self) -> str:
        """Without its prefix: "champion"."""
        return last_part(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A base model. What only loading it tells is empty or 0 until it was loaded once."""

    name: str
    base_sha256: str
    architecture: str
    loaded: bool
    memory_bytes: int
    dtype: str
    device: str
    layers: int
    aliases: tuple[Alias, ...]
    versions_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricScore:
    """A metric over `n` probes.

    `before` and `after` are shares by generation, `forced` the share of tokens by teacher forcing, `low` and `high`
    the ends of the 95 % Wilson interval of `after`.
    """

    metric: Metric
    n: int
    before: float
    after: float
    forced: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A base model with an ordered list of deltas.

    The one of `edit` and `derivation` that made it is set; both, and `parent`, are empty for the base.
    """

    name: str
    parent: str
    edit: str
    state: VersionState
    base_sha256: str
    delta_sha256: str
    delta_bytes: int
    layers: tuple[int, ...]
    scores: tuple[MetricScore, ...]
    aliases: tuple[str, ...]
    publish_state: PublishState
    mlflow_version: int
    mlflow_run_id: str
    created_by: str
    create_time: datetime | None
    facts: tuple[str, ...]
    rejections: tuple[str, ...]
    derivation: str

    @property
    def number(self) -> int:
        """Its number; 0 is the base."""
        return int(last_part(self.name))

    @property
    def model(self) -> str:
        """Its model's name without the prefix: "atlas"."""
        return model_part(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One change, for the record."""

    time: datetime | None
    actor: str
    action: str
    resource: str
    details: Mapping[str, JsonValue] = field(hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a piece of work is: `done` of `total` steps of `stage`; `total` is 0 where it is not known."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a piece of work failed. `field` is the part of the request at fault, empty where none is."""

    reason: str
    message: str
    field: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all pieces of work have in common. `error` is set where it failed; times are None until they come."""

    state: State
    progress: Progress
    error: Failure | None
    created_by: str
    create_time: datetime | None
    start_time: datetime | None
    end_time: datetime | None


class Work(Protocol):
    """A piece of work: a causal trace, an edit, an evaluation, a derivation, a bisection."""

    @property
    def name(self) -> str:
        """Its full name; empty where it was only validated."""

    @property
    def job(self) -> Job:
        """Where it stands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EffectGrid:
    """Indirect effects p(restored) − p(corrupted), layers × roles or tokens; NaN where no question has that role.

    `deviations` are over the questions, in the same shape, and empty for one question.
    """

    component: Component
    effects: tuple[tuple[float, ...], ...] = field(repr=False)
    deviations: tuple[tuple[float, ...], ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionTrace:
    """The trace of one question. `constraint` indexes `tokens`; the grids are layers × tokens."""

    question: str
    answer: str
    tokens: tuple[str, ...]
    constraint: tuple[int, ...]
    clean: float
    corrupted: float
    clean_first: float
    corrupted_first: float
    grids: tuple[EffectGrid, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalTraceResult:
    """The effects of every site, averaged over the questions; the grids are layers × `roles`.

    `auto_layers` are those that "auto" would edit, `auto_refusal` says why it would not. `skipped` are questions whose
    corruption did not corrupt.
    """

    roles: tuple[str, ...]
    total_effect: float
    total_effect_deviation: float
    grids: tuple[EffectGrid, ...]
    clean: float
    corrupted: float
    traces: tuple[QuestionTrace, ...] = field(repr=False)
    auto_layers: tuple[int, ...]
    auto_refusal: str
    skipped: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CausalTrace:
    """A causal trace; `result` is None until it succeeded, and in lists."""

    name: str
    version: str
    job: Job
    questions: int
    window: int
    result: CausalTraceResult | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EditSettings:
    """How an edit was solved; None where the server has not said."""

    method: Method
    preservation: float | None
    ridge: float | None
    steps: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutcome:
    """How one request's value went; `losses` are the target's, step by step."""

    name: str
    target: str
    before: str
    converged: bool
    losses: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """An edit, and the version that it made. What is not known yet is empty or None; lists leave outcomes out.

    Where `job.state` is REJECTED its version is below a guardrail, and `rejections` say which.
    """

    name: str
    parent: str
    job: Job
    version: str
    requests: int
    facts: tuple[str, ...]
    settings: EditSettings | None
    layers: tuple[int, ...]
    outcomes: tuple[RequestOutcome, ...] = field(repr=False)
    scores: tuple[MetricScore, ...] = field(repr=False)
    rejections: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    """A probe's answers by the parent (`before`) and the child (`after`). `request` is empty where it has none."""

    metric: Metric
    question: str
    expected: str
    before: str
    after: str
    passed: bool
    request: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The same probes asked of two versions; scores and results are empty before it ended, results in lists.

    `drift` is the mean KL(baseline ‖ version) of the next token over the probes that must stay.
    """

    name: str
    version: str
    baseline: str
    job: Job
    scores: tuple[MetricScore, ...]
    drift: float
    results: tuple[ProbeResult, ...] = field(repr=False)
    rejections: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionFact:
    """One edit's fact, and the version whose edit it is. `fact` is empty where the whole version is meant."""

    version: str
    fact: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """Two edits that speak against each other: `first` suffers from `second`.

    `key_overlap` is the largest cosine between the directions that both deltas read. `question` is one that the first
    edit's own version answers with `expected` and the composition with `answer`; it is empty where the requests alone
    contradict each other: then `answer` is what the second edit installs.
    """

    first: VersionFact
    second: VersionFact
    key_overlap: float
    question: str
    expected: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LaterEdit:
    """An edit that was computed on top of a reverted one. `scores` are of its own probes, before and after."""

    version: str
    facts: tuple[str, ...]
    scores: tuple[MetricScore, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Equality:
    """How nearly a squashed version equals the chain that it joins, over `n` probes; ranks are sums over layers."""

    max_logit_difference: float
    n: int
    same_answers: int
    rank_before: int
    rank_after: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Derivation:
    """A version made of versions. What is not known yet is empty or None.

    Lists leave conflicts, later edits and reverted probes out. `reverted` are the probes of the edit that a revert
    took away, beside what the version before that edit answers; they are its scores where no other edit judges it.
    """

    name: str
    parent: str
    kind: DerivationKind
    job: Job
    version: str
    sources: tuple[str, ...]
    facts: tuple[str, ...]
    layers: tuple[int, ...]
    conflicts: tuple[Conflict, ...]
    later: tuple[LaterEdit, ...]
    equality: Equality | None
    scores: tuple[MetricScore, ...] = field(repr=False)
    rejections: tuple[str, ...]
    reverted: tuple[ProbeResult, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDifference:
    """How far one layer's weight differs: ‖ΔW‖ of the difference relative to ‖W‖ of the base, and its rank."""

    layer: int
    relative_norm: float
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerPair:
    """What two versions say to one question; `expected` and `request` are empty where there are none."""

    question: str
    expected: str
    first: str
    second: str
    request: str

    @property
    def changed(self) -> bool:
        """Whether the answers differ."""
        return self.first != self.second


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What two versions differ in: facts that only one has, layers, and both answers to every probe, in order."""

    first: str
    second: str
    only_first: tuple[VersionFact, ...]
    only_second: tuple[VersionFact, ...]
    layers: tuple[LayerDifference, ...]
    answers: tuple[AnswerPair, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class BisectionStep:
    """One version that was tried, and the probes that it failed."""

    version: str
    good: bool
    failed: tuple[ProbeResult, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bisection:
    """A search for the version that broke a probe; `first_bad` is empty until it is found, `steps` in lists.

    `steps` are all that were asked; of `good` and `bad` themselves only what the halves lead to.
    """

    name: str
    good: str
    bad: str
    job: Job
    first_bad: str
    facts: tuple[str, ...]
    steps: tuple[BisectionStep, ...] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """An answer. `log_probability` is Σ log p of its tokens; `seed` is None where it was greedy.

    `risk` is 1 − p(answer), 0 to 1: the higher, the likelier wrong. It ranks answers, and is no calibrated probability.
    """

    version: str
    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    log_probability: float
    seed: int | None
    risk: float

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateScore:
    """log p of a whole answer, its end included, and its number of tokens, its end included."""

    candidate: str
    log_probability: float
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How likely each candidate is, in the request's order, and the version that was asked."""

    version: str
    candidates: tuple[CandidateScore, ...]

    @property
    def best(self) -> CandidateScore:
        """The likeliest candidate."""
        return max(self.candidates, key=lambda each: each.log_probability)
