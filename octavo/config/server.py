"""ServerConfig: everything a user may set about the HTTP server, under the names that users of vLLM know.

The counterpart of ``EngineArgs``: the same ``Setting``s feed flags, ``--config`` files and Python. Nothing here is left
to be resolved, so what was asked for is what the server gets. Knows no engine and no HTTP library.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from octavo.config.guard import GuardConfig
from octavo.config.setting import setting, settings_of
from octavo.errors import ConfigError

LISTENING, REQUESTS, ANSWERS, LOGGING = "Listening", "Requests", "Answers", "Server log"
INT32_MAX = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class ServerConfig(GuardConfig):
    """What was asked of the server.

    Raises:
        ConfigError: A value is impossible; ``param`` names the field.
    """

    host: str | None = setting(None, "text", LISTENING, "Address to listen on. Default: all interfaces.", optional=True)
    port: int = setting(8000, "count", LISTENING, "Port to listen on; 0 lets the system choose.", low=0, high=65535)
    uds: str | None = setting(
        None, "text", LISTENING, "Path of a Unix socket to listen on instead of host and port.", optional=True
    )
    root_path: str | None = setting(
        None, "text", LISTENING, "Prefix of all paths, where a proxy in front of the server strips it.", optional=True
    )
    ssl_keyfile: str | None = setting(None, "text", LISTENING, "File with the TLS key.", optional=True)
    ssl_certfile: str | None = setting(None, "text", LISTENING, "File with the TLS certificate.", optional=True)
    ssl_ca_certs: str | None = setting(
        None, "text", LISTENING, "File with the certificates that clients must be signed by.", optional=True
    )
    ssl_cert_reqs: int = setting(
        0, "count", LISTENING, "Client certificates: 0 not asked for, 1 asked for, 2 demanded.", low=0, high=2
    )
    allowed_origins: tuple[str, ...] = setting(
        ("*",), "names", LISTENING, "Origins that browsers may call from (CORS)."
    )
    allowed_methods: tuple[str, ...] = setting(("*",), "names", LISTENING, "Methods that browsers may use (CORS).")
    allowed_headers: tuple[str, ...] = setting(("*",), "names", LISTENING, "Headers that browsers may send (CORS).")
    allow_credentials: bool = setting(False, "switch", LISTENING, "Let browsers send credentials (CORS).")
    disable_fastapi_docs: bool = setting(False, "switch", LISTENING, "Serve no /docs, /redoc and /openapi.json.")
    trust_request_chat_template: bool = setting(
        False, "switch", REQUESTS, "Let requests bring a chat template of their own; it runs bounded in a sandbox."
    )
    strict_openai: bool = setting(
        False, "switch", REQUESTS,
        "Refuse what OpenAI refuses and this server would take: no model, a temperature above 2, more than 4 stop "
        "texts.",
    )  # fmt: skip
    chat_template_content_format: str = setting(
        "auto", "text", REQUESTS,
        "How templates get a message's content: as one string, or as a list of parts (openai). auto: by the template.",
        choices=("auto", "string", "openai"),
    )  # fmt: skip
    default_chat_template_kwargs: Mapping[str, Any] = setting(
        {}, "table", REQUESTS, 'Variables for chat templates that requests may override: {"enable_thinking": false}.'
    )
    response_role: str = setting("assistant", "text", ANSWERS, "Role of the messages that the server answers with.")
    reasoning_parser: str = setting(
        "auto", "text", ANSWERS,
        "What separates thoughts from the answer: a parser's name, or none. auto: by the chat template.",
        open_choices=True, choices=("auto", "none"),
    )  # fmt: skip
    return_tokens_as_token_ids: bool = setting(
        False, "switch", ANSWERS, "Show tokens in logprobs as token_id:N, so that none is ambiguous."
    )
    enable_force_include_usage: bool = setting(
        False, "switch", ANSWERS, "Send usage at the end of every stream, asked for or not."
    )
    enable_request_id_headers: bool = setting(
        True, "switch", ANSWERS, "Answer with an X-Request-Id header: the client's own, or one drawn."
    )
    error_format: str = setting(
        "openai", "text", ANSWERS, "Types and codes in error bodies.", choices=("openai", "vllm")
    )
    stream_stall_timeout: float = setting(
        60.0, "number", ANSWERS, "Seconds that a reader may take nothing from its stream before it is cut off.",
        low=0, above_low=True,
    )  # fmt: skip
    uvicorn_log_level: str = setting(
        "info", "text", LOGGING, "Log level of the HTTP library.",
        choices=("critical", "error", "warning", "info", "debug", "trace"),
    )  # fmt: skip
    disable_uvicorn_access_log: bool = setting(False, "switch", LOGGING, "Log no line per request.")
    log_format: str = setting(
        "text", "text", LOGGING, "Lines for people (text), or one object per line for programs (json).",
        choices=("text", "json"),
    )  # fmt: skip
    mirror_vllm_metrics: bool = setting(
        False, "switch", LOGGING, "Show each metric a second time under its name in vLLM, for dashboards made for that."
    )
    otlp_traces_endpoint: str | None = setting(
        None, "text", LOGGING,
        "Send a span per request to this OpenTelemetry collector over HTTP: http://localhost:4318/v1/traces.",
        optional=True,
    )  # fmt: skip
    enable_log_requests: bool = setting(
        False, "switch", LOGGING, "Log each request: its parameters and the beginning of its prompt."
    )
    enable_log_outputs: bool = setting(False, "switch", LOGGING, "Log each answer, with --enable-log-requests.")
    max_log_len: int | None = setting(
        None, "count", LOGGING, "Most characters of a prompt or an answer in the log. Default: all.", low=0,
        high=INT32_MAX, optional=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in ("api_key", "admin_api_key"):
            keys: object = getattr(self, name)
            if isinstance(keys, list | tuple) and "" in keys:  # said without the others, which are secrets
                raise ConfigError(f"{name} is given an empty key; is a variable empty that holds it?", param=name)
        for name, each in settings_of(ServerConfig).items():
            # Frozen for everybody else; this is where text becomes a value.
            object.__setattr__(self, name, each.check(name, getattr(self, name)))
        self._check_tls()
        self._check_keys()
        if self.root_path is not None and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise ConfigError(
                f"root_path is {self.root_path!r}, but must begin with '/' and not end with one", param="root_path"
            )
        if self.enable_log_outputs and not self.enable_log_requests:
            raise ConfigError(
                "enable_log_outputs is set, but logs nothing without enable_log_requests", param="enable_log_outputs"
            )

    def _check_tls(self) -> None:
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            missing = "ssl_keyfile" if self.ssl_keyfile is None else "ssl_certfile"
            raise ConfigError(f"{missing} is missing: TLS needs both ssl_keyfile and ssl_certfile", param=missing)
        if self.ssl_keyfile is not None:
            return
        for name, is_given in (("ssl_ca_certs", self.ssl_ca_certs is not None), ("ssl_cert_reqs", self.ssl_cert_reqs)):
            if is_given:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}, but nobody shows a certificate without TLS: give ssl_keyfile "
                    "and ssl_certfile too",
                    param=name,
                )

    def _check_keys(self) -> None:
        if set(self.api_key) & set(self.admin_api_key):
            raise ConfigError(
                "admin_api_key is given a key that is an api_key too, so that whoever may ask could change the server: "
                "choose another",
                param="admin_api_key",
            )

    def non_default(self) -> dict[str, Any]:
        """Settings that differ from the defaults, for the log."""
        default = ServerConfig()
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != getattr(default, field.name)
        }
