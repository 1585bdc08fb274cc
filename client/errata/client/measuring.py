"""The calls of measurements, as `calls.py` has those of everything else."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from errata.client import findings, requests
from errata.client.calls import Call, call_of, work_calls
from errata.client.errors import InvalidInputError
from errata.client.inputs import Constraint, Context, EditRequest, Probe
from errata.client.measurements import KINDS, Box, Corruption, MeasuredQuestion, MeasurementSettings, OtherImages
from errata.client.names import NameLike, full_name
from errata.v1 import measurement_pb2, trace_pb2

MEASUREMENTS = work_calls("MeasurementService", "Measurement", measurement_pb2, findings.measurement)


def create_measurement(
    version: NameLike,
    settings: MeasurementSettings | str,
    questions: Sequence[MeasuredQuestion],
    *,
    requests: Sequence[EditRequest] = (),
    probes: Sequence[Probe] = (),
    references: Sequence[Context] = (),
    request_id: str = "",
    validate_only: bool = False,
) -> Call[findings.Measurement]:
    """Queues a measurement. Raises InvalidInputError for a kind or a setting that the API does not have."""
    request = _request(version, questions, requests, probes, references, request_id, validate_only)
    _set(request, settings)
    return call_of(
        "MeasurementService/CreateMeasurement",
        request,
        measurement_pb2.CreateMeasurementResponse.FromString,
        lambda said: findings.measurement(said.measurement),
    )


def measurement_file(measurement: NameLike, file: str) -> Call[bytes]:
    """One of a measurement's files."""
    return call_of(
        "MeasurementService/GetMeasurementFile",
        measurement_pb2.GetMeasurementFileRequest(name=full_name(measurement), file=file),
        measurement_pb2.GetMeasurementFileResponse.FromString,
        lambda said: said.data,
    )


def fields_of(kind: str) -> dict[str, FieldDescriptor]:
    """The settings of a kind as the wire has them, by name. Raises InvalidInputError for a kind that there is not."""
    if kind not in KINDS:
        raise InvalidInputError.at("settings", f"nothing is measured by {kind!r}; give one of {', '.join(KINDS)}")
    wire = measurement_pb2.CreateMeasurementRequest.DESCRIPTOR.fields_by_name[kind].message_type
    return {field.name: field for field in (wire.fields if wire else ())}


def words_of(field: FieldDescriptor) -> dict[str, int]:
    """What an enum's members are called here, "mlp", and their numbers."""
    values = field.enum_type.values if field.enum_type else []
    prefix = values[0].name.removesuffix("UNSPECIFIED")
    return {value.name.removeprefix(prefix).lower(): value.number for value in values[1:]}


def _request(
    version: NameLike,
    questions: Sequence[MeasuredQuestion],
    facts: Sequence[EditRequest],
    probes: Sequence[Probe],
    references: Sequence[Context],
    request_id: str,
    validate_only: bool,
) -> measurement_pb2.CreateMeasurementRequest:
    return measurement_pb2.CreateMeasurementRequest(
        version=full_name(version),
        questions=[_question(each, f"questions[{i}]") for i, each in enumerate(questions)],
        requests=requests.edit_requests(facts),
        probes=requests.probes(probes),
        references=requests.contexts(references, "references"),
        request_id=request_id or requests.new_request_id(),
        validate_only=validate_only,
    )


def _question(given: MeasuredQuestion, field: str) -> measurement_pb2.MeasuredQuestion:
    constraints = [given.constraints] if isinstance(given.constraints, (str, Constraint)) else given.constraints
    corruptions = [given.corruptions] if isinstance(given.corruptions, (str, OtherImages)) else given.corruptions
    return measurement_pb2.MeasuredQuestion(
        prompt=requests.prompt(given.prompt, f"{field}.prompt"),
        constraints=map(requests.constraint, constraints),
        corruptions=[_corruption(each, f"{field}.corruptions[{i}]") for i, each in enumerate(corruptions)],
        answer=given.answer,
        box=None if given.box is None else _box(given.box),
        kinds=[_kind(each, f"{field}.kinds[{i}]") for i, each in enumerate(given.kinds)],
    )


def _kind(given: str, field: str) -> measurement_pb2.ConstraintKind.ValueType:
    words = words_of(measurement_pb2.MeasuredQuestion.DESCRIPTOR.fields_by_name["kinds"])
    if given not in words:
        raise InvalidInputError.at(field, f"no kind of constraint is called {given!r}; give one of {', '.join(words)}")
    return measurement_pb2.ConstraintKind.ValueType(words[given])


def _box(given: Box) -> measurement_pb2.Box:
    return measurement_pb2.Box(left=given.left, top=given.top, right=given.right, bottom=given.bottom)


def _corruption(given: Corruption, field: str) -> measurement_pb2.Corruption:
    if isinstance(given, str):
        return measurement_pb2.Corruption(substitute=given)
    images = requests.images(given.images, f"{field}.other_images.images")
    return measurement_pb2.Corruption(other_images=trace_pb2.OtherImages(images=images))


def _set(request: measurement_pb2.CreateMeasurementRequest, settings: MeasurementSettings | str) -> None:
    """Puts the settings in their place in the request."""
    kind = settings if isinstance(settings, str) else _kind_of(settings)
    wire = fields_of(kind)
    message: Message = getattr(request, kind)
    message.SetInParent()
    if isinstance(settings, str):
        return
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value is not None:
            _set_field(message, wire[field.name], value, f"{kind}.{field.name}")


def _kind_of(settings: MeasurementSettings) -> str:
    found = next((kind for kind, made in KINDS.items() if type(settings) is made), None)
    if found is None:
        raise InvalidInputError.at("settings", f"{type(settings).__name__} are the settings of no measurement")
    return found


def _set_field(message: Message, wire: FieldDescriptor, value: Any, field: str) -> None:
    try:
        if wire.is_repeated:
            several = [value] if isinstance(value, str) else value
            getattr(message, wire.name).extend(_said(wire, each, field) for each in several)
        else:
            setattr(message, wire.name, _said(wire, value, field))
    except (TypeError, ValueError) as error:
        raise InvalidInputError.at(field, f"{value!r} cannot be said to the server: {error}") from error


def _said(wire: FieldDescriptor, value: Any, field: str) -> Any:
    if wire.enum_type is None:
        return value
    words = words_of(wire)
    if value not in words:
        raise InvalidInputError.at(field, f"there is no {value!r}; give one of {', '.join(words)}")
    return words[value]
