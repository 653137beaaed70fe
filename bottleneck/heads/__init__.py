"""Heads: the bank that trains them, and how they start."""
