"""The studies of the papers as measurements: each a module with its settings, its function and its result type."""
