"""Imports torch, transformers and the scripts once, loads a model once, then forks a process for every run that tests ask for.

The imports take seconds, a run on tiny data less. A forked process executes the real script as `__main__`, with a command
line, an environment, files for its output and an exit status of its own; so it can be sent signals, be killed, or be
one of several ranks. Started and spoken to by conftest.py: one JSON request per line on stdin, one process id per line back.

    {"argv": ["train_bert.py", "--lr", ...], "env": {"RANK": "0", ...}, "folder": ".../job-3", "before": "..."}
    before                          Python code to execute first, such as one that decides what an evaluation gives
    folder/stdout, folder/stderr    what it printed
    folder/status                   its exit status (-9: killed), once it has ended
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path

ended: list[int] = []  # the status of this process's script, once it has ended in an ordinary way


@atexit.register
def leave() -> None:
    """The last thing at exit: registered before all others. Python would now take its thousands of modules apart: 0.4 s."""
    if ended:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended[0])


def serve() -> None:
    from transformers import BertConfig, BertModel

    import evaluate  # noqa: F401
    import train_bert  # noqa: F401
    import train_llama  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:  # the first from_pretrained compiles a thousand regular expressions
        BertModel(BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(folder)
        BertModel.from_pretrained(folder)
    gc.collect()
    gc.freeze()  # else every process visits, and so copies, all of this one's objects: a second
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the supervisors
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if os.fork() == 0:
            supervise(request)
            break  # the script's process: it has nothing left to do but to exit as any other


def supervise(request: dict) -> None:
    """Fork once more: the child becomes the script, the parent waits for it and writes down how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    folder = Path(request["folder"])
    child = os.fork()
    if child:
        print(child, flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (folder / "status.tmp").write_text(str(status))
        os.rename(folder / "status.tmp", folder / "status")
        os._exit(0)
    for descriptor, name, mode in ((0, os.devnull, "r"), (1, folder / "stdout", "w"), (2, folder / "stderr", "w")):
        with open(name, mode) as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.update(request["env"])
    exec(request["before"], {})
    sys.argv = request["argv"]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        ended.append(0)
    except SystemExit as end:
        ended.append(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    except Exception:
        ended.append(1)
        raise


if __name__ == "__main__":
    serve()
