"""Where text is cut before bytes are merged. Red when a piece ends elsewhere than in the model's tokenizer."""

from __future__ import annotations

import pytest
from tokenizers import models

from octavo.checkpoint.byte_bpe import CUTS, byte_level

TEXT = "Hello WORLD's 1234 \u4f60\u597dabc, na\u00efve\r\n  x  "


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        (
            "deepseek-llm",  # its list of punctuation has the letters of ASCII, too: they leave others
            ["Hello", " WORLD", "'", "s", " ", "1", "2", "3", "4", " ", "\u4f60\u597d", "abc", ",", " na", "\u00ef",
             "ve", "\r", "\n", " ", " x", "  "],
        ),
        (
            "deepseek-coder",
            ["Hello", " WORLD", "'", "s", " ", "1", "2", "3", "4", " ", "\u4f60\u597d", "abc", ",", " na\u00efve", "\r",
             "\n", " ", " x", "  "],
        ),
        (
            "kimi-k2",
            ["Hello", " WORLD's", " ", "123", "4", " ", "\u4f60\u597d", "abc", ",", " na\u00efve", "\r\n", " ", " x",
             "  "],
        ),
    ],
)  # fmt: skip
def test_pieces(name: str, pieces: list[str]) -> None:
    cutter = byte_level(models.BPE(), CUTS[name]).pre_tokenizer
    assert [TEXT[start:end] for _, (start, end) in cutter.pre_tokenize_str(TEXT)] == pieces
