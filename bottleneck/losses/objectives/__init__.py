"""What heads are trained on: one file per objective, each declares an `Objective`."""
