"""`python -m bottleneck.curve`: merge runs into one curve. See `bottleneck.results.curve`."""

import sys

from bottleneck.results.curve import main

if __name__ == "__main__":
    sys.exit(main())
