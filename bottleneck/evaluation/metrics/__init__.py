"""Metrics of curve.json: each module declares some in `METRICS`. A new metric is one declaration."""
