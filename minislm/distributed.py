"""Several processes as one: `torchrun --nproc-per-node N train.py ...`, on CPUs or GPUs.

Each process holds the whole model and works on its share of the examples: gradients add up to the
whole batch's, rows come back in order. Without torchrun, or `start`, all of this does nothing.
"""

import atexit
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor

_joined = False  # by `start`; a process group that someone else made is ignored


def start(device: str) -> str:
    """Joins torchrun's processes, and returns this one's device."""
    global _joined
    local = None if _joined else os.environ.get("LOCAL_RANK")
    if local is not None and device.startswith("cuda:"):
        raise ValueError(f"device {device!r}: under torchrun give cuda; each process takes one")
    device = f"cuda:{local}" if local is not None and device == "cuda" else device
    if device.startswith("cuda:"):
        if device not in (gpus := [f"cuda:{i}" for i in range(torch.cuda.device_count())]):
            raise ValueError(f"device {device!r} is not one of {', '.join(['cpu', *gpus])}")
        torch.cuda.set_device(device)
    if local is not None:
        # imported once there is a group, as --compile does, its default arguments would hold it,
        # and its threads could abort the process as it ends
        from torch.distributed import nn  # noqa: F401

        stdout = os.dup(1)
        os.dup2(2, 1)  # PyTorch 2.8 and 2.9 print whom they are connected to
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        os.dup2(stdout, 1)
        os.close(stdout)
        atexit.register(dist.destroy_process_group)
        _joined = True
        if rank() > 0:  # the first process speaks for all
            sys.stdout = open(os.devnull, "w", errors="backslashreplace")
    return device


def rank() -> int:
    return dist.get_rank() if _joined else 0


def world_size() -> int:
    return dist.get_world_size() if _joined else 1


def all_gather(part) -> list:
    """Every process's `part`, in the order of their ranks, in every process."""
    parts = [part] * world_size()
    if world_size() > 1:
        dist.all_gather_object(parts, part)
    return parts


def all_reduce(tensors: list[Tensor]) -> None:
    """Replaces tensors by their sums over the processes, in one message (adapters: 1 to 40 MB)."""
    if world_size() > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(total.view_as(tensor))
