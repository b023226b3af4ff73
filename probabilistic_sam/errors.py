"""One way to tell a user what was wrong: a single line on stderr and exit code 2."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input: the message says in one line what was wrong, where, and what is accepted."""


def run(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit: 0 or its return value, 2 and one line on stderr for a `UserError`."""
    try:
        code = main()
    except UserError as error:
        message = " ".join(str(error).split())
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(code or 0)
