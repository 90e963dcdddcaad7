"""The reproducible companion of "Self-Supervised Siamese Autoencoders" (SidAE, arXiv:2304.02549)."""

import os

# Before torch is imported: OpenMP threads that spin for milliseconds while they wait make a step on a busy machine ten
# times slower, threads that sleep at once make one on a quiet machine slower by half; this is a few microseconds.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from . import threads as threads  # noqa: E402  (it looks at what else runs while torch is imported)

__version__ = "0.1.0"
