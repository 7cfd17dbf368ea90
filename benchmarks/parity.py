"""Real models, real prompts: our logits against transformers' (pip install -e ".[bench]").

    python benchmarks/parity.py --model DIR --data DIR [--n 20]    # logits of the whole vocabulary
    python benchmarks/parity.py --run runs/x                       # a run's adapter, loaded by PEFT

Prints the largest difference over the test split's first texts, beside the largest logit.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from minislm import Classifier
from minislm.data import load_split
from minislm.methods import DTYPES, read_run


@torch.inference_mode()
def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model")
    p.add_argument("--data")
    p.add_argument("--run")
    p.add_argument("--n", type=int, default=20, help="texts of the test split [20]")
    a = p.parse_args()
    if not a.run and not (a.model and a.data):
        p.error("give --run, or --model and --data")
    given = {"model": a.model, "data": a.data, "text_column": "text", "label_column": "label"}
    settings = read_run(Path(a.run))["settings"] if a.run else given
    columns = settings["text_column"], settings["label_column"]
    texts = [e.text for e in load_split(Path(settings["data"]), "test", columns)[: a.n]]
    for dtype in ("float64", "float32", "bfloat16"):
        theirs = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=DTYPES[dtype])
        if a.run:
            from peft import PeftModel

            theirs = PeftModel.from_pretrained(theirs, a.run)
            ours = Classifier.load(a.run, dtype)
        else:
            ours = Classifier.zero_shot(a.model, a.data, dtype)
        differences, largest = [], 0.0
        for text in texts:
            ids = torch.tensor([ours.prompt.branches(text)[0]])
            expected = theirs(ids).logits[0, -1]
            if a.run:
                logits, expected = ours.logits([ids.tolist()])[0], expected[ours.label_token_ids]
            else:
                ours.backbone.lm_head = getattr(theirs, "lm_head", None)  # an untied head, if any
                logits = ours.backbone.logits(ours.backbone(ids)[0, -1])
            differences.append((logits - expected).abs().max().item())
            largest = max(largest, expected.abs().max().item())
        what = "class logits" if a.run else "logits"
        print(
            f"{dtype:<9} {what}: largest difference {max(differences):.1e}, "
            f"largest logit {largest:.0f}, {len(texts)} prompts"
        )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
