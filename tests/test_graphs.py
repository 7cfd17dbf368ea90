"""Which calls are replayed. That a replay gives what the call would have given: test_cuda.py."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from minislm import graphs


@pytest.fixture
def replays(monkeypatch) -> list:
    """A graph's replays, of graphs that do nothing."""
    done = []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: nullcontext())
    captured = lambda: SimpleNamespace(replay=lambda: done.append(True))  # noqa: E731
    monkeypatch.setattr(torch.cuda, "CUDAGraph", captured)
    return done


def test_a_shape_that_comes_back_is_captured_and_replayed_with_new_values(replays):
    given = []
    replayed = graphs.Replayed(lambda inputs: given.append(inputs) or torch.zeros(()), "cpu")
    for number in range(4):
        replayed([[torch.full((2,), number)], [torch.full((3,), -number)]])
    assert len(given) == 2 and len(replays) == 3  # as it is, captured; what is captured is replayed
    (held,), (others,) = given[1]
    assert held.tolist() == [3, 3] and others.tolist() == [-3, -3, -3]
    replayed([[torch.zeros(2)], [torch.zeros(4)]])
    assert len(given) == 3 and len(replays) == 3


def test_there_are_so_many_graphs_and_no_more(replays, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    calls = []
    replayed = graphs.Replayed(lambda inputs: calls.append(1) or torch.zeros(()), "cpu")
    for size in [1, 2, 3] * 3:
        replayed([[torch.zeros(size)]])
    assert len(replayed.graphs) == 2 and len(replays) == 4
    assert len(calls) == 2 + 2 + 3
