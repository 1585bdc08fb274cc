"""Why a check could not run. Knows files and lines, nothing else."""

from errata.client.source import Problem, SourceError

__all__ = ["CheckError", "Problem"]


class CheckError(SourceError):
    """A check that could not run, because of its file of checks or of what it asks."""

    default_reason = "CHECK_NOT_RUN"
