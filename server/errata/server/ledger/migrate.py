"""Brings a ledger's schema up to this release's: Alembic with the project's own scripts.

`python -m errata.server.ledger.migrate [--url URL] COMMAND` takes Alembic's commands (upgrade head, downgrade -1,
current, check, history, upgrade head --sql …). Without `--url` it reads ERRATA_LEDGER_URL, where a password is not in
everybody's list of processes.
"""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from alembic.config import CommandLine, Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Engine

from errata.server.errors import NotMigratedError
from errata.server.ledger.database import database_url
from errata.server.ledger.tables import VERSION_TABLE

_MODULE = "errata.server.ledger.migrate"
_VARIABLE = "ERRATA_LEDGER_URL"


def configuration(url: URL) -> Config:
    """Alembic's configuration for this ledger. `migrations/env.py` reads the URL from its attributes."""
    config = Config(attributes={"url": url})
    config.set_main_option("script_location", str(_scripts()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def check_revision(engine: Engine) -> None:
    """Raises NotMigratedError unless the schema is this release's."""
    wanted = ScriptDirectory.from_config(configuration(engine.url)).get_current_head()
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        found = context.get_current_revision()
    if found != wanted:
        raise NotMigratedError(
            f"the ledger's schema is at revision {found or 'none'}, this release needs {wanted}; "
            f"back it up, then run: {_command(engine.url)}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    line = CommandLine(prog=f"python -m {_MODULE}")
    line.parser.add_argument("--url", default=os.environ.get(_VARIABLE), help=f"the ledger; default: {_VARIABLE}")
    options = line.parser.parse_args(arguments)
    if not options.url:
        line.parser.error(f"which ledger? Give --url or set {_VARIABLE}")
    if not hasattr(options, "cmd"):
        line.parser.error("which command? For example: upgrade head")
    config = configuration(database_url(options.url))
    config.cmd_opts = options
    line.run_cmd(config, options)


def _command(url: URL) -> str:
    """What to type. A password shows as ***."""
    shown = url.render_as_string(hide_password=True)
    return f"python -m {_MODULE} --url {shlex.quote(shown)} upgrade head"


def _scripts() -> Path:
    """A wheel carries the scripts in this package; a checkout has them at its top."""
    here = Path(__file__).resolve()
    installed = here.with_name("migrations")
    return installed if installed.is_dir() else here.parents[4] / "migrations"


if __name__ == "__main__":
    main()
