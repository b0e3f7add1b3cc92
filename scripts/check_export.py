#!/usr/bin/env python3
"""Writes checkpoints as LiteRT graphs and runs them in LiteRT's own interpreter and in LiteRT-LM.

    pip install 'llmjax[litert]' litert-lm-builder
    python scripts/check_export.py [--real TFLITE_DIR] [--recipes none int8 ...] [--only GLOB] [CHECKPOINT ...]

Without a CHECKPOINT, the tests' own: every architecture.  For each and each recipe a line says how far the
interpreter's logits are

- from the model's (``none``), or from llmjax's own evaluation of the same file, each step from the interpreter's own
  caches: up to 5e-5, or what the tests allow (sums in another order reach a third of it).  Where activations are
  rounded, the last bit of an operator decides now and then which way, and the logits of that token are others by as
  much as roundings are.  So of a token that is farther off each operator is computed by itself, from what the
  interpreter gave it, and has to agree to 1e-6 of its largest value;
- with ``--real``, from what ``TFLITE_DIR/NAME/RECIPE.npz`` has of the same checkpoint's official export;

and how many of LiteRT-LM's greedy ids are the interpreter's.
"""

import argparse
import json
import math
import sys
import tempfile
import warnings
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import llmjax  # noqa: E402
from converters.litert.export import export_graph  # noqa: E402
from llmjax.litert.graph import Graph  # noqa: E402
from llmjax.litert.loading import open_graph  # noqa: E402
from tests.lite import Lite  # noqa: E402
from tests.official import Operators  # noqa: E402
from tests.parity import golden  # noqa: E402
from tests.unit.test_litert_export import CASES, KINDS  # noqa: E402

RECIPES = {
    "none": (None, "dynamic-int8", "none"),
    "int8": ("int8", "dynamic-int8", "dynamic_wi8_afp32"),
    "int4": ("int4", "dynamic-int8", "dynamic_wi4_afp32"),
    "int4-g32": ("int4-g32", "dynamic-int8", "dynamic_wi4b32_afp32"),
    "int4-g64": ("int4-g64", "dynamic-int8", "dynamic_wi4b64_afp32"),
    "int8-float": ("int8", "float", "weight_only_wi8_afp32"),
    "int4-float": ("int4", "float", "weight_only_wi4_afp32"),
}
LENGTHS, STOP = (4, 16), 3
APART = 1e-6


class Official(Lite):
    """A file in LiteRT's interpreter, with its default delegate; ``ours`` are our logits for the same ``inputs``."""

    def __init__(self, path: Path, graph: Graph | None = None):
        from ai_edge_litert.interpreter import Interpreter

        super().__init__(path)
        self._interpreter = Interpreter(str(path), num_threads=1)
        self._graph = graph
        self.ours: list[np.ndarray] = []
        self.inputs: list[dict[str, np.ndarray]] = []

    def run(self, signature: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        if self._graph is not None and signature == "decode":
            self.ours.append(self._graph.run(signature, inputs)[0]["logits"].reshape(-1))
            self.inputs.append(inputs)
        return self._interpreter.get_signature_runner(signature)(**inputs)


def logits(official: Official, ids: list[int], parts: list[tuple[int, int]]) -> np.ndarray:
    """``[n, V]``: of the tokens behind those that go through prefill in ``parts``: tokens, and the signature's."""
    at = 0
    for count, length in parts:
        official.feed(ids[at : at + count], at, length)
        at += count
    return np.stack([official.feed([token], i, 1) for i, token in enumerate(ids[at:], at)])


def bundled(path: Path, folder: Path, vocabulary: int, context: int) -> Path:
    """A ``.litertlm`` whose texts are token ids: ``<5><17>``."""
    import litert_lm_builder as builder
    from litert_lm_builder.runtime.proto import llm_metadata_pb2

    split = {"type": "Split", "pattern": {"Regex": "<\\d+>"}, "behavior": "Isolated", "invert": False}
    words = {"type": "WordLevel", "vocab": {f"<{i}>": i for i in range(vocabulary)}, "unk_token": "<0>"}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "decoder": {"type": "Fuse"}}
    tokenizer |= {"model": words, "normalizer": None, "post_processor": None, "truncation": None, "padding": None}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    facts = llm_metadata_pb2.LlmMetadata(max_num_tokens=context)
    facts.stop_tokens.add().token_ids.ids.append(STOP)
    facts.llm_model_type.generic_model.SetInParent()
    (folder / "metadata.pb").write_bytes(facts.SerializeToString())
    made = builder.LitertLmFileBuilder()
    made.add_system_metadata(builder.Metadata(key="Authors", value="llmjax", dtype=builder.DType.STRING))
    made.add_llm_metadata(str(folder / "metadata.pb"))
    made.add_hf_tokenizer(str(folder / "tokenizer.json"))
    made.add_tflite_model(str(path), builder.TfLiteModelType.PREFILL_DECODE)
    with open(folder / "x.litertlm", "wb") as file:
        made.build(file)
    return folder / "x.litertlm"


def greedy(path: Path, folder: Path, prompt: list[int], vocabulary: int, context: int) -> str:
    """How many of LiteRT-LM's ids are the interpreter's."""
    import litert_lm

    bundle = bundled(path, folder, vocabulary, context)
    engine = litert_lm.Engine(
        str(bundle), backend=litert_lm.Backend.CPU(thread_count=1), max_num_tokens=context, cache_dir=str(folder)
    )
    session = engine.create_session(apply_prompt_template=False, sampler_config=litert_lm.SamplerConfig(top_k=1))
    session.run_prefill(["".join(f"<{i}>" for i in prompt)])
    theirs = [int(i) for i in session.run_decode().texts[0].replace("<", "").split(">")[:-1]]
    official = Official(path)
    official.feed(prompt[:-1], 0, len(prompt))
    ours = [int(official.feed(prompt[-1:], len(prompt) - 1, 1).argmax())]
    while len(ours) < len(theirs):
        ours.append(int(official.feed(ours[-1:], len(prompt) + len(ours) - 1, 1).argmax()))
    return f"{sum(a == b for a, b in zip(ours, theirs, strict=True))}/{len(theirs)}"


def check(name: str, path: Path, recipe: str, real: Path | None) -> bool:
    """Prints the line of one file; whether it is right."""
    quantize, activations, theirs = RECIPES[recipe]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.tflite"
        model = llmjax.load(path)
        context = int(min(64, model.context_length, model.config.renewal or math.inf))
        lengths = tuple(n for n in LENGTHS if n < context)
        export_graph(path, file, quantize=quantize, activations=activations, context=context, prefill_lengths=lengths)
        ids = np.random.default_rng(0).integers(4, min(250, model.config.vocab_size), context).tolist()
        longest = lengths[-1]
        cut = longest - 3
        graph = None if quantize is None else open_graph(file)
        official = Official(file, graph)
        found = logits(official, ids, [(cut, longest)])
        wanted = model.logits([ids])[0][cut:] if quantize is None else np.stack(official.ours)
        far = np.abs(found - wanted).max(1)
        limit = max(5e-5, golden.TOLERANCE * float(np.abs(wanted).max()))
        if (stored := CASES / name / "expected.npz").exists():  # its own sums in another order reach a third
            limit = max(limit, float(np.load(stored)["atol"]))
        beyond = np.flatnonzero(~(far <= limit))  # what is no number is, too
        right = not len(beyond)
        line = f"{name} {recipe}: {far.max():.1e} of {np.abs(wanted).max():.1f}"
        line += f" (rows beyond {limit:.0e}: {len(beyond)}/{len(far)})"
        if len(beyond) and graph is not None and activations != "float":
            operators, apart = Operators(file, graph, "decode"), dict[str, float]()
            for row in beyond:
                for operator, share in operators.distances(**official.inputs[row]).items():
                    apart[operator] = max(share, apart.get(operator, 0))
            right = all(share <= APART for share in apart.values())
            line += "; there by itself " + (", ".join(f"{o} {share:.1e}" for o, share in apart.items()) or "none")
        if real and (stored := real / name / f"{theirs}.npz").exists():
            data = np.load(stored)
            runs = {
                "s0": (data["ids/s0"][:24], [(16, 16)]),
                "s1": (data["ids/s1"][:19], [(11, 16)]),
                "s2": (data["ids/s1"][:12], [(4, 4)] * 2),
            }
            gaps = [
                float(np.abs(logits(Official(file), i.tolist(), parts) - data[f"xnn1/{run}/logits"]).max())
                for run, (i, parts) in runs.items()
            ]
            line += f"; official export {max(gaps):.1e}"
        try:
            line += f"; LiteRT-LM {greedy(file, Path(folder), ids[:longest], model.config.vocab_size, context)}"
        except ImportError:
            line += "; no LiteRT-LM here"
    print(f"{line}: {'right' if right else 'WRONG'}", flush=True)
    return right


def main() -> int:
    """Returns 1 where anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["none", "int8"])
    parser.add_argument("--only", default="*")
    args = parser.parse_args()
    for path in args.checkpoints:
        if not path.exists():
            parser.error(f"{path}: no such file or directory")
    warnings.simplefilter("ignore")
    right = True
    with tempfile.TemporaryDirectory() as folder:
        found = {path.name: path for path in args.checkpoints}
        for name in KINDS if not found else ():
            if fnmatch(name, args.only):
                found[name] = CASES / name if name not in golden.NAMES else golden.write(name, Path(folder) / name)
        if not found:
            parser.error(f"--only {args.only}: of {', '.join(KINDS)} none is called so")
        for name, path in found.items():
            for recipe in args.recipes:
                try:
                    right &= check(name, path, recipe, args.real)
                except llmjax.LlmjaxError as error:
                    print(f"{name} {recipe}: refused: {str(error).splitlines()[0]}", flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
