"""Errors of the command lines: a single line on stderr and exit code 2."""

import importlib.util
import os
import sys
import time
from collections.abc import Callable

OTHER_PROCESSES_WAIT = 20.0  # s; launchers end them well before that, even on a busy machine


class UserError(ValueError):
    """Bad input; the message is one line that says what was wrong, where, and what is accepted."""


def require(*modules: str, extra: str) -> None:
    """Exit with code 2 and one line on stderr where a module is not installed that belongs to an extra.

    Scripts call it before their other imports, which would end in a traceback.
    """
    for name in modules:
        if importlib.util.find_spec(name) is None:
            print(
                f"error: {name} is not installed; accepted: pip install 'probabilistic-sam[{extra}]'", file=sys.stderr
            )
            sys.exit(2)


def run(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit: 0 or its return value, 2 and one line on stderr for a `UserError`.

    With several processes (torchrun, accelerate launch) the same error usually occurs in all of them. Then only the
    first process prints it, since the others wait and are ended by the launcher when the first one exits. They print
    it if that does not happen.
    """
    try:
        code = main()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(OTHER_PROCESSES_WAIT)
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(code or 0)
