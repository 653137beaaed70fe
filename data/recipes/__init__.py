"""Scripts that once made the embedded text and backbone."""
