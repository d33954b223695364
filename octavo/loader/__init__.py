"""Weights: from files to the parameters of a model. ``load_weights`` is all that the worker calls.

``source.py`` is the seam (one class per file format), ``mapping.py`` puts what a source yields into place,
``registry.py`` finds the source. Knows nothing of requests, steps or caches.
"""

from octavo.loader.load import load_weights

__all__ = ["load_weights"]
