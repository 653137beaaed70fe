"""The curve, its knee, pictures, the report page, and comparisons of runs."""
