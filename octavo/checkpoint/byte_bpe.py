"""Byte-level BPE: the alphabet of bytes, the ways in which text is cut first, and a tokenizer out of ranked bytes.

A cut decides token ids as much as the vocabulary does, so each family's is written down once, in ``CUTS``, under the
names that GGUF files use (``tokenizer.ggml.pre``). Tekken and tiktoken files are lists of byte strings by rank:
``tokenizer_from_ranks`` gives them the merges that a pair-merging tokenizer needs.

Knows no files: ``gguf_tokenizer.py``, ``tiktoken_file.py`` and ``tekken.py`` do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

MAX_PIECE_BYTES = 512
"""Longer tokens are found whole or not at all: the number of ways to cut one grows with its length."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_REGEX = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
QWEN2_REGEX = LLAMA3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35_REGEX = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}"
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN_REGEX = _CASED_WORDS.replace("{0}", "") + r"|\p{N}" + _CASED_REST
O200K_REGEX = _CASED_WORDS.replace("{0}", _CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _CASED_REST
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)

_DEEPSEEK_LETTERS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-"
    "\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80"
    "-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4"
    "\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a"
    "\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-"
    "\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
"""Cased letters, as the tokenizers of DeepSeek LLM and V2 list them: some scripts and all mathematical ones are not."""
_DEEPSEEK_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _DEEPSEEK_CJK,
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK)
_NO_HAN = r"&&[^\p{Han}]]"
KIMI_REGEX = (
    r"[\p{Han}]+|"
    + _CASED_WORDS.replace(_UPPER, _UPPER[:-1] + _NO_HAN)
    .replace(_LOWER, _LOWER[:-1] + _NO_HAN)
    .replace("{0}", _CONTRACTIONS + "?")
    + r"|\p{N}{1,3}"
    + _CASED_REST.replace("/", "")
)


@dataclass(frozen=True, slots=True)
class Cut:
    """How text is cut into the pieces within which bytes are merged."""

    regexes: tuple[str, ...] = ()
    """Applied one after the other; what one finds and what lies between are pieces. Empty: GPT-2's expression."""
    single_digits: bool = False
    """Every digit is a piece of its own, cut before anything else."""
    nfc: bool = False
    """Text is composed (Unicode NFC) first."""
    ignore_merges: bool = False
    """A piece that is a token as a whole is not merged step by step."""
    add_bos: bool = False
    """Where the file does not say."""


_GPT2 = Cut()
_DIGITS = Cut(single_digits=True)
_LLAMA3 = Cut((LLAMA3_REGEX,), ignore_merges=True, add_bos=True)
_CL100K = Cut((LLAMA3_REGEX,))
_QWEN2 = Cut((QWEN2_REGEX,), nfc=True)
_O200K = Cut((O200K_REGEX,), ignore_merges=True)
CUTS: Mapping[str, Cut] = {
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "mpt", "exaone4", "mellum", "modern-bert"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "lfm2", "pixtral"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _CL100K),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "qwen35": Cut((_QWEN35_REGEX,), nfc=True),
    "olmo": Cut(nfc=True),
    "tekken": Cut((TEKKEN_REGEX,), ignore_merges=True, add_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _O200K),
    "deepseek-v3": Cut(_DEEPSEEK3),
    "deepseek-llm": Cut(_DEEPSEEK_LLM, single_digits=True),
    "deepseek-coder": Cut(_DEEPSEEK_CODER, single_digits=True),
    "kimi-k2": Cut((KIMI_REGEX,), ignore_merges=True),
}
"""GGUF's name of a pre-tokeniser to its cut, as the tokenizers of those models on the hub do it."""


def byte_alphabet() -> list[str]:
    """[256] GPT-2's printable character for each byte: printable Latin-1 is itself, the rest follows from U+0100 on."""
    alphabet: list[str] = []
    shifted = 0
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF:
            alphabet.append(chr(byte))
        else:
            alphabet.append(chr(0x100 + shifted))
            shifted += 1
    return alphabet


def byte_level(model: models.BPE, cut: Cut) -> Tokenizer:
    """A byte-level tokenizer of ``model`` that cuts text as ``cut`` says."""
    tokenizer = Tokenizer(model)
    if cut.nfc:
        tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    steps: list[Any] = []
    if cut.single_digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    steps += [pre_tokenizers.Split(Regex(regex), behavior="isolated") for regex in cut.regexes]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not cut.regexes))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return tokenizer


def tokenizer_from_ranks(
    ranks: Mapping[bytes, int], special: Mapping[str, int], cut: Cut, offset: int = 0
) -> Tokenizer:
    """A tokenizer that merges as tiktoken does: always the adjacent pair whose union has the lowest rank.

    Args:
        ranks: Byte string to rank; every single byte must be there.
        special: Special tokens and their ids; the caller makes them added tokens.
        cut: How text is cut first; ``ignore_merges`` must be set, since tiktoken looks for the whole piece first.
        offset: What is added to a rank to give the token's id.

    Raises:
        ValueError: A byte is missing, or a special token is spelt like another token.
    """
    assert cut.ignore_merges
    missing = [byte for byte in range(256) if bytes((byte,)) not in ranks]
    if missing:
        raise ValueError(f"the vocabulary lacks the byte {missing[0]}")
    alphabet = byte_alphabet()
    names = {token: "".join([alphabet[byte] for byte in token]) for token in ranks}
    vocab = {name: ranks[token] + offset for token, name in names.items()}
    for name, token_id in special.items():
        if vocab.setdefault(name, token_id) != token_id:
            raise ValueError(f"the special token {name!r:.100} is spelt like another token")
    # Every way to cut a token into two tokens is a merge with the token's rank; the ids of the parts break ties.
    ranked: list[tuple[int, int, int, bytes, bytes]] = []
    for token, rank in ranks.items():
        if not 1 < len(token) <= MAX_PIECE_BYTES:
            continue
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            if left in ranks and right in ranks:
                ranked.append((rank, ranks[left], ranks[right], left, right))
    ranked.sort()
    merges = [(names[entry[3]], names[entry[4]]) for entry in ranked]
    return byte_level(models.BPE(vocab=vocab, merges=merges, ignore_merges=True), cut)
