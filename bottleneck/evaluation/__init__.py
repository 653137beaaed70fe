"""Validation losses as sums over all tokens, and agreement with the original head."""
