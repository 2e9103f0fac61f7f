"""`python -m kd_utils`: runs one of the `commands` as a process.

Exit status: 0 success, 1 failure, 2 wrong input, 130 interrupted.
"""

import os
import signal
import sys
import warnings

import typer

from kd_utils.commands import app

INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Run one command, and return its exit status; an error is one line on stderr."""
    command = typer.main.get_command(app)
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with command.make_context("python -m kd_utils", given) as context:
            return command.invoke(context)
    except typer.Exit as done:  # --help
        return done.exit_code
    except typer.TyperException as error:
        return _error(f"{error.format_message()} (see --help)", 2)
    except (ValueError, OSError) as error:
        return _error(error, 2)
    except RuntimeError as error:
        from kd_utils.sweep.execution import NotebookFailed

        if not isinstance(error, NotebookFailed):
            raise
        return _error(error, 1)
    except KeyboardInterrupt:
        kept = "; finished trials are kept: run the same command again to resume"
        print("\nstopped" + kept * ("sweep" in given[:1]), file=sys.stderr)
        return INTERRUPTED


def _error(message: object, status: int) -> int:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    # What a batch system sends before it kills.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # one line
    from kd_utils.sweep.display import print_plainly

    print_plainly(sys.stdout, sys.stderr)
    status = main()
    for number in (signal.SIGINT, signal.SIGTERM):  # too late to stop anything
        signal.signal(number, signal.SIG_IGN)
    if status == INTERRUPTED:  # Ray, interrupted while it starts, can crash the interpreter's end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
