"""``FLASH_ATTN``: prompts by an installed FlashAttention (3, 4, 2, or the one inside torch), decode by our own kernel.

Which one is used is said by ``octavo attention``. Papers: Dao et al., "FlashAttention", 2022; Shah et al.,
"FlashAttention-3", 2024.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import ClassVar

from octavo.attention.backend import AttentionSpec
from octavo.attention.libraries import Attend, find_flash, load_flash, load_or_refuse
from octavo.attention.library_prefill import LibraryPrefillBackend
from octavo.attention.triton import TritonBackend

logger = logging.getLogger(__name__)


class FlashAttnBackend(LibraryPrefillBackend):
    """See the module."""

    name: ClassVar[str] = "FLASH_ATTN"

    @classmethod
    def unsupported(cls, spec: AttentionSpec, device_type: str) -> str | None:
        """See AttentionBackend."""
        reason = TritonBackend.unsupported(spec, device_type)
        if reason is not None:
            return f"its decode is that of TRITON_ATTN: {reason}"
        library, reasons = find_flash(spec)
        return f"no FlashAttention serves this model ({reasons})" if library is None else None

    @classmethod
    def passed_over(cls, spec: AttentionSpec) -> str | None:
        """See ``attention/registry.py``: not every FlashAttention is faster than TRITON_ATTN."""
        library, _ = find_flash(spec)
        assert library is not None, "unsupported() says when this backend cannot be used"
        return None if library.is_winner else f"{library.name} has not been measured ahead of TRITON_ATTN"

    def _load(self, spec: AttentionSpec) -> Attend:
        library, reasons = find_flash(spec)
        assert library is not None, "unsupported() says when this backend cannot be used"
        logger.info("prompts are computed by %s%s", library.name, f" ({reasons})" if reasons else "")
        return load_or_refuse(library.name, partial(load_flash, library, spec))
