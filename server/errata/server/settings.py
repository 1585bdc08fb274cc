"""What a server is set to: environment over TOML file over defaults, checked whole before anything starts.

Environment variables begin with ERRATA_ and name nested keys with two underscores: ERRATA_PORT,
ERRATA_MODELS__ATLAS__DEVICE. Lists are JSON there: ERRATA_IMAGE_SCHEMES='["https"]'. Does not import torch.
"""

import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FilePath,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings import SettingsError as InvalidEnvironment

from errata.editor.errors import ErrataError
from errata.editor.images import ImageLimits
from errata.server.errors import MalformedError
from errata.server.names import model_part
from errata.v1 import evaluation_pb2

PREFIX = "ERRATA_"
OTHERS = ("ERRATA_FAULT", "ERRATA_SERVER", "ERRATA_TOKEN", "ERRATA_CA")
"""Variables with our prefix that are not the server's settings: tests of crashes, and the client's."""

METRICS = tuple(name.removeprefix("METRIC_").lower() for name in evaluation_pb2.Metric.keys()[1:])
"""Names of metrics as settings spell them: efficacy, image_generalization, …"""

ImageScheme = Literal["file", "http", "https", "data"]


class SettingsError(ErrataError):
    """The settings cannot be used: one line for each that is at fault."""

    reason = "INVALID_SETTINGS"


def _name(model: str) -> str:
    try:
        return model_part(model, "name")
    except MalformedError as error:
        raise ValueError(str(error)) from None


ModelName = Annotated[str, AfterValidator(_name)]
Share = Annotated[float, Field(ge=0, le=1)]


class ModelSettings(BaseModel):
    """A base model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(min_length=1)
    """"atlas", or a folder or name that `transformers` loads."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = Field(default="cpu", pattern=r"^[a-z]+(:[0-9]+)?$")
    quantization: Literal["none", "bnb-8bit", "bnb-4bit", "bnb-4bit-fp4"] = "none"
    """How bitsandbytes holds the weights. Another one is another base, with versions of its own."""
    load: Literal["start", "lazy"] = "start"
    registered_model: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._-]{0,127}$")
    """Its name in MLflow. None: the model's own."""
    references: FilePath | None = None
    """A JSONL file of reference contexts. None: Atlas's own for source "atlas", else none."""
    guardrails: dict[str, Share] = {}
    """Metric → least share, 0-1."""
    max_rows: int = Field(default=32, ge=1)
    """Rows of a generation's batch."""
    max_queue: int = Field(default=256, ge=1)
    """Requests that may wait for one."""

    @field_validator("guardrails")
    @classmethod
    def _known_metrics(cls, guardrails: dict[str, float]) -> dict[str, float]:
        for metric in guardrails:
            if metric not in METRICS:
                raise ValueError(f"there is no metric {metric!r}; use {', '.join(METRICS)}")
        return guardrails


class Settings(BaseSettings):
    """A server. Raises pydantic's ValidationError where the parts do not fit; `load_settings` says it readably."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, env_ignore_empty=True
    )

    data_dir: Path = Path("errata-data")
    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=50051, ge=0, le=65535)
    """0: any free one."""
    models: dict[ModelName, ModelSettings] = Field(default={"atlas": ModelSettings(source="atlas")}, min_length=1)
    ledger_url: SecretStr | None = None
    """None: SQLite in `data_dir`, migrated by the server itself."""
    mlflow_uri: str | None = None
    """None: SQLite in `data_dir`. "none": no MLflow. What belongs to a database's runs is kept in `data_dir`, too."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Prometheus; None: not served."""
    tls_certificate: FilePath | None = None
    tls_key: FilePath | None = None
    tls_client_ca: FilePath | None = None
    """PEM. With it, callers must show a certificate that it signed."""
    auth: bool = False
    """Whether callers need tokens."""
    insecure_ok: bool = False
    """Whether to listen beyond this machine without TLS and tokens."""
    image_schemes: tuple[ImageScheme, ...] = ()
    """URI schemes of images that are taken. Bytes always are."""
    image_folders: tuple[Path, ...] = ()
    """Where images with the scheme "file" must lie."""
    image_private_addresses: bool = False
    """Whether http and https may fetch from this machine and private networks."""
    image_timeout_seconds: float = Field(default=10.0, gt=0, le=300)
    max_message_bytes: int = Field(default=64 * 2**20, ge=64 * 2**10, lt=2**31)
    max_image_bytes: int = Field(default=10_000_000, ge=1, le=2**30)
    max_image_pixels: int = Field(default=25_000_000, ge=1, le=ImageLimits().max_pixels)
    """Of one image, and of all images of one prompt together."""
    max_request_pixels: int = Field(default=250_000_000, ge=1)
    """Of all images of one call together: 3 bytes of memory each. All calls at once may hold three times as many."""
    requests_per_minute: int = Field(default=6000, ge=1)
    """Of each caller."""
    worker_threads: int = Field(default=2, ge=1, le=256)
    """Jobs worked on at once."""
    drain_seconds: float = Field(default=30.0, ge=0)
    page_token_secret: SecretStr | None = Field(default=None, min_length=32)
    """None: a new one at every start."""

    @field_validator("models", mode="before")
    @classmethod
    def _atlas_is_atlas(cls, models: object) -> object:
        # ERRATA_MODELS__ATLAS__DEVICE alone sets the device of the default model.
        if isinstance(models, dict) and isinstance(models.get("atlas"), dict):
            return {**models, "atlas": {"source": "atlas", **models["atlas"]}}
        return models

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together; set both or neither")
        if self.tls_client_ca and not self.tls_certificate:
            raise ValueError("tls_client_ca needs TLS; set tls_certificate and tls_key, too")
        return self

    @model_validator(mode="after")
    def _files_have_folders(self) -> Self:
        if "file" in self.image_schemes and not self.image_folders:
            raise ValueError('image_schemes allows "file"; set image_folders to the folders that may be read')
        return self

    @model_validator(mode="after")
    def _secure_beyond_loopback(self) -> Self:
        if self.insecure_ok or is_loopback(self.host) or (self.tls_certificate and self.auth):
            return self
        missing = [] if self.tls_certificate else ["tls_certificate and tls_key"]
        missing += [] if self.auth else ["auth = true"]
        raise ValueError(
            f"host {self.host!r} can be reached from other machines; set {' and '.join(missing)}, listen on 127.0.0.1, "
            "or set insecure_ok = true where something else protects the port"
        )

    def described(self) -> str:
        """One line a setting, in order, secrets and the passwords of addresses hidden."""
        return "\n".join(f"{key} = {_shown(value)}" for key, value in self)


class _FromFile(Settings):
    """Takes a file's content as its arguments, below the environment."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings


def load_settings(config: Path | None = None) -> Settings:
    """The settings of this process's environment over those of the TOML file `config`. Raises SettingsError."""
    _refuse_unknown_variables(os.environ)
    given = _read(config) if config else {}
    try:
        found = _FromFile(**given)  # type: ignore[arg-type]  # pydantic checks it, whatever it is
    except ValidationError as error:
        raise SettingsError(_listed([_line(e) for e in error.errors()])) from None
    except InvalidEnvironment as error:
        example = "ERRATA_IMAGE_SCHEMES='[\"https\"]'"
        line = f"{error}: lists and tables in the environment are JSON, for example {example}"
        raise SettingsError(_listed([line])) from None
    return Settings.model_validate(dict(found))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there. A name other than localhost counts as not."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def without_password(url: str) -> str:
    """An address for people to read: user, password and query hidden, however badly it is written."""
    return re.sub(r"\?.*", "?***", re.sub(r"://.*@", "://***@", url, flags=re.DOTALL), flags=re.DOTALL)


def _read(config: Path) -> dict[str, object]:
    try:
        return tomllib.loads(config.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"the settings file {str(config)!r} cannot be read: {error.strerror}") from None
    except ValueError as error:  # no UTF-8, or no TOML
        raise SettingsError(f"the settings file {str(config)!r} is no TOML: {error}") from None


def _refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    # pydantic-settings passes over a variable that it does not know, and so over ERRATA_AUHT=true.
    ours = {v: v.upper().removeprefix(PREFIX) for v in environment if v.upper().startswith(PREFIX)}
    known = {*(name.upper() for name in Settings.model_fields), *(v.removeprefix(PREFIX) for v in OTHERS)}
    unknown = [v for v, name in ours.items() if name.partition("__")[0] not in known]
    if unknown:
        raise SettingsError(_listed([f"{v}: there is no such setting; unset it or correct its name" for v in unknown]))


def _line(error: ErrorDetails) -> str:
    where = ".".join(str(part) for part in error["loc"] if part != "[key]") or "settings"
    if error["type"] == "extra_forbidden":
        return f"{where}: there is no such setting; remove it or correct its name"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}"


def _listed(lines: list[str]) -> str:
    return "the settings cannot be used:\n" + "\n".join(f"  {line}" for line in lines)


def _shown(value: object) -> str:
    match value:
        case SecretStr():
            secret = value.get_secret_value()
            return without_password(secret) if "://" in secret else "***"
        case str():
            return without_password(value)
        case dict():
            return "; ".join(f"{k}: {_shown(v)}" for k, v in value.items()) or "none"
        case BaseModel():
            return ", ".join(f"{k} {_shown(v)}" for k, v in value if v not in (None, {}))
        case tuple():
            return ", ".join(_shown(v) for v in value) or "none"
        case None:
            return "not set"
        case _:
            return str(value)
