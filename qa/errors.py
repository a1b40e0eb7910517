"""Errors that the user can put right, and the exit status of a script.

Whoever owns a value (a flag, a file, a folder) checks it once. If it is wrong, they raise `UserError` with one line: what was
found, where, what was expected, and what to do. The three scripts end with `sys.exit(exit_status(main))`:

    0   done; or stopped as --stop-after planned it
    2   the input is wrong: one line, no traceback
    1   anything else: stopped early (the last checkpoint is whole), out of GPU memory, a bug (with its traceback)
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

import torch


class UserError(ValueError):
    """The input is wrong. The message is one line that says how to put it right."""


def not_finite(question_id: str) -> UserError:
    return UserError(f"question {question_id!r}: the model's logits are NaN or infinite; try --precision fp32, and check the "
                     "checkpoint's training log")


class Stopped(Exception):
    """The run ends early: as planned, on request, after it wrote a checkpoint, or because a loss was not finite."""

    def __init__(self, line: str, planned: bool = False) -> None:
        super().__init__(line)
        self.status = 0 if planned else 1


def exit_status(main: Callable[[], None]) -> int:
    """Run a script's `main` and return its exit status. Under torchrun each rank prints its own error, with its number."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file may not be text; printing it must not end a run
    try:
        main()
        sys.stdout.flush()
        return 0
    except UserError as error:
        _say(f"error: {' '.join(str(error).split())}")
        return 2
    except BrokenPipeError:  # who read our output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
    except OSError as error:  # of a file that no code above took care of, such as a log on a full disk
        _say(f"error: {error.filename or 'a file'}: {error.strerror or error}; correct that, and give the same command again")
        return 2
    except Stopped as stopped:  # all ranks agreed on it
        _say(str(stopped), ranks=1)
        return stopped.status
    except KeyboardInterrupt:
        _say("interrupted; what was written before that is whole", ranks=1)
    except torch.cuda.OutOfMemoryError as error:
        _say(f"error: out of GPU memory ({str(error).splitlines()[0]}); lower --micro-tokens, which changes only rounding")
    except RuntimeError as error:
        if not type(error).__name__.startswith("Dist") and "gloo" not in str(error):
            raise
        _say(f"error: another rank has ended, and its own line says why ({str(error).splitlines()[0]:.200})")
    return 1


def _say(line: str, ranks: int = sys.maxsize) -> None:
    """Print it, on the first `ranks` ranks."""
    rank = int(os.environ.get("RANK", "0"))
    if rank < ranks:
        print(f"rank {rank}: {line}" if rank else line, file=sys.stderr)
