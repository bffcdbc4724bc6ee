"""Runs of main.py in forked children of one process that has imported everything: they start at once.

Reads a request a line from standard input, JSON: {"args": [...], "cwd": ..., and one of
    "kill_after": seconds            SIGKILL then
    "file_limit": bytes              no file can grow larger, as on a full disk
    "kill_at_flush": n               SIGKILL by itself when n files or folders have been flushed to the disk
    "signals": [[file, signal], ...] wait until the file exists, then send the signal
}; answers {"rc", "out", "err", "seconds"}. One thread, so that forks are safe and results comparable.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from transformer_lens.model_bridge import TransformerBridge  # noqa: F401  (what a run imports late)

import disk
import evaluation  # noqa: F401
import main
import results  # noqa: F401
import training  # noqa: F401

WATCH = os.WEXITED | os.WNOHANG | os.WNOWAIT


def child(request: dict, out: int, err: int) -> None:
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.chdir(request["cwd"])
    torch.set_num_threads(1)
    sys.argv = ["main.py", *request["args"]]
    if limit := request.get("file_limit"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if n := request.get("kill_at_flush"):
        flush, calls = disk.flush, iter(range(n, 0, -1))

        def flush_or_die(path: Path) -> None:
            if next(calls) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(path)

        disk.flush = flush_or_die
    main.main()


def serve(request: dict) -> dict:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                child(request, out.fileno(), err.fileno())
                code = 0
            except SystemExit as stop:
                code = stop.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(BaseException):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        if (seconds := request.get("kill_after")) is not None:
            time.sleep(seconds)
            os.kill(pid, signal.SIGKILL)
        for file, number in request.get("signals", []):
            while not list(Path(request["cwd"]).glob(file)) and os.waitid(os.P_PID, pid, WATCH) is None:
                time.sleep(0.002)
            os.kill(pid, number)
            time.sleep(0.3)  # two signals of a kind at once are one
        _, status = os.waitpid(pid, 0)
        seconds = time.perf_counter() - start
        out.seek(0)
        err.seek(0)
        rc = os.waitstatus_to_exitcode(status)
        return {"rc": rc, "out": out.read(), "err": err.read(), "seconds": seconds}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
