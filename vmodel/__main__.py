"""`python -m vmodel`, and the command `vmodel`."""

from __future__ import annotations

import signal
import sys


def main() -> int:
    """Runs the command line of this process; returns the exit status.

    While modules load, and after the command has ended, Ctrl-C ends the process by the signal: Python's own handler
    would print a traceback there.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is ignored in a script's background jobs
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from vmodel import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
