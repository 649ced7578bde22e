"""mmkd features: look at stored features of teachers."""

import argparse
import json
from typing import Any

HELP = "show, verify or summarise stored features of teachers"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declares the arguments."""
    parser.add_argument("action", choices=("show", "verify", "stats"), help="manifest, full check, or statistics")
    parser.add_argument("path", metavar="DIR", help="a feature set, or a folder of several")
    parser.add_argument("--pairs", metavar="DIR", help="the set of pairs that they must belong to")


def run(args: argparse.Namespace) -> None:
    """Prints one JSON object a feature set."""
    from mmkd_jax import io
    from mmkd_jax.data.features import FeatureSet
    from mmkd_jax.data.pairs import PairsSet

    pairs = PairsSet.open(args.pairs) if args.pairs else None
    root = io.as_path(args.path)
    inside = sorted(root.glob("*/manifest.json")) if not (root / "manifest.json").exists() else []
    for path in [file.parent for file in inside] or [root]:
        features = FeatureSet.open(path, pairs)
        print(json.dumps({"show": _show, "verify": _verify, "stats": _stats}[args.action](features), indent=2))


def _show(features) -> dict[str, Any]:
    hidden = ("edges", "shards")
    return {k: v for k, v in features.manifest.items() if k not in hidden} | {
        "shards": len(features.manifest["shards"])
    }


def _verify(features) -> dict[str, Any]:
    features.verify()
    return {"teacher": features.teacher, "hash": features.hash, "present": features.manifest["present"], "whole": True}


def _stats(features) -> dict[str, Any]:
    """How the features are spread; effective rank is exp of the entropy of the covariance's normalised eigenvalues."""
    import numpy as np

    summary: dict[str, Any] = {"teacher": features.teacher, "width": features.width}
    for tower, values in features.statistics.items():
        eigenvalues = np.clip(np.linalg.eigvalsh(values["covariance"]), 0, None)
        share = eigenvalues / max(eigenvalues.sum(), 1e-300)
        entropy = -np.sum(share[share > 0] * np.log(share[share > 0]))
        summary[tower] = {
            "count": values["count"],
            "norm_of_mean": round(float(np.linalg.norm(values["mean"])), 6),
            "variance": round(float(eigenvalues.sum()), 6),
            "effective_rank": round(float(np.exp(entropy)), 2),
        }
    return summary
