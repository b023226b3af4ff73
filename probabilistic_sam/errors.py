"""One way to tell a user what was wrong: a single line on stderr and exit code 2."""

import os
import sys
import time
from collections.abc import Callable

FIRST_PROCESS_SPEAKS = 20.0  # s; launchers end the others well before that, even on a busy machine


class UserError(ValueError):
    """Bad input: the message says in one line what was wrong, where, and what is accepted."""


def run(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit: 0 or its return value, 2 and one line on stderr for a `UserError`.

    Of several processes (torchrun, accelerate launch) the first speaks for all: what is wrong for one is mostly wrong
    for each, and the launcher ends the others as soon as the first has left. They speak up when it does not.
    """
    try:
        code = main()
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(FIRST_PROCESS_SPEAKS)
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(code or 0)
