"""`python -m data.pretrain`, the earlier name of `python -m data.recipes.pretrain`."""

from __future__ import annotations

from bottleneck.data.recipes.pretrain import main

if __name__ == "__main__":
    main()
