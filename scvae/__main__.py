"""The command line, ``scvae`` or ``python -m scvae``: its commands are those of `scvae.commands`."""

from __future__ import annotations

import sys
import warnings

try:
    from scvae.commands.app import app
    from scvae.commands.endings import Ended, ended_in_order, is_refusal
    from scvae.inference import progress
except ModuleNotFoundError as error:
    if error.name != "typer":
        raise
    raise SystemExit('scvae: the command line needs typer: pip install "scvae-pyro[cli]"') from error
except KeyboardInterrupt:
    print("scvae: interrupted; nothing is half-written", file=sys.stderr)
    raise SystemExit(130) from None


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    with progress.quiet(False):  # which is of what need not be known
        progress.say(f"scvae: warning: {message}")


def main() -> None:
    """Run the command line.

    Exit code 1 is for bad input, 2 for wrong usage, 130 for an interruption (Ctrl-C), 75 for another signal where the
    same command with ``--resume`` goes on, and else 128 and the number of the signal.

    Raises
    ------
    SystemExit
        Always, with the exit code.
    """
    try:
        with warnings.catch_warnings(), ended_in_order():
            warnings.showwarning = _show_warning
            app(prog_name="scvae")
    except Ended as end:
        start = "\n" * sys.stderr.isatty()  # which shows ^C
        print(f"{start}scvae: {end.how}; nothing is half-written", file=sys.stderr)
        sys.exit(end.code)
    except (ArithmeticError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, TypeError) and not is_refusal(error):
            raise
        # str(KeyError) is the repr of its message, which would show quotes and escapes
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        sys.exit(f"scvae: {' '.join(str(message).split())}")


if __name__ == "__main__":
    main()
