"""What every command has: how to reach the server, where to say its result, and waiting for work.

Options of the connection stand before or after the command; after it wins.
"""

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Annotated, Self, TypeVar

import typer
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBars

from errata.client import Errata, Tls
from errata.client.channel import DEFAULT_SERVER, DEFAULT_TIMEOUT
from errata.client.cli.helping import Command
from errata.client.cli.output import Output
from errata.client.cli.problems import NO, UsageError
from errata.client.names import model_part, says_model
from errata.client.operations import Operation
from errata.client.results import Progress, State, Work

W = TypeVar("W", bound=Work)
G = TypeVar("G")
_NARROW = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the server is reached; None where nobody said."""

    server: str | None = None
    token: str | None = field(default=None, repr=False)
    tls: bool | None = None
    ca: Path | None = None
    cert: tuple[Path, Path] | None = None
    insecure: bool | None = None
    timeout: float | None = None
    verbose: bool | None = None

    def over(self, other: "Settings") -> "Settings":
        """These, and the other's where these say nothing."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(other, **{name: value for name, value in given.items() if value is not None})

    def connect(self) -> Errata:
        """A client. Raises InvalidInputError for a token that would go over a network in clear."""
        certificate, key = self.cert or (None, None)
        encrypted = self.tls or self.ca or self.cert
        tls = Tls(root_certificates=self.ca, certificate=certificate, key=key) if encrypted else None
        return Errata(
            self.server or DEFAULT_SERVER,
            token=self.token or "",
            tls=tls,
            timeout=self.timeout or DEFAULT_TIMEOUT,
            insecure_ok=bool(self.insecure),
        )


class Session:
    """One command's run. `client` is opened when it is first needed, and closed at the end."""

    def __init__(self, settings: Settings, *, as_json: bool) -> None:
        self.settings = settings
        self.output = Output(as_json=as_json, verbose=bool(settings.verbose))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if "client" in self.__dict__:
            self.client.close()

    @cached_property
    def client(self) -> Errata:
        """The client."""
        return self.settings.connect()

    def model(self, given: str | None) -> str:
        """The model that is meant: the one given, or a server's only one. Raises UsageError where there are more."""
        if given:
            return model_part(given) if given.startswith("models/") else given.partition("@")[0]
        names = [model_part(model.name) for model in self.client.models()]
        if len(names) == 1:
            return names[0]
        raise UsageError(f"the server has {len(names)} models; name one of {', '.join(names)}")

    def version(self, given: str | None, ref: str = "", model: str | None = None) -> str:
        """The version that is meant: by its whole name, by a model's, or by a number or alias of `model`.

        Without `model` it is a server's only one. Nothing given means that model's champion; `ref` "@0" its base.
        Raises UsageError where there are more models.
        """
        if given is None:
            return self.model(model) + ref
        if says_model(given):
            return given
        known = [model] if model else [model_part(each.name) for each in self.client.models()]
        if given in known:
            return given
        if len(known) == 1:
            return f"{known[0]}@{given}"
        raise UsageError(f"{given!r} is of which model? Say {' or '.join(f'{each}@{given}' for each in known)}")

    def followed(self, operation: Operation[W], what: str) -> W:
        """Waits for work, with a progress bar on a terminal, else a line a stage. Its result; raises its error."""
        try:
            if self.output.errors.is_terminal:
                self._progress(operation, what)
            elif not self.output.as_json:
                self._stages(operation, what)
            return operation.result()
        except KeyboardInterrupt:
            self.output.note(f"{operation.name} goes on; errata show {operation.name} waits for it")
            raise

    def refuse(self, work: Work) -> None:
        """Ends with exit code 1 where the work was rejected."""
        if work.job.state is State.REJECTED:
            raise typer.Exit(NO)

    def _progress(self, operation: Operation[W], what: str) -> None:
        errors = self.output.errors
        bar = BarColumn(bar_width=8 if errors.width < _NARROW else 30)
        columns = (TextColumn("{task.description}"), bar, TextColumn("{task.fields[count]}"), TimeElapsedColumn())
        with ProgressBars(*columns, console=errors, transient=True) as shown:
            task = shown.add_task(what, total=None, count="")
            for step in operation:
                count, total = counted(step)
                shown.update(task, description=f"{what}: {step.stage}", completed=step.done, total=total, count=count)

    def _stages(self, operation: Operation[W], what: str) -> None:
        last = ""
        for step in operation:
            if step.stage != last:
                self.output.note(f"{what}: {step.stage}")
            last = step.stage


def counted(step: Progress) -> tuple[str, int | None]:
    """How far a stage is, in a text, and its total; None where it is not known yet, or was guessed and is passed."""
    total = step.total if step.done <= step.total else 0
    return (f"{step.done}/{total}", total) if total else (str(step.done or ""), None)


def add(app: typer.Typer, name: str, run: Callable[..., None], example: str) -> None:
    """Makes a command of a function whose first parameter is the session and whose docstring is its help.

    A parameter that is a dataclass stands for its fields, each an option.
    """
    own = list(inspect.signature(run, eval_str=True).parameters.values())[1:]
    kinds = {each.name: each.annotation for each in own}
    groups = {name: kind for name, kind in kinds.items() if isinstance(kind, type) and is_dataclass(kind)}
    spread = [part for each in own for part in (_fields(each.annotation) if each.name in groups else (each,))]
    shared = [_JSON, *_options(hidden=True)]

    def call(context: typer.Context, **given: object) -> None:
        as_json = bool(given.pop("json"))
        settings = _taken(given, Settings).over(context.obj)
        given |= {name: _taken(given, group) for name, group in groups.items()}
        with Session(settings, as_json=as_json) as session:
            run(session, **given)

    _signed(call, [_CONTEXT, *spread, *shared])
    told = " ".join((inspect.getdoc(run) or "").split())
    app.command(name, cls=Command, help=told, epilog=f"\b\nExample: {example}")(call)


def add_root(app: typer.Typer, help: str, epilog: str, release: Callable[[], str]) -> None:
    """Gives an app the options of the connection."""

    def call(context: typer.Context, version: bool, **given: object) -> None:
        if version:
            typer.echo(release())
            raise typer.Exit
        context.obj = _taken(given, Settings)
        if context.invoked_subcommand is None:
            typer.echo(context.get_help())

    version = _parameter("version", Annotated[bool, typer.Option("--version", help="Print the release.")], False)
    _signed(call, [_CONTEXT, *_options(hidden=False), version])
    app.callback(invoke_without_command=True, help=help, epilog=epilog)(call)


def _parameter(name: str, annotation: object, default: object = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


_CONTEXT = _parameter("context", typer.Context)
_JSON = _parameter("json", Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")], False)


def _options(*, hidden: bool) -> list[inspect.Parameter]:
    """The options of `Settings`; the environment is read by those that are shown."""

    def option(name: str, kind: object, metavar: str | None, help: str, envvar: str | None = None) -> inspect.Parameter:
        flags = (f"--{name}", "-v") if name == "verbose" else (f"--{name}",)
        envvar = None if hidden else envvar
        made = typer.Option(*flags, help=help, metavar=metavar, envvar=envvar, show_envvar=False, hidden=hidden)
        return _parameter(name, Annotated[typing.Optional[kind], made], None)  # noqa: UP045

    return [
        option("server", str, "HOST:PORT", f"Default: ERRATA_SERVER, else {DEFAULT_SERVER}.", "ERRATA_SERVER"),
        option("token", str, "TOKEN", "Better given by ERRATA_TOKEN, which nobody else sees.", "ERRATA_TOKEN"),
        option("tls", bool, None, "Encrypt, trusting the system's root certificates."),
        option("ca", Path, "FILE", "Encrypt, trusting these (PEM). Default: ERRATA_CA.", "ERRATA_CA"),
        option("cert", tuple[Path, Path], "FILE KEYFILE", "The client's own certificate and key (PEM)."),
        option("insecure", bool, None, "Send the token over a network in clear."),
        option("timeout", float, "SECONDS", f"For each call; {DEFAULT_TIMEOUT:g} unless given."),
        option("verbose", bool, None, "On errors: reason, field, traceback."),
    ]


def _taken(given: dict[str, object], group: type[G]) -> G:
    """A dataclass of those of the arguments that are its fields, which they are taken out of."""
    return group(**{each.name: given.pop(each.name) for each in fields(group)})  # type: ignore[arg-type]


def _fields(group: type) -> list[inspect.Parameter]:
    return list(inspect.signature(group, eval_str=True).parameters.values())


def _signed(call: Callable[..., None], parameters: list[inspect.Parameter]) -> None:
    """Gives a function the signature that typer makes its options of."""
    keyword = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    vars(call)["__signature__"] = inspect.Signature(keyword)
    call.__annotations__ = {each.name: each.annotation for each in keyword}
