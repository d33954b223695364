"""Every error that a user can meet, with its HTTP status and a stable code.

Nothing here knows about HTTP or the engine: the server turns ``status``, ``code`` and ``param`` into OpenAI's error
body, the command line prints the message alone. A message says what was asked, what is possible, and which field or
flag changes it. Programmer errors are ``assert``, never one of these.
"""

from __future__ import annotations


class OctavoError(Exception):
    """Root of all errors raised on purpose."""

    status: int = 500
    """HTTP status that the server answers with."""
    code: str = "internal_error"
    """Stable, machine-readable name; clients switch on it."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(OctavoError, ValueError):
    """A start-up setting is wrong or cannot be met on this machine; ``param`` names the field."""

    code = "invalid_config"


class ModelNotFoundError(ConfigError):
    """No model under that name or path."""

    status = 404
    code = "model_not_found"


class CheckpointError(OctavoError, ValueError):
    """A weight, tokenizer or config file is truncated, lies about itself, or does not fit the model."""

    code = "invalid_checkpoint"

    def __init__(self, file: str, reason: str, *, tensor: str | None = None) -> None:
        where = f"{file}: tensor {tensor!r}" if tensor else file
        super().__init__(f"{where}: {reason}")
        self.file = file
        self.tensor = tensor
        self.reason = reason


class InvalidRequestError(OctavoError, ValueError):
    """A request field has a value that cannot be honoured; raised before any work is queued."""

    status = 400
    code = "invalid_value"


class ContextLengthError(InvalidRequestError):
    """The prompt does not fit the model's context, or can never fit the KV cache."""

    code = "context_length_exceeded"


class QueueFullError(OctavoError):
    """The bounded queue is full; the request was not accepted. Try again after ``retry_after_s``."""

    status = 503
    code = "queue_full"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EngineDeadError(OctavoError):
    """The engine process ended; carries the cause that it reported last."""

    code = "engine_error"


class EngineRestartingError(OctavoError):
    """The engine is being started again after it had ended; requests wait for it, this call does not."""

    status = 503
    code = "engine_restarting"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QuarantinedError(OctavoError):
    """The engine ended each time that it worked on this request; it is not tried again."""

    code = "request_quarantined"


class QueueTimeoutError(OctavoError):
    """The request waited for its first step longer than its ``max_queue_ms``. Try again after ``retry_after_s``."""

    status = 503
    code = "queue_timeout"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestTimeoutError(OctavoError):
    """The answer was not complete within the request's ``timeout_ms``; what had come by then is lost or streamed."""

    status = 408
    code = "request_timeout"
