"""Command lines: one-line errors and the `bottleneck` command."""
