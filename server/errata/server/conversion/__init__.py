"""Between the wire and the editor: protos in, checked, and protos out.

The limits that the protos' comments state are enforced here and not by protovalidate, whose annotations would make
every client import `buf.validate`. Knows nothing about jobs being run, models in memory or gRPC.
"""

from errata.server.conversion.decode import Decoder
from errata.server.conversion.encode import (
    alias_message,
    audit_message,
    causal_trace_result,
    edit_message,
    edit_outcome,
    ended_summary,
    evaluation_message,
    evaluation_outcome,
    job_message,
    model_message,
    outcome_message,
    planned_edit,
    planned_evaluation,
    planned_trace,
    probe_result_message,
    question_trace,
    score_message,
    scores_from_json,
    scores_json,
    settings_message,
    trace_message,
    version_message,
)
from errata.server.conversion.enums import COMPONENTS, METHODS, METRICS, PUBLISH_STATES, STATES, configured_guardrails
from errata.server.conversion.findings import measurement_message, measurement_outcome, planned_measurement
from errata.server.conversion.limits import page_size, request_id
from errata.server.conversion.measuring import SETTINGS, within_settings
from errata.server.conversion.orders import (
    EditOrder,
    EvaluationOrder,
    GenerateOrder,
    MeasurementOrder,
    Promotion,
    ScoreOrder,
    TraceOrder,
    promotion,
)

__all__ = [
    "COMPONENTS",
    "METHODS",
    "METRICS",
    "PUBLISH_STATES",
    "SETTINGS",
    "STATES",
    "Decoder",
    "EditOrder",
    "EvaluationOrder",
    "GenerateOrder",
    "MeasurementOrder",
    "Promotion",
    "ScoreOrder",
    "TraceOrder",
    "alias_message",
    "audit_message",
    "causal_trace_result",
    "configured_guardrails",
    "edit_message",
    "edit_outcome",
    "ended_summary",
    "evaluation_message",
    "evaluation_outcome",
    "job_message",
    "measurement_message",
    "measurement_outcome",
    "model_message",
    "outcome_message",
    "page_size",
    "planned_edit",
    "planned_evaluation",
    "planned_measurement",
    "planned_trace",
    "probe_result_message",
    "promotion",
    "question_trace",
    "request_id",
    "score_message",
    "scores_from_json",
    "scores_json",
    "settings_message",
    "trace_message",
    "version_message",
    "within_settings",
]
