"""`python -m data.debian`, the earlier name of `python -m data.recipes.debian`."""

from __future__ import annotations

from bottleneck.data.recipes.debian import main

if __name__ == "__main__":
    main()
