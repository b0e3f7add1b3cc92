#!/usr/bin/env python3
"""Writes tests/golden/*.npz: what transformers computes for the models of tests/parity/variants.py.

    python scripts/make_golden.py [VARIANT ...]

Run it when a variant is added or changed; the files are committed, so that parity is tested without torch.  Weights are
not in them: they follow from names, shapes and a seed (tests/parity/checkpoints.py).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.parity import checkpoints, reference  # noqa: E402
from tests.parity.variants import VARIANTS, VOCAB  # noqa: E402

SHORT, LONG = 37, 300
KEPT_ROWS = (0, 1, 63, 128, 255, 256, 257, 299)  # of the long prompt: block and bfloat16 borders
MARGIN = 2e-3


def ids(length: int, seed: int) -> list[int]:
    """Token ids below the last ten rows; the tiny embedding row 7 is among them."""
    found = np.random.RandomState(seed).randint(0, VOCAB - 10, length)
    found[length // 2] = 7
    return found.tolist()


def make(name: str, config: dict) -> dict[str, np.ndarray]:
    """The golden arrays of one variant, under the first seed whose greedy tokens are decidable."""
    shapes = reference.state_shapes(config)
    for seed in range(50):
        with tempfile.TemporaryDirectory() as folder:
            model = reference.load(checkpoints.write(Path(folder), config, shapes, seed), config["model_type"])
        short, long = ids(SHORT, seed), ids(LONG, seed + 1000)
        arrays = {"short": short, "long": long, **run(model, short, long)}
        if config.get("alibi"):
            with reference.float32_alibi():
                exact = run(model, short, long)
            arrays |= {f"hf_{k}": v for k, v in arrays.items() if k not in ("short", "long")} | exact
        if min(v.min() for k, v in arrays.items() if k.endswith("margins")) > MARGIN:
            meta = {"config": config, "shapes": shapes, "seed": seed, "rows": KEPT_ROWS}
            return {k: np.asarray(v) for k, v in arrays.items()} | {"meta": np.array(json.dumps(meta))}
    raise SystemExit(f"{name}: no seed gives decidable greedy tokens; change the variant")


def run(model, short: list[int], long: list[int]) -> dict[str, np.ndarray]:
    """What is compared."""
    greedy, margins = reference.greedy(model, short[:7], 24)
    return {
        "logits_short": reference.logits(model, short),
        "logits_long": reference.logits(model, long)[list(KEPT_ROWS)],
        "hidden": np.stack(reference.hidden(model, short)),
        "greedy": np.array(greedy),
        "margins": np.array(margins),
    }


def main() -> None:
    """Makes the named variants, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="default: all, which takes a while")
    args = parser.parse_args()
    if unknown := [name for name in args.variants if name not in VARIANTS]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    for name in args.variants or VARIANTS:
        np.savez_compressed(ROOT / "tests/golden" / f"{name}.npz", **make(name, VARIANTS[name]))
        print(name)


if __name__ == "__main__":
    main()
