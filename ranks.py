"""The processes that torchrun starts, and what they tell each other. In one process alone all of this does nothing.

Config.share says what they share out. "batches" (data parallel): all hold the same SAEs, each reads its share of the
text and computes its share of every batch; gradients, counters and thresholds are brought together. "saes": each trains
some of the SAEs on whole batches, and they meet only at the end.
"""

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from threading import Thread
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from config import Share

Item = TypeVar("Item")
GONE = "another process of this run is gone; its own output, or its machine, says why"
TO_JOIN = timedelta(minutes=5)
PATIENCE = timedelta(days=30)  # in a collective: who is gone is noticed by the closing of its connection
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 4}  # seconds, seconds, tries: of a lost machine
GRACE_SECONDS = 3

_batches_are_shared, _at_the_end = False, False
_connections: list[socket.socket] = []


def world_rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_size() -> int:
    """Processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def rank() -> int:
    """Number of this process among those that share its batches; the first alone logs and saves."""
    return world_rank() if _batches_are_shared else 0


def count() -> int:
    """Processes that share a batch."""
    return world_size() if _batches_are_shared else 1


def team() -> int:
    """Number of those processes among all."""
    return 0 if _batches_are_shared else world_rank()


def own(items: list[Item]) -> list[Item]:
    """Those of the items, such as SAEs, that this process's team trains."""
    return items if _batches_are_shared else items[world_rank() :: world_size()]


def start(share: Share, device: torch.device) -> None:
    """Join the other processes of torchrun, each with a GPU of its own where `device` is one.

    Raises ValueError when the environment is not torchrun's or has more processes than GPUs, ConnectionError when the
    others do not come.
    """
    global _batches_are_shared
    if world_size() == 1:
        return
    backend = "gloo"
    if device.type == "cuda":
        gpu, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if gpu >= gpus:
            raise ValueError(f"device = 'cuda': {gpus} GPUs for more processes; give torchrun --nproc-per-node {gpus}")
        torch.cuda.set_device(gpu)
        backend = "cpu:gloo,cuda:nccl"
    with _told("not all processes of this run have come; see what the others say, and torchrun's --rdzv-endpoint"):
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=TO_JOIN)))
        store.set(f"here {rank}", "")
        store.wait([f"here {other}" for other in range(size)], TO_JOIN)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
        _watch(store)
    _batches_are_shared = share == "batches"


def from_first(text: str) -> str:
    """The text that the first process gives, in all of them."""
    if world_size() == 1:
        return text
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    length = torch.tensor(len(data))
    with _told():
        dist.broadcast(length, 0)
        data = data if world_rank() == 0 else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0)
    return bytes(data.tolist()).decode()


def in_any(flag: bool) -> bool:
    """Whether the flag is true in any process, of all teams. All wait here for each other."""
    found = torch.tensor(flag, dtype=torch.int32)
    if world_size() > 1:
        with _told():
            dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def finish(stopped: bool) -> bool:
    """All processes, of all teams, wait here for each other's end; whether any of them was stopped before."""
    global _at_the_end
    _at_the_end = True
    any_stopped = in_any(stopped)
    _part()
    return any_stopped


# ---- among the processes that share a batch ----


def add_(tensors: list[Tensor]) -> None:
    """Each tensor becomes the sum, to the last bit the same, of what the processes have in it."""
    if count() > 1:
        with _told():
            for tensor in tensors:
                dist.all_reduce(tensor)


def mean(tensor: Tensor) -> Tensor:
    """Mean of the processes' tensors, without gradient."""
    if count() == 1:
        return tensor
    total = tensor.detach().clone()
    add_([total])
    return total / count()


def either(flags: Tensor) -> Tensor:
    """Where the flag is true in any of the processes."""
    if count() == 1:
        return flags
    found = flags.to(torch.uint8)
    with _told():
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.bool()


def any_of(*flags: bool) -> list[bool]:
    """`either` for the host: all processes wait here for each other."""
    return list(flags) if count() == 1 else either(torch.tensor(flags)).tolist()


def fail_together() -> None:
    """All processes call this before they raise errors at the same place: each may then end in its own time."""
    if count() > 1:
        any_of(False)
        _part()


# ---- who is gone ----


@contextlib.contextmanager
def _told(problem: str = GONE) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch has no narrower one
        raise ConnectionError(problem) from error


def _watch(store: dist.Store) -> None:
    """Keep a connection open between the first process and each other: the system closes it when one of them dies.

    A collective fails by itself then, or, where a GPU waits in it, never.
    """
    if world_rank() == 0:
        with socket.create_server(("", 0), backlog=world_size()) as server:
            server.settimeout(TO_JOIN.total_seconds())
            store.set("watch", str(server.getsockname()[1]))
            _connections.extend(server.accept()[0] for _ in range(world_size() - 1))
    else:
        _connections.append(socket.create_connection((os.environ["MASTER_ADDR"], int(store.get("watch")))))
    for connection in _connections:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):  # not all on macOS
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        Thread(target=_end_with, args=[connection], daemon=True).start()


def _end_with(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        if connection.recv(1):  # it parted
            return
    if not _batches_are_shared:  # what it trains needs no other: it saves that first
        print(f"rank {world_rank()}: {GONE}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        while not _at_the_end:
            time.sleep(0.1)
    time.sleep(GRACE_SECONDS)  # in which a collective fails, and the process ends as it should
    print(f"rank {world_rank()}: {GONE}", file=sys.stderr, flush=True)
    os._exit(2)


def _part() -> None:
    for connection in _connections:
        with contextlib.suppress(OSError):  # the other has parted and left
            connection.sendall(b".")
