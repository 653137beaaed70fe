"""Pure functions of the studies: no files, no models."""
