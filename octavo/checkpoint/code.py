"""What Python code a checkpoint brings along (``auto_map``), and where nothing else would do. Runs none of it.

Which parts are run, and only when the user asks for it: ``octavo/models/transformers_code.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from octavo.checkpoint.files import read_json_object
from octavo.config.model import CheckpointCode

FIELD = "auto_map"
TOKENIZER = "AutoTokenizer"


def read_code(folder: Path, *configs: Mapping[str, Any]) -> CheckpointCode | None:
    """The code that the configs of a folder name; None where they name none.

    Args:
        folder: Of the checkpoint.
        configs: ``config.json``, and ``tokenizer_config.json`` where it is asked for; the first one that names a class
            counts. Entries that are not understood are left out: nothing could run them.
    """
    classes: dict[str, str] = {}
    for config in configs:
        stated = config.get(FIELD)
        for kind, value in (cast("dict[str, Any]", stated) if isinstance(stated, dict) else {}).items():
            # Tokenizers have a slow and a fast class, either of which may be null.
            options = cast("list[Any]", value) if isinstance(value, list) else [value]
            reference = next((option for option in reversed(options) if isinstance(option, str)), None)
            if reference is not None:
                classes.setdefault(kind, reference)
    return CheckpointCode(str(folder), classes) if classes else None


def read_tokenizer_code(folder: Path) -> CheckpointCode | None:
    """The code of a folder's tokenizer; None where there is none."""
    files = (folder / "tokenizer_config.json", folder / "config.json")
    code = read_code(folder, *(read_json_object(file) for file in files if file.exists()))
    return code if code is not None and TOKENIZER in code.classes else None
