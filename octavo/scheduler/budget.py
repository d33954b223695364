"""StepBudget: how many tokens one request may give to the step being planned.

Knows numbers only. Rows are limited by the free rows in ``books.py``, blocks by ``kv_cache/manager.py``.
Paper: Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024 (chunked
prefill under a token budget).
"""

from __future__ import annotations

from octavo.config.sections import SchedulerConfig
from octavo.errors import ConfigError


class StepBudget:
    """Tokens of one step.

    Attributes:
        num_tokens_left: What is left of ``max_num_batched_tokens`` in this step.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        """
        Raises:
            ConfigError: A prompt of the full length would never run, or a setting has no meaning without chunks.
        """
        if not config.enable_chunked_prefill:
            if config.max_num_batched_tokens < config.max_model_len:
                raise ConfigError(
                    f"max_num_batched_tokens ({config.max_num_batched_tokens}) must be at least max_model_len "
                    f"({config.max_model_len}) without chunked prefill",
                    param="max_num_batched_tokens",
                )
            if config.long_prefill_token_threshold:
                raise ConfigError(
                    f"long_prefill_token_threshold ({config.long_prefill_token_threshold}) cuts prompts into chunks: "
                    "leave it at 0 or enable chunked prefill",
                    param="long_prefill_token_threshold",
                )
        self._max_num_tokens = config.max_num_batched_tokens
        self._is_chunking = config.enable_chunked_prefill
        self._max_chunk = config.long_prefill_token_threshold or config.max_num_batched_tokens
        self.num_tokens_left = self._max_num_tokens

    def begin(self) -> None:
        """A new step."""
        self.num_tokens_left = self._max_num_tokens

    def chunk(self, num_remaining: int, num_rows_behind: int) -> int:
        """How much of a prompt to run now.

        Args:
            num_remaining: Known tokens that are not planned yet, at least 1.
            num_rows_behind: Running rows that come later in this step; one token is left to each where possible, so
                that a long prompt does not hold up those who decode.

        Returns:
            Tokens, 0 if the prompt does not fit whole and may not be cut.
        """
        if not self._is_chunking:
            return num_remaining if num_remaining <= self.num_tokens_left else 0
        room = self.num_tokens_left - num_rows_behind
        if room < 1:
            room = min(1, self.num_tokens_left)
        return min(num_remaining, self._max_chunk, room)

    @property
    def is_chunking(self) -> bool:
        """Whether a prompt may be cut."""
        return self._is_chunking
