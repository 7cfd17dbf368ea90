"""benchmarks/parity.py asks both sides the same, and would see a difference."""

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CHAT_TIED
from test_train import train

from minislm import load_backbone, lora
from minislm.weights import load_adapter


class Oracle:
    """In transformers' and PEFT's place: our decoder's whole logits, with a run's adapter."""

    off = 0.0

    def __init__(self, model, dtype):
        self.decoder = load_backbone(model, dtype)

    def __call__(self, ids):
        logits = self.decoder.logits(self.decoder(ids))  # (B, T, V)
        logits[:, -1] += self.off
        return SimpleNamespace(logits=logits)

    def with_adapter(self, run):
        load_adapter(Path(run), self.decoder)
        lora.merge(self.decoder)
        return self


@pytest.fixture
def differences(monkeypatch, capsys):
    """Runs parity.py, and returns the largest difference in float64, float32 and bfloat16."""
    model = SimpleNamespace(from_pretrained=Oracle)
    adapted = SimpleNamespace(from_pretrained=Oracle.with_adapter)
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoModelForCausalLM=model))
    monkeypatch.setitem(sys.modules, "peft", SimpleNamespace(PeftModel=adapted))
    monkeypatch.delitem(sys.modules, "parity", raising=False)
    parity = importlib.import_module("parity")

    def measured(*arguments) -> list[float]:
        monkeypatch.setattr(sys, "argv", ["parity.py", *map(str, arguments)])
        parity.main()
        return [float(n) for n in re.findall(r"difference (\S+),", capsys.readouterr().out)]

    return measured


@pytest.mark.parametrize("off", [0.0, 0.5])
def test_whole_logits_and_a_runs_class_logits_are_compared(
    off, differences, moods, tmp_path, monkeypatch
):
    train(monkeypatch, moods, tmp_path / "run", "--max-steps", 3)
    monkeypatch.setattr(Oracle, "off", off)
    for given in (("--model", CHAT_TIED, "--data", moods), ("--run", tmp_path / "run")):
        found = differences(*given, "--n", 3)
        assert len(found) == 3 and found[0] == pytest.approx(off, abs=1e-9)
        assert found[1] == pytest.approx(off, abs=1e-4) and found[2] == pytest.approx(off, abs=0.2)
