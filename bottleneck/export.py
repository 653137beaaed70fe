"""`python -m bottleneck.export`: a trained head for use elsewhere. See `bottleneck.serve.export`."""

import sys

from bottleneck.serve.export import main

if __name__ == "__main__":
    sys.exit(main())
