"""The machine's devices and their memory."""

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


def synchronise(device: torch.device) -> None:
    """Wait for what the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without having the host wait for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
