"""One device: rows, block tables, inputs, forward pass, sampling. ``worker.py`` is the surface, ``model_runner.py`` a
step. Imports no scheduler: plans come as plain data from ``messages.py``."""
