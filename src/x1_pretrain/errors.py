"""How a command ends: the exit codes, and errors that are one line for a person.

A `UserError` says what is wrong, the value found, what was expected and the next step. Commands print it
without a traceback; anything else that escapes is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

FINISHED = 0
FAULT = 1
USAGE = 2  # bad usage or config
INTERRUPTED = 75  # stopped on request, checkpoint saved: safe to relaunch
BUDGET_CHECKPOINTED = 76  # stopped by budget, checkpoint saved
BUDGET_STOPPED = 77  # over budget, stopped at once
REFUSED = 78  # refused to start


class UserError(Exception):
    """Something the user can mend. `str(error)` is the whole message."""

    exit_code = USAGE


class RefusedError(UserError):
    """The command understood what was asked and will not start: going on would lose or corrupt something."""

    exit_code = REFUSED


def guarded(command: Callable[[], object]) -> int:
    """Run `command`; turn a UserError into one line on stderr and its exit code.

    An int that the command returns is its exit code; anything else counts as finished.
    """
    try:
        result = command()
    except UserError as error:
        print(f"x1: {error}", file=sys.stderr)
        return error.exit_code
    return result if isinstance(result, int) else FINISHED
