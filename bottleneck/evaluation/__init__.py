"""Exact sums over validation tokens, and agreement with the original head."""
