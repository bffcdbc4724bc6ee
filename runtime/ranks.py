"""The processes that torchrun starts, and what they tell each other. In a single process all of this does nothing.

Config.share says what they share out. "batches" (data parallel): each reads its share of the text and computes its
share of every batch; gradients, counters and thresholds are brought together. "saes": each trains some of the SAEs on
whole batches, and they meet only at the end. When a process dies, torchrun ends the others on its machine within 30
seconds; on other machines a collective fails, at the latest after TIMEOUT.
"""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.checks import explained, require

Item = TypeVar("Item")
TO_JOIN = timedelta(minutes=5)
TIMEOUT = timedelta(minutes=30)  # of a collective: the others wait while the first process writes a state of gigabytes

_batches_are_shared = False
_store: dist.Store | None = None


def world_rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_size() -> int:
    """Count the processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def rank() -> int:
    """Number this process among those that share its batches; only the first of them logs and saves."""
    return world_rank() if _batches_are_shared else 0


def count() -> int:
    """Count the processes that share a batch."""
    return world_size() if _batches_are_shared else 1


def team() -> int:
    """Number the team of processes that share this one's batches."""
    return 0 if _batches_are_shared else world_rank()


def own(items: list[Item]) -> list[Item]:
    """Pick the items, such as SAEs, that this process's team trains."""
    return items if _batches_are_shared else items[world_rank() :: world_size()]


def start(share: Literal["batches", "saes"], device: torch.device) -> None:
    """Join the other processes of torchrun, each with a GPU of its own where `device` is one.

    Raises: ValueError when the environment is not torchrun's or has more processes than GPUs, ConnectionError when the
    others do not come.
    """
    global _batches_are_shared, _store
    if world_size() == 1:
        return
    backend = "gloo"
    if device.type == "cuda":
        gpu, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        require(gpu < gpus, f"device = 'cuda': {gpus} GPUs for more processes; give torchrun --nproc-per-node {gpus}")
        torch.cuda.set_device(gpu)
        backend = "cpu:gloo,cuda:nccl"
    remedy = "read the others' output, and check torchrun's --rdzv-endpoint"
    with explained("not all processes of this run have joined", RuntimeError, remedy=remedy, raised=ConnectionError):
        _store, rank, size = next(iter(dist.rendezvous("env://", timeout=TO_JOIN)))
        _store.set(f"here {rank}", "")
        _store.wait([f"here {other}" for other in range(size)], TO_JOIN)
        dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=TIMEOUT)
    _batches_are_shared = share == "batches"


def _together(collective: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function of torch, which raises RuntimeError and nothing narrower when another process is gone."""
    remedy = "its own output, or its machine, says why"
    with explained("another process of this run is gone", RuntimeError, remedy=remedy, raised=ConnectionError):
        return collective(*arguments, **options)


# ---- among all processes, whatever they share out ----


def from_first(text: str) -> str:
    """Give every process the text that the first one passes."""
    texts = [text]
    if world_size() > 1:
        _together(dist.broadcast_object_list, texts, device=torch.device("cpu"))
    return texts[0]


def in_any(flag: bool) -> bool:
    """Say whether the flag is true in any process, of all teams. All of them wait here for each other."""
    found = torch.tensor(flag, dtype=torch.uint8)
    if world_size() > 1:
        _together(dist.all_reduce, found, dist.ReduceOp.MAX)
    return bool(found)


def meet(is_stopped: bool, should_stop: Callable[[], bool]) -> bool:
    """Report that this process is done or was stopped, and leave the others; the first process waits for all.

    Returns whether, as far as this process knows, everything was trained to its end.
    """
    if _store is None:
        return not is_stopped
    _together(_store.set, f"done {world_rank()}", "stopped" if is_stopped else "")
    expected = [f"done {rank}" for rank in (range(world_size()) if world_rank() == 0 else [world_rank()])]
    while not (all_done := _together(_store.check, expected)) and not should_stop():
        time.sleep(0.5)
    whole = all_done and not any(_together(_store.get, key) for key in expected)
    dist.destroy_process_group()
    return whole


# ---- among the processes that share a batch ----


def add_(tensors: list[Tensor]) -> None:
    """Replace each tensor by its sum over the processes, which is the same in all of them to the last bit."""
    if count() > 1:
        for tensor in tensors:
            _together(dist.all_reduce, tensor)


def mean(tensor: Tensor) -> Tensor:
    """Average the processes' tensors, without gradient."""
    if count() == 1:
        return tensor
    total = tensor.detach().clone()
    add_([total])
    return total / count()


def either(flags: Tensor) -> Tensor:
    """Mark where the flag is true in any of the processes."""
    if count() == 1:
        return flags
    found = flags.to(torch.uint8)
    _together(dist.all_reduce, found, dist.ReduceOp.MAX)
    return found.bool()


def any_of(*flags: bool) -> list[bool]:
    """Do the same as `either` for flags on the host. All processes wait here for each other."""
    return list(flags) if count() == 1 else either(torch.tensor(flags)).tolist()
