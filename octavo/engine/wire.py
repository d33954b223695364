"""What both ends of an ipc socket share: socket options, and a reader that survives whatever it is sent.

A file mode of 0700 keeps other users away from the sockets; this keeps a mistake of our own user, or a port scanner
with root rights, from ending an engine. Knows no message in particular.
"""

from __future__ import annotations

import logging
from typing import Any, Generic, TypeVar

import msgspec
import zmq

logger = logging.getLogger(__name__)
MAX_MESSAGE_BYTES = 2**30
"""A larger frame closes the connection. Without a limit a forged length is allocated as it stands."""

M = TypeVar("M")


def make_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    """A socket without a high-water mark: what is on it is bounded by the requests that the scheduler let in."""
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    return socket


class Reader(Generic[M]):
    """Decodes messages of one union of types; drops and counts everything else.

    Args:
        message_type: The union, tagged structs.
        source: Who sends here, for the log.
    """

    def __init__(self, message_type: Any, source: str) -> None:
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(message_type)
        self._source = source
        self.num_dropped = 0

    def read(self, data: bytes) -> M | None:
        """The message, or None when these bytes are none."""
        try:
            return self._decoder.decode(data)
        except Exception as error:  # process border: bytes can raise far more than DecodeError
            self.num_dropped += 1
            if self.num_dropped & (self.num_dropped - 1) == 0:  # the 1st, 2nd, 4th, 8th ...: no flood of lines
                logger.warning(
                    "dropped %d bytes that %s never sends (%s); %d messages so far",
                    len(data),
                    self._source,
                    type(error).__name__,
                    self.num_dropped,
                )
            return None
