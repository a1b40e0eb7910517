"""What a script says and returns when the world around it ends early. The errors themselves are tested in tests/scripts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(code: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output="stdout" not in kwargs, text=True, **kwargs)


def test_a_reader_that_ends_early_is_no_error():
    """As in `python -m qa.ask ... | head -1`."""
    code = "import sys; from qa.errors import exit_status; sys.exit(exit_status(lambda: print('line\\n' * 100_000)))"
    with subprocess.Popen(["true"], stdin=subprocess.PIPE) as reader:
        reader.wait()
        ended = run(code, stdout=reader.stdin, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_windows_lacks_locks_and_a_signal():
    code = ("import sys, signal; sys.modules['fcntl'] = None; del signal.SIGUSR1; from pathlib import Path; import torch; "
            "from qa.training.run import lock_run; from qa.training.state import StopSignal; "
            "from qa.training.distributed import Runtime; lock_run(Path('.'), Runtime(0, 1, torch.device('cpu'))); "
            "StopSignal().release(); print('fine')")
    assert run(code).stdout == "fine\n"
