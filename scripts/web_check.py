"""Files of our converter in MediaPipe's web runtime and in llmjax: texts and ids.  See web_check.sh, which installs.

    scripts/web_check.sh [MODEL_TYPE ...] [--bits 8 4]

The checkpoints have random weights and a vocabulary in which every text has one spelling: its pieces are single
characters.  So ids follow from texts.  Model types that MediaPipe makes adapters for run without one and with one.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import llmjax
from converters import ConversionConfig, convert_checkpoint, open_source
from converters.mediapipe import lora
from llmjax.checkpoint.mediapipe_config import MODEL_TYPES, ModelType
from llmjax.checkpoint.safetensors_writer import SafetensorsWriter
from llmjax.model import Model
from llmjax.runtime.params import SamplingParams

PROMPTS = ["hello", "a box", "The quick brown fox, 12 + 3!", "o"]
MAX_TOKENS = 40
_DATA = Path(__file__).parents[1] / "tests" / "data" / "mediapipe"
# What a step may take, in seconds, on a machine that is busy with other things; it takes a few.
LIMITS = {"browser": 60, "page": 30, "adapter": 60, "model": 180, "lora": 60, "prompt": 180, "close": 20}
_RANK = 4
_LEAST_BYTES = 1 << 20  # the runtime refuses smaller files; zeros behind the last tensor do no harm
# Two tokens whose logits are this close, as a part of the largest, may be swapped.  Only Gemma 2 needs it (7e-5 was
# found); without its attention cap the difference is 3e-2.
_TIE = 1e-4
# MediaPipe's own converter crashes on an adapter for Phi-2, and what the runtime computes with ours is neither the
# adapter with o as stored (3 % off) nor without o (2 % off): nothing says what would be right.
_WITH_LORA = ("GEMMA_2B", "GEMMA2_2B")
_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="default: one of each architecture")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4], choices=(4, 8))
    args = parser.parse_args()
    kinds = args.model_types or sorted(path.name for path in _DATA.iterdir() if (path / "config.json").exists())
    with tempfile.TemporaryDirectory() as folder:
        files = {f"{kind}-int{bits}": make(Path(folder), kind, bits) for kind in kinds for bits in args.bits}
        answers = run_official(files)
        failed = [name for name, made in files.items() if not compare(name, made, answers[name])]
    print(f"{len(files) - len(failed)} of {len(files)} files agree" + (f"; not {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


def missing() -> str | None:
    """What the check lacks; None if it can run."""
    if chromium() is None:
        return "no Chromium: apt-get install chromium, or name one in LLMJAX_CHROMIUM"
    if shutil.which("node") is None:
        return "no node: install Node.js 18 or newer"
    packages = ("@mediapipe/tasks-genai", "playwright-core")
    lacking = [name for name in packages if not (web_folder() / "node_modules" / name).is_dir()]
    return f"no {', '.join(lacking)} in {web_folder()}: run scripts/web_check.sh" if lacking else None


def chromium() -> str | None:
    """The browser's path."""
    return shutil.which(os.environ.get("LLMJAX_CHROMIUM", "chromium"))


def web_folder() -> Path:
    """Where npm put the packages."""
    return Path(os.environ.get("LLMJAX_WEB") or Path(__file__).parents[1] / "out" / "web")


@dataclasses.dataclass(frozen=True)
class Made:
    """A model's file, and those of adapters that go with it, by name."""

    model: Path
    loras: dict[str, Path]


def make(folder: Path, kind: str, bits: int) -> Made:
    """A gpu file of a tiny checkpoint of a model type, by our converter."""
    source, work = _DATA / kind, folder / f"{kind}-{bits}"
    work.mkdir()
    shutil.copy(source / "config.json", work)
    random_weights(source, work / "model.safetensors")
    rows = json.loads((source / "config.json").read_text())["vocab_size"]
    real = MODEL_TYPES[kind]
    (work / "spm.model").write_bytes(vocabulary(characters(rows), real))
    path = work / "model.bin"
    options: dict[str, Any] = dict.fromkeys(
        ("attention_quant_bits", "feedforward_quant_bits", "embedding_quant_bits"), bits
    )
    loras = {}
    if kind in _WITH_LORA:
        loras["lora"] = work / "lora.bin"
        random_adapter(source, work / "adapter.safetensors")
        options |= {"lora_ckpt": str(work / "adapter.safetensors"), "lora_rank": _RANK}
        options["lora_output_tflite_file"] = str(loras["lora"])
    # The published start id may lie beyond this vocabulary; and under forceF32 the runtime refuses the float16 in which
    # Gemma's adapters are.
    MODEL_TYPES[kind] = dataclasses.replace(real, start_id=_SPECIAL.index("<bos>"))
    stored, lora.dtype_of = lora.dtype_of, lambda model_type: np.dtype(np.float32)
    try:
        convert_checkpoint(
            ConversionConfig(
                input_ckpt=str(work),
                ckpt_format="safetensors",
                model_type=kind,
                backend="gpu",
                output_dir=str(work / "out"),
                output_tflite_file=str(path),
                vocab_model_file=str(work / "spm.model"),
                **options,
            )
        )
    finally:
        MODEL_TYPES[kind], lora.dtype_of = real, stored
    for written in (path, *loras.values()):
        with open(written, "r+b") as file:
            file.truncate(max(_LEAST_BYTES, written.stat().st_size))
    return Made(path, loras)


def random_weights(source: Path, path: Path) -> None:
    """A checkpoint of a source's tensors with other values: they make the model say more than one word, and never a
    special token (whose text the web runtime shows)."""
    opened, random = open_source(source), np.random.default_rng(0)
    from_one = not str(opened.config["model_type"]).startswith("gemma")  # Gemma adds 1 to a norm's weight
    writer = SafetensorsWriter(path, len(opened.names()))
    for name in opened.names():
        shape = opened.spec(name).shape
        scale = 0.1 if "norm" in name or len(shape) == 1 else 0.05 if "embed" in name else 0.5
        is_norm = len(shape) == 1 and name.endswith(".weight")
        values = (is_norm and from_one) + scale * random.standard_normal(shape)
        if shape[0] == opened.config["vocab_size"]:
            values[: len(_SPECIAL)] = 0 if len(shape) == 2 else -100
        writer.write(name, values.astype(np.float32))
    writer.close({})
    opened.close()


def random_adapter(source: Path, path: Path) -> None:
    """An adapter of q, k, v and o in every layer that makes the model say something else."""
    opened, random = open_source(source), np.random.default_rng(1)
    found = {name: opened.spec(name).shape for name in opened.names()}
    opened.close()
    shapes = {name: shape for name, shape in found.items() if len(shape) == 2 and "self_attn" in name}
    writer = SafetensorsWriter(path, 2 * len(shapes))
    for name, (out, width) in shapes.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        for side, shape in (("A", (_RANK, width)), ("B", (out, _RANK))):
            writer.write(f"{module}.lora_{side}.weight", (0.3 * random.standard_normal(shape)).astype(np.float32))
    writer.close({})


def characters(rows: int) -> list[str]:
    """What each id after the special ones stands for: as many as the model has rows."""
    found = [" ", "\n", *map(chr, range(0x21, 0x7F)), *map(chr, range(0xE0, 0x180))]
    return found[: rows - len(_SPECIAL)]


def vocabulary(texts: list[str], kind: ModelType) -> bytes:
    """A SentencePiece model of single characters, and of the token that ends a text."""
    from sentencepiece import sentencepiece_model_pb2 as proto
    from tokenizers import normalizers

    model = proto.ModelProto()
    for piece in _SPECIAL:
        name = kind.stop if piece == "<eos>" else piece
        model.pieces.add(piece=name, score=0, type=2 if piece == "<unk>" else 3)
    for index, text in enumerate(texts):
        piece = normalizers.ByteLevel().normalize_str(text) if kind.bytes_to_unicode else text.replace(" ", "▁")
        model.pieces.add(piece=piece, score=-index, type=1)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 3, 2, 1
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = not kind.bytes_to_unicode
    return model.SerializeToString()


def run_official(files: dict[str, Made], limits: dict[str, float] | None = None) -> dict[str, dict[str, Any]]:
    """What MediaPipe's web runtime says, by file.

    Args:
      files: by name.
      limits: seconds a step may take, instead of ``LIMITS``.

    Returns:
      by file and adapter (``""`` for none) texts and lengths of the prompts; ``error`` where one failed.
    """
    if problem := missing():
        raise SystemExit(f"web_check: {problem}")
    job = {
        "chromium": chromium(),
        "files": {
            name: {
                "model": str(made.model),
                "loras": {adapter: str(path) for adapter, path in made.loras.items()},
                "rank": _RANK if made.loras else 0,
            }
            for name, made in files.items()
        },
        "prompts": PROMPTS,
        "maxTokens": MAX_TOKENS,
        "limits": LIMITS | (limits or {}),
    }
    script = Path(__file__).with_suffix(".mjs")
    done = subprocess.run(
        ["node", str(script)], input=json.dumps(job), cwd=web_folder(), stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"web_check: {script.name} failed with exit code {done.returncode}; see above")
    return json.loads(done.stdout)


def compare(name: str, made: Made, answers: dict[str, Any]) -> bool:
    """Whether our texts and ids are those of the official runtime; says what it found."""
    if "error" in answers:
        print(f"{name}: the official runtime failed: {answers['error']}")
        return False
    agree, without = True, answers[""]
    for adapter, texts in answers.items():
        model = llmjax.load(made.model, numerics="mediapipe_gpu", lora=made.loras.get(adapter))
        agree &= compare_texts(f"{name} with {adapter}" if adapter else name, model, texts)
        if adapter and any(texts[prompt] == without[prompt] for prompt in PROMPTS):
            print(f"{name}: the adapter changes nothing in the official runtime")
            agree = False
    return agree


def compare_texts(name: str, model: Model, answers: dict[str, Any]) -> bool:
    """The same for one model, with its adapter or without one."""
    texts = characters(model.config.vocab_size)
    ids = {text: len(_SPECIAL) + index for index, text in enumerate(texts)}
    agree, llm = True, llmjax.LLM(model, max_batch=4)
    for prompt, official in answers.items():
        fed = model.tokenizer.encode(prompt)
        theirs = [ids.get(char, -1) for char in official["text"]]
        logits = model.logits([fed + theirs[:-1]])[0][len(fed) - 1 :]
        ours = logits.argmax(-1).tolist()
        gaps = logits.max(-1) - np.take_along_axis(logits, np.array(theirs)[:, None], -1)[:, 0]
        gap = float(gaps.max() / np.abs(logits).max())
        same = official["tokens"] == len(fed) - 1 and len(theirs) == MAX_TOKENS - len(fed) and min(theirs) >= 0
        same &= gap <= _TIE and model.tokenizer.decode(theirs) == official["text"]
        if gap == 0:  # and so on our own way there
            params = SamplingParams(temperature=0, max_tokens=len(theirs))
            same &= llm.generate([prompt], params)[0].outputs[0].text == official["text"]
        note = f", in a tie up to {gap:.0e} of the largest logit" if same and gap else ""
        print(f"{name}: {prompt!r}: {len(theirs)} ids {'agree' if same else 'DIFFER'}{note}: {official['text'][:30]!r}")
        if not same:
            print(f"  official: {official['tokens']} prompt tokens, {theirs} {official['text']!r}")
            print(f"  llmjax:   {len(fed) - 1} prompt tokens, {ours} after the official ones")
        agree &= same
    return agree


if __name__ == "__main__":
    sys.exit(main())
