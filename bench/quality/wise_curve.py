"""What averaging a tuned trunk with the untouched one is worth: WiSE-FT (Wortsman et al. 2022, arXiv:2109.01903).

    python -m bench.quality.wise_curve mmwudao/models/emoji/towers --untouched parts/lite0 \
        --splits shards/emoji:test-family shards/emoji:test-concept shards/photographs:dev --shares 1 0.8 0.6

The trunk is share * tuned + (1 - share) * untouched; heads, texts and the vectors of the classes stay. Each row: the
share, and for each split the recall at 10 from text to picture, mean over languages. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

from torch import Tensor

from data.reading import open_shards
from data.sample import Sample
from retrieval.evaluation.evaluate import concept_of, encode_samples
from retrieval.evaluation.metrics import concept_labels, ranks, recall_figures
from retrieval.towers.base import Towers, load_towers
from retrieval.towers.pretrained import PretrainedTowers
from retrieval.training.inherit import mixed_trunk
from vqvae.trunk import load_trunk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("towers", type=Path)
    parser.add_argument("--untouched", type=Path, required=True, help="a part that `import trunk` wrote")
    parser.add_argument("--splits", nargs="+", required=True, metavar="SHARDS:SPLIT")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.8, 0.6, 0.4])
    arguments = parser.parse_args()
    towers = load_towers(arguments.towers)
    if not isinstance(towers, PretrainedTowers):
        parser.error(f"{arguments.towers} are of the kind {towers.kind}, which has no trunk trained elsewhere")
    untouched = load_trunk(arguments.untouched).state_dict()
    queries: dict[str, dict[str, Queries]] = {}
    rows = []
    print("share", *(f"{split:>24}" for split in arguments.splits), flush=True)
    for share in arguments.shares:
        row = {"share": share}
        for place in arguments.splits:
            shards, _, split = place.rpartition(":")
            with mixed_trunk(towers.trunk, untouched, share):
                samples, images = encode_samples(towers, open_shards(Path(shards), split))
            if place not in queries:  # texts stay as they are
                queries[place] = queries_of(towers, samples)
            row[place] = recall(queries[place], samples, images)
        rows.append(row)
        print(f"{share:5.2f}", *(f"{row[split]:24.3f}" for split in arguments.splits), flush=True)
    print(json.dumps(rows))


# concepts, one a query, and their vectors [N, D]
Queries = tuple[list[str], Tensor]


def queries_of(towers: Towers, samples: list[Sample]) -> dict[str, Queries]:
    """The captions of the samples in each language, a query each; those of one concept and name are encoded once."""
    found: dict[str, Queries] = {}
    for language in sorted({language for sample in samples for language in sample.captions}):
        pairs = [(concept_of(one), one.captions[language].name) for one in samples if language in one.captions]
        names = sorted({name for _, name in pairs})
        place = {name: row for row, name in enumerate(names)}
        vectors = towers.encode_text(names)
        found[language] = [concept for concept, _ in pairs], vectors[[place[name] for _, name in pairs]]
    return found


def recall(queries: dict[str, Queries], samples: list[Sample], images: Tensor) -> float:
    """Recall at 10 from text to picture, the mean over languages."""
    candidates = [concept_of(sample) for sample in samples]
    figures = []
    for concepts, texts in queries.values():
        labels = concept_labels([*candidates, *concepts])
        found = ranks(texts, images, labels[len(candidates) :], labels[: len(candidates)])
        figures.append(recall_figures(found)["recall@10"])
    return mean(figures)


if __name__ == "__main__":
    main()
