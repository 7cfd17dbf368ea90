"""CUDA graphs: a pass of training as one launch.

A small model's pass on a GPU is thousands of kernels of a few microseconds each, which Python takes
ten times as long to launch. A graph launches them all at once, on the memory that they had when it
was captured, so it is of one shape of its inputs. `packing.arrange` lets few shapes come up.
"""

from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor


class Replayed:
    """A function of tensors on a GPU: as it is for shapes that are new, a graph for all others.

    run: takes lists of tensors, and neither waits for the GPU nor has Python look at a value there;
        what it changes (gradients) must stay where it is in memory.
    """

    def __init__(self, run: Callable[[list[list[Tensor]]], Tensor], device: str):
        self.run, self.device, self.graphs = run, device, {}
        self.pool = torch.cuda.graph_pool_handle()  # graphs run in turns, and share their memory

    def __call__(self, inputs: list[list[Tensor]]) -> Tensor:
        """Of tensors wherever they are. The result is to be used before the next call."""
        shapes = str([[tuple(x.shape) for x in part] for part in inputs])
        if (
            shapes not in self.graphs
        ):  # what is loaded, or compiled, at first use cannot be captured
            self.graphs[shapes] = None
            return self.run([[x.to(self.device) for x in part] for part in inputs])
        if self.graphs[shapes] is None:
            held = [[x.to(self.device, copy=True) for x in part] for part in inputs]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, self.pool):
                self.graphs[shapes] = graph, held, self.run(held)
        graph, held, result = self.graphs[shapes]
        for old, new in zip(chain(*held), chain(*inputs)):
            old.copy_(new)
        graph.replay()
        return result
