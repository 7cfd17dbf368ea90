"""Several processes as one: `torchrun --nproc-per-node N train.py ...`, on CPUs or GPUs.

Each process holds the whole model and works on its share of the examples. In training, the sum of
their gradients is the gradient of the whole batch; at inference, rows come back in order. Without
torchrun there is one process, and nothing here does anything.
"""

import atexit
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor


def start(device: str) -> str:
    """Joins torchrun's processes, and returns this one's device."""
    if "LOCAL_RANK" not in os.environ or dist.is_initialized():
        return device
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    atexit.register(dist.destroy_process_group)
    if rank() > 0:  # the first process speaks for all
        sys.stdout = open(os.devnull, "w")
    if device != "cuda":
        return device
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return f"cuda:{os.environ['LOCAL_RANK']}"


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def share(items: list) -> list:
    """This process's part of a list: every world-th item."""
    return items[rank() :: world()]


def gather(part) -> list:
    """What every process gives, in the order of their ranks, in every process."""
    if world() == 1:
        return [part]
    parts = [None] * world()
    dist.all_gather_object(parts, part)
    return parts


def sum_(tensors: list[Tensor]) -> None:
    """Replaces tensors by their sums over the processes, in one message.

    A few MB of adapter gradients once a step: unlike DistributedDataParallel's hooks this needs no
    wrapper around the model, and a process may have had no example at all.
    """
    if world() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(total.view_as(tensor))
