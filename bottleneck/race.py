"""`python -m bottleneck.race`: tokens until a run is as good as another one. See `bottleneck.results.tokens_to_equal_loss`."""

import sys

from bottleneck.results.tokens_to_equal_loss import main

if __name__ == "__main__":
    sys.exit(main())
