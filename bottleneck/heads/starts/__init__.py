"""How heads start: one file per start, each declares a `Start`."""
