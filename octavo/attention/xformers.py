"""``XFORMERS``: prompts by xFormers' memory-efficient attention where it is installed, decode by our own kernel."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from octavo.attention.backend import AttentionSpec
from octavo.attention.libraries import XFORMERS, Attend, load_or_refuse, load_xformers
from octavo.attention.library_prefill import LibraryPrefillBackend
from octavo.attention.triton import TritonBackend


class XformersBackend(LibraryPrefillBackend):
    """See the module."""

    name: ClassVar[str] = "XFORMERS"

    @classmethod
    def unsupported(cls, spec: AttentionSpec, device_type: str) -> str | None:
        """See AttentionBackend."""
        reason = TritonBackend.unsupported(spec, device_type)
        return f"its decode is that of TRITON_ATTN: {reason}" if reason is not None else XFORMERS.unsupported(spec)

    def _load(self, spec: AttentionSpec) -> Attend:
        return load_or_refuse(XFORMERS.name, partial(load_xformers, spec))
