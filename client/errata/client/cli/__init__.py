"""The command `errata`: everything of the client in a shell. Needs the extra `cli`; the client never imports it.

Exit codes: 0 done; 1 the answer is no (rejected, regressed, in conflict); 2 it could not be done; 130 interrupted;
141 nobody read on.
Results go to stdout, everything else to stderr.
"""

import sys
from collections.abc import Sequence

_REMEDY = "errata: the command line needs typer, rich, pydantic and PyYAML ({} is missing); pip install 'errata[cli]'"
_EXTRA = ("typer", "rich", "pydantic", "pydantic_core", "yaml")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line, by default this process's, and returns its exit code."""
    try:
        from errata.client.cli.app import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in _EXTRA:
            raise
        sys.stderr.write(_REMEDY.format(error.name) + "\n")
        return 2
    except KeyboardInterrupt:  # while the parts are still being imported
        return 130
    return run(sys.argv[1:] if arguments is None else list(arguments))
