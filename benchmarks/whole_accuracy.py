"""Accuracy of a text model or a CRNN in torch, on the evaluation set of a corpus.

python benchmarks/whole_accuracy.py --data DIR models/pretrained/intent.safetensors
"""

import csv
import math
from collections import defaultdict
from pathlib import Path

import click
import torch
from torchaudio.functional import edit_distance

from cnngru_edge.calibration.corpus.read import EVAL, read_corpus
from cnngru_edge.export.training.whole import answers, load_examples
from cnngru_edge.models.nets.checkpoint import load_checkpoint
from cnngru_edge.models.nets.cnn_gru import CnnGru


@click.command()
@click.option("--data", type=click.Path(path_type=Path), required=True, help="The corpus.")
@click.argument("checkpoint", type=click.Path(path_type=Path))
def main(data: Path, checkpoint: Path) -> None:
    """Print the share of right answers, in all and by group."""
    model = load_checkpoint(checkpoint)
    assert not isinstance(model, CnnGru)
    clips = read_corpus(data).of(EVAL)
    examples, errors = load_examples(clips, model.spec)
    assert not errors
    with (data / "manifest.csv").open(newline="") as f:
        rows = [row for row in csv.DictReader(f) if row["set"] == EVAL]
    right: dict[str, list[bool]] = defaultdict(list)
    edits, characters = 0, 0
    for row, example in zip(rows, examples, strict=True):
        with torch.inference_mode():
            (found,) = answers(model.spec, model(torch.from_numpy(example.given)[None]))
        right["all"].append(found == example.expected)
        right[row.get("style") or example.expected].append(found == example.expected)
        edits += edit_distance(example.expected, found)
        characters += len(example.expected)
    for group, of_group in right.items():
        share = sum(of_group) / len(of_group)
        error = math.sqrt(share * (1 - share) / len(of_group))
        print(f"{group:<12} {share:7.2%} of {len(of_group)} (standard error {error:.2%})")
    if model.spec.writes_text:
        print(f"character errors {edits / characters:.2%} of {characters}")
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
