"""Rank-constrained LM heads `W = AB` on frozen backbones, trained side by side on one forward pass."""

import logging
import warnings

# pandas looks for an accelerator that is also called bottleneck, finds this package, sees by the version that it is not
# the one (so the version must stay below pandas' minimum, 1.x) and says so; `datasets` imports pandas.
__version__ = "0.1.0"
warnings.filterwarnings("ignore", message="Pandas requires version .* of 'bottleneck'", category=UserWarning)
# Transformers imports DeepSpeed, where that is installed, to save a model; without a GPU it warns of that
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
