"""Trained heads for use elsewhere."""
