"""Exit statuses, and an error as a line on stderr."""

from __future__ import annotations

import re
import sys

from octavo.errors import ConfigError, OctavoError

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
"""Something failed; the command line is wrong; Ctrl-C."""


def report_error(error: OctavoError, prog: str) -> int:
    """Say in one or two lines what went wrong; returns the exit status."""
    message = error.message
    # A setting is shown as its flag; the name of an environment variable, in capitals, stays.
    if isinstance(error, ConfigError) and error.param and error.param.islower():
        flag = "--" + error.param.replace("_", "-")
        message = re.sub(rf"^{re.escape(error.param)}(?= is | asks | \(|: )", flag, message)
    sys.stderr.write(f"{prog}: error: {message}\n")
    is_usage = type(error) is ConfigError and error.param is not None
    return EXIT_USAGE if is_usage else EXIT_ERROR
