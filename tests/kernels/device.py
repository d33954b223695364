"""Where kernels are tested: on a GPU, or on the CPU in Triton's interpreter. Importing this skips the module that does
where there is neither, so it stands in front of whatever imports Triton."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (IS_INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cpu" if IS_INTERPRETED else "cuda"
