"""Kinds of heads: one file per kind, each declares a `HeadKind`."""
