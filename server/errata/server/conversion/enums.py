"""Enums of the protos and of the editor and ledger, by name: a member that only one side has fails at import."""

from collections.abc import Mapping

from errata.editor.datasets.records import Kind
from errata.editor.evaluation import Metric
from errata.editor.methods import Method
from errata.editor.states import Component
from errata.server.ledger.rows import JobState, PublishState
from errata.v1 import common_pb2, edit_pb2, evaluation_pb2, measurement_pb2, model_pb2, trace_pb2

METHODS = {value: Method[name.removeprefix("METHOD_")] for name, value in edit_pb2.Method.items()[1:]}
"""The proto's Method → the editor's; METHOD_UNSPECIFIED is left to the default."""

METRICS = {value: Metric[name.removeprefix("METRIC_")] for name, value in evaluation_pb2.Metric.items()[1:]}
"""The proto's Metric → the editor's."""

COMPONENTS = {value: Component[name.removeprefix("COMPONENT_")] for name, value in trace_pb2.Component.items()[1:]}
"""The proto's Component → the editor's."""

CONSTRAINT_KINDS = {
    value: Kind[name.removeprefix("CONSTRAINT_KIND_")] for name, value in measurement_pb2.ConstraintKind.items()[1:]
}
"""The proto's ConstraintKind → the editor's."""

METHOD_VALUES = {method: value for value, method in METHODS.items()}
METRIC_VALUES = {metric: value for value, metric in METRICS.items()}
COMPONENT_VALUES = {component: value for value, component in COMPONENTS.items()}

STATES = {state: common_pb2.State.Value(f"STATE_{state.name}") for state in JobState}
"""The ledger's JobState → the proto's State."""

PUBLISH_STATES = {state: model_pb2.PublishState.Value(f"PUBLISH_STATE_{state.name}") for state in PublishState}
"""The ledger's PublishState → the proto's."""


def configured_guardrails(guardrails: Mapping[str, float]) -> dict[Metric, float]:
    """A model's guardrails as its settings spell them, `{"image_generalization": 0.8}`."""
    return {Metric[name.upper()]: least for name, least in guardrails.items()}
