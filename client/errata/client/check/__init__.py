"""`errata check`: whether a version still says what a file of probes says it must. Needs the [cli] extra.

    file ──► format ──► Checks ──► Answerer: a server, or a version on this machine ──► judging ──► Report ──► output
             (lines)               and the baseline: another version, or a file of answers

Everything greedy and fixed: the same file and the same version give the same report. A check ends as passed (0),
regressed (1), or could not run (2, `CheckError`); a fault of Errata's own is never taken for a regression.
"""
