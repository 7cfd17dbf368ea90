"""CUDA graphs: a pass of training as one launch.

A small model's pass on a GPU is thousands of kernels of a few microseconds each, and Python takes
ten times as long to launch them. A graph launches all at once, on the memory that they had when it
was captured: it is of one shape of its inputs (`packing.arrange` lets few come up).
"""

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor

MOST = 64  # graphs, some 20 MB each beside the memory that they share; then no more are captured


class Replayed:
    """A function of tensors on a GPU: run for a shape that is new, from then on replayed.

    run: neither waits for the GPU nor looks at its values, which a graph would not do again. What
        it changes (gradients) stays where it is in memory.
    """

    def __init__(self, run: Callable[[list[list[Tensor]]], Tensor], device: str):
        self.run, self.device, self.met, self.graphs = run, device, set(), {}
        self.pool = torch.cuda.graph_pool_handle()  # they run in turns, and share their memory

    def __call__(self, inputs: list[list[Tensor]]) -> Tensor:
        """inputs: on any device. The result is to be used before the next call."""
        shapes = str([[tuple(x.shape) for x in part] for part in inputs])
        if shapes not in self.graphs:
            held = [[x.to(self.device, copy=True) for x in part] for part in inputs]
            # what is loaded, or compiled, at first use cannot be captured
            if shapes not in self.met or len(self.graphs) == MOST:
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
