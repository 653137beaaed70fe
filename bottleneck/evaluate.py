"""`python -m bottleneck.evaluate`: heads scored on tasks of lm-evaluation-harness. See `bottleneck.downstream.lm_eval`."""

import sys

from bottleneck.downstream.lm_eval import main

if __name__ == "__main__":
    sys.exit(main())
