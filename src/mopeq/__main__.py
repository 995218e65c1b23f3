"""Where the command starts: a Ctrl-C while Python still loads modules ends it without a traceback, nothing begun."""

from __future__ import annotations

import signal


def main() -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as a shell has it for what it starts with & ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from mopeq import cli

    cli.main()


if __name__ == "__main__":
    main()
