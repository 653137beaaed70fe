"""Scores of heads on tasks of lm-evaluation-harness."""
