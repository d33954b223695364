"""Text to token ids and back: what ``LLM.get_tokenizer()`` returns.

Wraps ``checkpoint.tokenizer_data.TokenizerData`` under the names that users of transformers know, without importing
transformers. Thread-safe: nothing changes after construction, and encoding releases the interpreter lock.

Knows no requests and no limits: see ``input_processor.py``. Streams of text: ``text_stream.py``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, overload

from tokenizers import Encoding

from octavo.checkpoint.tokenizer_data import TokenizerData, load_tokenizer_data
from octavo.errors import InvalidRequestError
from octavo.frontend.chat_template import ChatOptions, ChatTemplates, check_template
from octavo.frontend.text_stream import (
    PROMPT_TAIL,
    TextStream,
    UnspacedSpecialStream,
    WindowDecoder,
    decode_whole,
    make_decoder,
)

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
LONG_TEXT_CHARS = 4096
"""From here on a text is encoded in a way that costs a little more and lets other threads run."""


class TokenizedText(dict[str, list[int]]):
    """What calling a tokenizer returns: ``input_ids`` and ``attention_mask``, as keys and as attributes."""

    @property
    def input_ids(self) -> list[int]:
        """Token ids."""
        return self["input_ids"]

    @property
    def attention_mask(self) -> list[int]:
        """A 1 per token: nothing is padded."""
        return self["attention_mask"]


class Tokenizer:
    """A tokenizer with its chat templates.

    Args:
        data: From ``load_tokenizer_data``.
        chat_template: Jinja text that takes the place of the tokenizer's own default.

    Raises:
        ConfigError: ``chat_template`` is not valid Jinja.
    """

    def __init__(self, data: TokenizerData, chat_template: str | None = None) -> None:
        self._data = data
        self._raw = data.tokenizer
        self._special_ids = frozenset(data.special_token_ids)
        self._decoder = make_decoder(data.tokenizer)
        templates = dict(data.chat_templates)
        if chat_template is not None:
            check_template(chat_template)
            templates["default"] = chat_template
        self.special_tokens_map: dict[str, str] = {
            role: token for role in ROLES if (token := self._special_token(role)) is not None
        }
        self.chat_templates = ChatTemplates(templates, self.special_tokens_map)

    def _special_token(self, role: str) -> str | None:
        data = self._data
        return {
            "bos_token": data.bos_token,
            "eos_token": data.eos_token,
            "unk_token": data.unk_token,
            "pad_token": data.pad_token,
        }[role]

    # ------------------------------------------------------------------------------------------------ vocabulary

    @property
    def bos_token(self) -> str | None:
        """Text of the token that begins a document."""
        return self._data.bos_token

    @property
    def bos_token_id(self) -> int | None:
        """Its id."""
        return self._data.bos_token_id

    @property
    def eos_token(self) -> str | None:
        """Text of the token that ends a document."""
        return self._data.eos_token

    @property
    def eos_token_id(self) -> int | None:
        """Its id."""
        return self._data.eos_token_id

    @property
    def unk_token(self) -> str | None:
        """Text of the token for what the vocabulary lacks."""
        return self._data.unk_token

    @property
    def unk_token_id(self) -> int | None:
        """Its id."""
        return self._data.unk_token_id

    @property
    def pad_token(self) -> str | None:
        """Text of the padding token."""
        return self._data.pad_token

    @property
    def pad_token_id(self) -> int | None:
        """Its id."""
        return self._data.pad_token_id

    @property
    def adds_bos_token(self) -> bool:
        """Whether ``encode(text, add_special_tokens=True)`` begins with BOS."""
        return self._data.add_bos_token

    @property
    def all_special_ids(self) -> list[int]:
        """Ids that ``skip_special_tokens`` leaves out, ascending."""
        return sorted(self._special_ids)

    @property
    def all_special_tokens(self) -> list[str]:
        """Their texts, in the same order."""
        return [token for i in self.all_special_ids if (token := self._raw.id_to_token(i)) is not None]

    @property
    def vocab_size(self) -> int:
        """Tokens of the model proper; ``len(tokenizer)`` counts added tokens too."""
        return self._raw.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._raw.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        """Token to id, added tokens included."""
        return self._raw.get_vocab(with_added_tokens=True)

    @overload
    def convert_ids_to_tokens(self, ids: int) -> str | None: ...
    @overload
    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]: ...
    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | None | list[str | None]:
        """Tokens as the vocabulary spells them; None for an id without one."""
        if isinstance(ids, int):
            return self._raw.id_to_token(ids)
        return [self._raw.id_to_token(i) for i in ids]

    @overload
    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...
    @overload
    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int | None]: ...
    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | None | list[int | None]:
        """Ids of tokens; None for one that the vocabulary lacks."""
        if isinstance(tokens, str):
            return self._raw.token_to_id(tokens)
        return [self._raw.token_to_id(token) for token in tokens]

    @cached_property
    def max_token_bytes(self) -> int | None:
        """Bytes of input that one token can stand for at most; None where a normalizer makes that unknowable."""
        if self._raw.normalizer is not None:
            return None
        return max((len(token.encode()) for token in self.get_vocab()), default=1)

    @cached_property
    def adds_prefix_space(self) -> bool:
        """Whether a word at the start of a text is encoded as if a space stood before it."""
        ids = self.encode("a", add_special_tokens=False)
        return bool(ids) and self.token_text(ids[0]).startswith(" ")

    # ---------------------------------------------------------------------------------------------------- encode

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: Any text; special tokens spelt out in it become special tokens.
            add_special_tokens: Add what the model expects around plain text (BOS where it is used).

        Raises:
            InvalidRequestError: The text has half a surrogate pair, which no encoding has.
        """
        self._check_text(text)
        if len(text) >= LONG_TEXT_CHARS:
            # The same, but without holding the interpreter's lock: other streams go on meanwhile.
            return self._raw.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return self._raw.encode(text, add_special_tokens=add_special_tokens).ids

    @staticmethod
    def _check_text(text: str) -> None:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as exc:
                raise InvalidRequestError(
                    "the text has a lone surrogate (half of a UTF-16 pair) and is not valid Unicode", param="prompt"
                ) from exc

    def encode_pair(self, text: str, second: str | None, max_tokens: int | None = None) -> tuple[list[int], int]:
        """Token ids of a text, or of two that are read together, within the frame of special tokens.

        Args:
            text: Any text.
            second: The other one; None for one alone.
            max_tokens: Cut to so many ids, the frame included: from the end of the longer one of two.

        Returns:
            The ids, and where those begin that the tokenizer marks as the second text's (0 where it marks none).

        Raises:
            InvalidRequestError: A text has half a surrogate pair, or not even the frame fits.
        """
        first = self._bare(text)
        other = None if second is None else self._bare(second)
        if max_tokens is not None:
            room = max_tokens - self._raw.num_special_tokens_to_add(other is not None)
            if room < 1:
                raise InvalidRequestError(
                    f"truncate_prompt_tokens is {max_tokens}, but the tokenizer's own special tokens take "
                    f"{max_tokens - room}",
                    param="truncate_prompt_tokens",
                )
            keep_first, keep_other = _share(len(first.ids), 0 if other is None else len(other.ids), room)
            first.truncate(keep_first)
            if other is not None:
                other.truncate(keep_other)
        whole = self._raw.post_process(first, other, True)
        types = whole.type_ids
        return whole.ids, types.index(1) if 1 in types else 0

    def _bare(self, text: str) -> Encoding:
        """Without special tokens around it."""
        self._check_text(text)
        return self._raw.encode(text, add_special_tokens=False)

    def encode_inner(self, text: str) -> list[int]:
        """Token ids of a text as it stands within another, with no space put before it."""
        if self.adds_prefix_space:
            before = self.encode("\n", add_special_tokens=False)
            ids = self.encode("\n" + text, add_special_tokens=False)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self.encode(text, add_special_tokens=False)

    def __call__(self, text: str, add_special_tokens: bool = True) -> TokenizedText:
        """As ``encode``, in the form of transformers."""
        ids = self.encode(text, add_special_tokens)
        return TokenizedText(input_ids=ids, attention_mask=[1] * len(ids))

    # ---------------------------------------------------------------------------------------------------- decode

    def decode(
        self,
        token_ids: int | Sequence[int],
        skip_special_tokens: bool = False,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """Text of token ids. Ids without a token give none.

        Args:
            token_ids: One id or several.
            skip_special_tokens: Leave out special tokens.
            spaces_between_special_tokens: Where the tokenizer writes spaces between tokens: also between two special
                tokens.
        """
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        if skip_special_tokens:
            ids = [i for i in ids if i not in self._special_ids]
        if not spaces_between_special_tokens and isinstance(self._decoder, WindowDecoder):
            return decode_whole(UnspacedSpecialStream(self._decoder.stream((), frozenset()), self._special_ids), ids)
        return self._raw.decode(ids, skip_special_tokens=False)

    def token_text(self, token_id: int) -> str:
        """Text of one token within a text: its leading space kept, U+FFFD for parts of characters."""
        return self._decoder.token_text(token_id)

    def stream(
        self,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> TextStream:
        """Start decoding an answer id by id.

        Args:
            prompt_token_ids: What stands before it: decides whether the first word keeps its space.
            skip_special_tokens: Special tokens give no text.
            spaces_between_special_tokens: See ``decode``.
        """
        skip = self._special_ids if skip_special_tokens else frozenset[int]()
        stream = self._decoder.stream(prompt_token_ids[-PROMPT_TAIL:], skip)
        if not spaces_between_special_tokens and isinstance(self._decoder, WindowDecoder):
            return UnspacedSpecialStream(stream, self._special_ids)
        return stream

    # ----------------------------------------------------------------------------------------------------- chat

    @overload
    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, Any]], *, tokenize: Literal[False] = False, **options: Any
    ) -> str: ...
    @overload
    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, Any]], *, tokenize: Literal[True], **options: Any
    ) -> list[int]: ...
    @overload
    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, Any]], *, tokenize: bool, **options: Any
    ) -> str | list[int]: ...
    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[object] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tokenize: bool = False,
        **template_kwargs: Any,
    ) -> str | list[int]:
        """A conversation as prompt text, or as token ids.

        The template writes the special tokens itself, BOS included; tokenize its text with
        ``encode(text, add_special_tokens=False)``.

        Args:
            conversation: Messages with role and content.
            tools: Not supported yet.
            chat_template: Name of one of the tokenizer's templates or a template; None for the default.
            add_generation_prompt: End with the opening of the assistant's turn.
            continue_final_message: Leave the last message open instead.
            tokenize: Return ids.
            template_kwargs: Variables for the template.

        Raises:
            InvalidRequestError: See ``ChatTemplates.render``.
        """
        if tools is not None:
            raise InvalidRequestError("tools are not supported by this version of Octavo yet", param="tools")
        options = ChatOptions(
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template=chat_template,
            template_kwargs=template_kwargs,
        )
        text = self.chat_templates.render(conversation, options)
        return self.encode(text, add_special_tokens=False) if tokenize else text


def _share(first: int, second: int, room: int) -> tuple[int, int]:
    """How many of ``first`` and ``second`` tokens are kept, so that the longer one is cut first."""
    if first + second <= room:
        return first, second
    half = room // 2
    if second <= half:
        return room - second, second
    if first <= room - half:
        return first, room - first
    return room - half, half


def load_tokenizer(path: str | os.PathLike[str], chat_template: str | None = None) -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder or a GGUF file.

    Args:
        path: Folder or file.
        chat_template: Jinja text that takes the place of the tokenizer's own default.

    Raises:
        CheckpointError: The tokenizer is absent, damaged or of a kind that cannot be read.
        ConfigError: ``chat_template`` is not valid Jinja.
    """
    return Tokenizer(load_tokenizer_data(path), chat_template)
