"""Kinds of measurements by what they are asked with.

A kind is one line of `SETTINGS`, by the name of its field of `CreateMeasurementRequest.settings`. The message there has
the fields of the editor's settings by the same names, so that nothing else here knows any of them.
"""

from collections.abc import Callable, Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from errata.editor.errors import InvalidInputError
from errata.editor.measurements.attention import AttentionSettings
from errata.editor.measurements.constraints import ConstraintSettings
from errata.editor.measurements.failure import FailureSettings
from errata.editor.measurements.knockout import KnockoutSettings
from errata.editor.measurements.lens import LensSettings
from errata.editor.measurements.noise import NoiseSettings
from errata.editor.measurements.readout import ReadoutSettings
from errata.editor.measurements.swept import SweepSettings
from errata.editor.measurements.windows import WindowSettings
from errata.editor.methods import Keys
from errata.server.conversion import limits
from errata.server.conversion.enums import COMPONENTS, METHODS
from errata.server.errors import MalformedError
from errata.v1 import measurement_pb2

SETTINGS: Mapping[str, Callable[..., object]] = {
    "noise": NoiseSettings,
    "constraints": ConstraintSettings,
    "windows": WindowSettings,
    "attention": AttentionSettings,
    "failure": FailureSettings,
    "knockout": KnockoutSettings,
    "lens": LensSettings,
    "sweep": SweepSettings,
    "readout": ReadoutSettings,
}
"""The editor's settings of every kind."""

SWEEP = "sweep"
"""The kind that edits: it takes requests in place of questions."""

_ENUMS: Mapping[str, Mapping[Any, Any]] = {
    "errata.v1.Component": COMPONENTS,
    "errata.v1.Method": METHODS,
    "errata.v1.Keys": {value: Keys[name.removeprefix("KEYS_")] for name, value in measurement_pb2.Keys.items()[1:]},
}
"""The editor's members of the enums that settings have, by the enums' full names."""

_MOST: Mapping[str, int] = {
    "at_once": 1000,
    "batch_size": 1000,
    "draws": 10_000,
    "grids": 100,
    "max_new_tokens": 4096,
    "max_rows": 4096,
    "most_contexts": 512,
    "neurons": 100,
    "overlays": 100,
    "steps": 1000,
    "tokens": 1000,
    "window": 64,
    "windows": 64,
}
"""Most of what bounds the server's own work; the least of each is the editor's to say."""

_MOST_ENTRIES, _LONGEST, _LARGEST = 100, 200, 1e9
"""Entries of a list, characters of a text, and the size of a number."""


def kind_of(message: measurement_pb2.CreateMeasurementRequest) -> str:
    """The name of what is to be measured. Raises MalformedError where nothing is."""
    name = message.WhichOneof("settings")
    if name is not None and name in SETTINGS:
        return name
    raise MalformedError(
        f"settings say nothing that this server measures; set one of {', '.join(SETTINGS)}",
        field="settings",
        reason="MISSING_FIELD",
    )


def settings_of(name: str, message: Message) -> object:
    """A kind's settings, the defaults filled in. Raises InvalidInputError, MalformedError."""
    given = {descriptor.name: _value(descriptor, value, name) for descriptor, value in message.ListFields()}
    try:
        return SETTINGS[name](**given)
    except InvalidInputError as error:
        raise within_settings(error, name) from None


def within_settings(error: InvalidInputError, name: str) -> InvalidInputError:
    """What a kind's settings are to blame for, named as the request names it: `noise.draws`."""
    error.field = error.field.removeprefix("settings.")
    return error.within(name)


def _value(descriptor: FieldDescriptor, value: Any, kind: str) -> object:
    field = f"{kind}.{descriptor.name}"
    if not descriptor.is_repeated:
        return _single(descriptor, value, field)
    limits.count(value, field, 0, _MOST_ENTRIES)
    return tuple(_single(descriptor, each, f"{field}[{i}]") for i, each in enumerate(value))


def _single(descriptor: FieldDescriptor, value: Any, field: str) -> object:
    if descriptor.enum_type is not None:
        members = _ENUMS[descriptor.enum_type.full_name]
        return members[limits.member(members, value, field)]
    match value:
        case str():
            return limits.note(value, field, most=_LONGEST, one_line=True)
        case float():
            return limits.number(value, field, -_LARGEST, _LARGEST)
        case int() if descriptor.name in _MOST:
            return limits.whole(value, field, 0, _MOST[descriptor.name])
    return value
