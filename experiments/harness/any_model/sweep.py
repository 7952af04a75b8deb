"""Judging many random models, in pieces that are kept, and summing the verdicts up."""

import collections
import dataclasses
import hashlib
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tf_keras as keras
from tqdm import tqdm

from harness.any_model import judge
from harness.any_model.random_models import make_random_model
from harness.any_model.ways import WAYS, choose_ways
from tf_repvgg import provenance
from tf_repvgg.storage import FinishedWork

# Models whose verdicts are kept in one file.
_PIECE = 20


def judge_seed(seed: int, ways: int, images: int = 48) -> list[dict[str, Any]]:
    """The verdicts on the model of a seed, one record for each of the ways that it takes.

    Args:
      seed: Seed of the model, and of the choice of ways.
      ways: Number of ways.
      images: Number of images.

    Returns:
      Fields of `judge.Verdict`, with the seed, the way and the parts of the model.
    """
    drawn = make_random_model(seed, images)
    names = choose_ways(seed, ways)
    try:
        fused = judge.fuse(drawn.model)
        verdicts = [judge.judge(fused, drawn.inputs, drawn.outputs, way) for way in names]
    except Exception as error:
        verdicts = [judge.judge_error(error, is_early=True)] * len(names)
    keras.backend.clear_session()
    return [
        {"seed": seed, "way": way, "parts": drawn.parts, **dataclasses.asdict(verdict)}
        for way, verdict in zip(names, verdicts, strict=True)
    ]


def judge_seeds(seeds: Sequence[int], ways: int, kept: FinishedWork) -> list[dict[str, Any]]:
    """The verdicts on the models of many seeds, with a progress bar.

    Args:
      seeds: Seeds in a row.
      ways: Number of ways that each model takes.
      kept: Verdicts of an earlier run, which are taken if neither the library nor this harness has changed.
    """
    inputs = {"ways": ways, "sources_sha256": hash_sources()}
    records = []
    with tqdm(total=len(seeds), desc="random models", unit="model") as bar:
        for start in range(0, len(seeds), _PIECE):
            piece = seeds[start : start + _PIECE]
            name, piece_inputs = f"random/{piece[0]:06}", {**inputs, "seeds": list(piece)}
            result = kept.find(name, piece_inputs)
            if result is None:
                judged = []
                for seed in piece:
                    judged += judge_seed(seed, ways)
                    bar.update()
                result = kept.keep(name, piece_inputs, {"verdicts": judged})
            else:
                bar.update(len(piece))
            records += result["verdicts"]
    return records


def hash_sources() -> str:
    """SHA-256 of the library and of this harness."""
    digest = hashlib.sha256(provenance.sources_sha256().encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def summarize(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of any_model.json about random models: counts, reasons, faults, and how near the bounds were.

    Args:
      records: Records of `judge_seed`.
    """
    records = list(records)
    by_way = {way: [record for record in records if record["way"] == way] for way in WAYS}
    reasons = collections.defaultdict(list)
    for record in records:
        if record["outcome"] == judge.REFUSED:
            reasons[judge.shorten_reason(record["detail"])].append(record)
    return {
        "models": len({record["seed"] for record in records}),
        "outcomes": {
            way: dict(collections.Counter(record["outcome"] for record in group)) for way, group in by_way.items()
        },
        "reasons": [
            {"reason": reason, "count": len(group), "ways": sorted({record["way"] for record in group})}
            for reason, group in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))
        ],
        "faults": [
            {name: record[name] for name in ("seed", "way", "outcome", "detail", "parts")}
            for record in records
            if record["outcome"] in judge.FAULTS
        ],
        "steps": _summarize_distances(records, "steps"),
        "error": _summarize_distances(records, "error"),
    }


def _summarize_distances(records, name):
    """Median and largest value of right files, and the largest share of its bound."""
    right = [record for record in records if record["outcome"] == judge.RIGHT and record[name] is not None]
    if not right:
        return None
    return {
        "files": len(right),
        "median": statistics.median(record[name] for record in right),
        "largest": max(record[name] for record in right),
        "largest_share_of_bound": max(record[name] / record[f"{name}_allowed"] for record in right),
    }
