"""Work that takes longer than a call: traces, edits, evaluations."""
