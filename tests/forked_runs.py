"""Runs of main.py, or jobs of rank_jobs.py, in forked children of one process that has imported everything: they start
at once, and draw no figures.

Reads a request a line from standard input, JSON: {"args": [...], "cwd": ..., and some of
    "processes": n                   so many, as torchrun starts them, with its store but without its agent
    "job": name                      of a function of rank_jobs.py, called with args instead of main.py
    "before": name                   of a function of rank_jobs.py, called before main.py
    "kill_after": seconds            SIGKILL then
    "environment": {name: value}     to be added to its own
    "terminal": true                 one process whose output, all under "out", goes to a terminal of 80 columns
    "file_limit": bytes              no file can grow larger, as on a full disk
    "kill_at_flush": n               SIGKILL by itself when n files or folders have been flushed to the disk
    "signals": [[file, signal, rank or None], ...]  wait until the file exists, then send the signal to that or to all
}; answers with a list, an object a process: {"rc", "out", "err", "seconds"}. One thread, so that forks are safe and
results comparable.
"""

import contextlib
import json
import os
import pty
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import rank_jobs
import torch
import torch.distributed as dist
import transformer_lens.model_bridge  # noqa: F401

import main
import results
import sweep  # noqa: F401
from runtime import disk

results.save_figures = lambda *tables: []  # they take longer than all the rest of a run
WATCH = os.WEXITED | os.WNOHANG | os.WNOWAIT


def child(request: dict, environment: dict[str, str]) -> int | None:
    os.environ.update(environment | request.get("environment", {}))
    os.chdir(request["cwd"])
    torch.set_num_threads(1)
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
    if before := request.get("before"):
        getattr(rank_jobs, before)()
    if job := request.get("job"):
        return getattr(rank_jobs, job)(*request["args"])
    return main.main(request["args"])


def fork(request: dict, environment: dict[str, str], out: IO[str], err: IO[str]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            code = child(request, environment) or 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    return pid


@contextlib.contextmanager
def as_torchrun(count: int) -> Iterator[dict[str, str]]:
    """Keep the store of a run in a process of its own; gives what torchrun puts into the environment of the others."""
    if count <= 1:
        yield {}
        return
    reading, writing = os.pipe()
    server, pid = os.getpid(), os.fork()
    if pid == 0:
        store = dist.TCPStore("localhost", 0, count, is_master=True, wait_for_workers=False)
        os.write(writing, str(store.port).encode())
        while os.getppid() == server:
            time.sleep(1)
        os._exit(0)
    os.close(writing)
    with open(reading, "rb", buffering=0) as pipe:
        port = pipe.read(16).decode()
    yield {
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def in_a_terminal(request: dict) -> dict:
    controller, terminal = pty.openpty()
    pid = fork(request, {"COLUMNS": "80"}, *2 * [os.fdopen(terminal, "w")])
    written = b""
    with contextlib.suppress(OSError):  # Linux, at the end
        while chunk := os.read(controller, 1 << 16):
            written += chunk
    os.close(controller)
    return {"rc": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), "out": written.decode()}


def serve(request: dict) -> list[dict]:
    count = 0 if request.get("terminal") else request.get("processes", 1)
    with contextlib.ExitStack() as stack:
        environment = stack.enter_context(as_torchrun(count))
        outputs = [tuple(stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)) for _ in range(count)]
        start = time.perf_counter()
        pids = [
            fork(request, environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if environment else {}), *output)
            for rank, output in enumerate(outputs)
        ]
        if (seconds := request.get("kill_after")) is not None:
            time.sleep(seconds)
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        for file, number, rank in request.get("signals", []):
            while not list(Path(request["cwd"]).glob(file)) and all(
                os.waitid(os.P_PID, pid, WATCH) is None for pid in pids
            ):
                time.sleep(0.002)
            for pid in pids if rank is None else [pids[rank]]:
                os.kill(pid, number)
            time.sleep(0.3)  # two signals of a kind at once are one
        answers = [in_a_terminal(request)] if request.get("terminal") else []
        for pid, (out, err) in zip(pids, outputs):
            _, status = os.waitpid(pid, 0)
            seconds = time.perf_counter() - start
            out.seek(0)
            err.seek(0)
            rc = os.waitstatus_to_exitcode(status)
            answers.append({"rc": rc, "out": out.read(), "err": err.read(), "seconds": seconds})
        return answers


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
