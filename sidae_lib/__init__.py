"""The reproducible companion of "Self-Supervised Siamese Autoencoders" (SidAE, arXiv:2304.02549)."""

import os

# Before torch is imported: threads that spin while they wait make a step on a busy machine several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
