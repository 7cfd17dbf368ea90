"""What several test files need: the fixtures' folder, a fixture's reference, and a tiny task."""

import json
import os
import random
import sys
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minislm.quant import neighbours

FIXTURES = Path(__file__).parent / "fixtures"
CHAT_TIED = FIXTURES / "chat-tied"
DECODERS = [f"{f}-{t}" for f in ("qwen3", "qwen2", "llama") for t in ("tied", "untied")]
GRANITES = ["granite-tied", "granite-untied", "granite4-tied", "granite4-untied"]
ENCODERS = ["bert", "xlm-roberta", "roberta"]

torch.set_num_threads(1)  # the models are tiny
# A GPU is for test_cuda.py, in this process; the scripts that tests start find none, and give the
# same bytes everywhere.
if torch.cuda.is_available():
    torch.cuda.init()
    torch.cuda.device_count()  # from now on known
os.environ["CUDA_VISIBLE_DEVICES"] = ""


def int8_works() -> bool:
    try:
        neighbours()
    except ValueError:
        return False
    return True


# Code for a process of its own, which prints what it has loaded of the compiler since it began;
# PyTorch 2.6 and 2.10 load sympy for a layer on the meta device.
BEFORE = 'import sys, torch; torch.nn.Linear(1, 1, device="meta"); before = {*sys.modules}'
LOADED = 'print({"torch._dynamo", "sympy"} & sys.modules.keys() - before)'

int8 = pytest.mark.skipif(not int8_works(), reason="this CPU has no int8 kernel")


def reference(name: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / name / "reference.safetensors")


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def graphs(monkeypatch) -> list[torch.fx.GraphModule]:
    """Modules that are compiled run as traced, whole; their graphs come to this list."""
    found = []

    def backend(graph, inputs, options=None):
        found.append(graph)
        return graph

    compile = partialmethod(torch.nn.Module.compile, backend=backend, fullgraph=True)
    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    monkeypatch.setenv("CXX", sys.executable)  # these need no compiler
    torch.compiler.reset()
    return found


@pytest.fixture
def moods(tmp_path) -> Path:
    """A data folder of three classes: 48 training texts, 18 for validation and 18 for test."""
    words = {
        "joy": "glad sunny laugh sing bright smile happy dance".split(),
        "anger": "shout furious slam rage hate burn kick snap".split(),
        "fear": "dark shiver hide ghost tremble alone scream dread".split(),
    }
    rng, folder = random.Random(0), tmp_path / "moods"
    folder.mkdir()
    for split, n in (("train", 16), ("validation", 6), ("test", 6)):
        rows = [
            {"text": " ".join(rng.sample(words[label], rng.randint(2, 5))), "label": label}
            for _ in range(n) for label in words
        ]  # fmt: skip
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder
