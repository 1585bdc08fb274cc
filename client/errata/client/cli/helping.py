"""How `--help` looks: one screen of 24 lines and 80 columns a command, and less where the terminal is narrower."""

import shutil
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from typer.core import TyperCommand, TyperGroup

_WIDEST = 80
_SHORTER = {"show_completion": "Print it, to be installed by hand."}


class _AppOptions(TypedDict):
    rich_markup_mode: None
    pretty_exceptions_enable: bool
    context_settings: dict[str, int]


class Command(TyperCommand):
    """A command whose arguments and options stand in one list."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes them, without headings."""
        _write_options(self, ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Writes the example."""
        _write_epilog(self.epilog, formatter)


def commands_in(groups: Mapping[str, Sequence[str]]) -> type[TyperGroup]:
    """A group that lists its commands by what they are for: one a line would not fit a screen."""

    class Commands(TyperGroup):
        def format_options(self, ctx: Any, formatter: Any) -> None:
            _write_options(self, ctx, formatter)
            with formatter.section("Commands (errata COMMAND --help says more)"):
                formatter.write_dl([(group, "  ".join(names)) for group, names in groups.items()])

        def format_epilog(self, ctx: Any, formatter: Any) -> None:
            _write_epilog(self.epilog, formatter)

    return Commands


def app_options() -> _AppOptions:
    """What the whole app is made with."""
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    return {
        "rich_markup_mode": None,
        "pretty_exceptions_enable": False,
        "context_settings": {"terminal_width": width},
    }


def _write_options(command: TyperCommand | TyperGroup, ctx: Any, formatter: Any) -> None:
    rows = [_row(param, ctx) for param in command.get_params(ctx)]
    formatter.write_paragraph()
    with formatter.indentation():
        formatter.write_dl([row for row in rows if row], col_max=formatter.width // 2)


def _row(param: Any, ctx: Any) -> tuple[str, str] | None:
    """A parameter's name and help; None for one that is hidden."""
    record: tuple[str, str] | None = param.get_help_record(ctx)
    if record is None:
        return None
    # Usage says whether an argument is required, and help what it is.
    name = param.metavar if param.param_type_name == "argument" else record[0]
    return name, _SHORTER.get(param.name) or param.help or record[1]


def _write_epilog(epilog: str | None, formatter: Any) -> None:
    if epilog:
        formatter.write_paragraph()
        formatter.write_text(epilog)
