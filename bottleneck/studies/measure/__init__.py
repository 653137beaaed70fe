"""Passes over backbones, one module a study."""
