"""The state of requests on the device: inputs of a decode step gathered from it, results written back to it.

``decode_step.py`` has wrappers and references in plain torch, ``triton_decode_step.py`` the kernels.
"""
