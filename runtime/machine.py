"""The machine's devices and their memory."""

import contextlib
import time
from collections.abc import Iterator

import psutil
import torch
from torch import Tensor

from config import Config
from runtime import ranks
from runtime.checks import require


def placements(cfg: Config) -> list[torch.device]:
    """List where SAEs are placed in turn: all GPUs where cfg names none, and torchrun gave this process none."""
    device = cfg.torch_device
    if device.type == "cpu" or device.index is not None or ranks.world_size() > 1:
        return [device]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def check_buffer(cfg: Config, rows: int, row_bytes: int) -> None:
    """Refuse a buffer of activations that does not fit, before the system kills the process for it."""
    device = cfg.torch_device
    copies = 1 if device.type == "cuda" else 2  # one more while its state is saved
    needed, free = copies * rows * row_bytes, _free_memory(device)
    require(
        needed <= free,
        f"num_batches_in_buffer = {cfg.num_batches_in_buffer}: the buffer (and, on a CPU, a copy to save it)"
        f" needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; give at most"
        f" {cfg.num_batches_in_buffer * free // needed}, or lower model_batch_size = {cfg.model_batch_size}",
    )


def _free_memory(device: torch.device) -> int:
    """Count the bytes that can still be allocated on the device, as far as the system tells."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available // ranks.local_size()


class Clock:
    """Add up the time that a device spends on something. The host waits for the device only when it is read."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._seconds = device, 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of what is done within."""
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            start = stream.record_event(torch.cuda.Event(enable_timing=True))
            yield
            self._events.append((start, stream.record_event(torch.cuda.Event(enable_timing=True))))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    @property
    def seconds(self) -> float:
        """The time that has been counted."""
        for start, end in self._events:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._events.clear()
        return self._seconds


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without having the host wait for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
