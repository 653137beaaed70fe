"""`python -m bottleneck.report`: one HTML page of curves. See `bottleneck.results.page`."""

import sys

from bottleneck.results.page import main

if __name__ == "__main__":
    sys.exit(main())
