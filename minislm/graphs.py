"""CUDA graphs: a pass of training as one launch.

A small model's pass on a GPU is thousands of kernels of a few microseconds each, and Python takes
ten times as long to launch them. A graph launches all at once, on the memory that they had when it
was captured: it serves one set of input shapes (`packing.arrange` lets few come up).
"""

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor

MAX_GRAPHS = 64  # some 20 MB each, beside the memory that they share


class Replayed:
    """A function of tensors on a GPU. For each set of shapes the first call runs it, the second
    captures it, and this and all later ones replay it.

    run: must neither wait for the GPU nor branch on values, as a graph repeats kernels alone; what
        it changes (gradients) must keep its address.
    """

    def __init__(self, run: Callable[[list[list[Tensor]]], Tensor], device: str):
        self.run, self.device, self.met, self.graphs = run, device, set(), {}
        self.pool = torch.cuda.graph_pool_handle()  # they run in turns, and share their memory

    def __call__(self, inputs: list[list[Tensor]]) -> Tensor:
        """inputs: on any device. The result is to be used before the next call."""
        shapes = str([[tuple(x.shape) for x in part] for part in inputs])
        if shapes not in self.graphs:
            held = [[x.to(self.device, copy=True) for x in part] for part in inputs]
            # the first call loads and compiles kernels, which cannot be captured
            if shapes not in self.met or len(self.graphs) == MAX_GRAPHS:
                self.met.add(shapes)
                return self.run(held)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self.pool):
                self.graphs[shapes] = graph, held, self.run(held)
        graph, held, result = self.graphs[shapes]
        for old, new in zip(chain(*held), chain(*inputs)):
            old.copy_(new)
        graph.replay()
        return result
