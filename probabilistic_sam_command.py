"""The console script `probabilistic-sam`.

It is outside the package, whose import takes seconds, so that interrupting the import prints one line as well.
"""

import sys


def entry() -> None:
    """Import the command line and run it."""
    try:
        from probabilistic_sam.cli import entry
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    entry()
