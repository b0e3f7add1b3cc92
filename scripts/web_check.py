"""Files of our converter in MediaPipe's web runtime and in llmjax: texts and ids.  See web_check.sh, which installs.

    scripts/web_check.sh [MODEL_TYPE ...] [--bits 8 4]

The checkpoints have random weights and a vocabulary in which every text has one spelling: its pieces are single
characters.  So ids follow from texts.
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

import numpy as np

import llmjax
from converters import ConversionConfig, convert_checkpoint, open_source
from llmjax.checkpoint.mediapipe_config import MODEL_TYPES
from llmjax.checkpoint.safetensors_writer import SafetensorsWriter
from llmjax.runtime.params import SamplingParams

PROMPTS = ["hello", "a box", "The quick brown fox, 12 + 3!", "o"]
MAX_TOKENS = 40
_DATA = Path(__file__).parents[1] / "tests" / "data" / "mediapipe"
_LEAST_BYTES = 1 << 20  # the runtime refuses smaller files; zeros behind the last tensor do no harm
# Two tokens whose logits are this close, as a part of the largest, may be swapped.  Only Gemma 2 needs it (7e-5 was
# found); without its attention cap the difference is 3e-2.
_TIE = 1e-4
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
        failed = [name for name, path in files.items() if not compare(name, path, answers[name])]
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


def make(folder: Path, kind: str, bits: int) -> Path:
    """A gpu file of a tiny checkpoint of a model type, by our converter."""
    source, work = _DATA / kind, folder / f"{kind}-{bits}"
    work.mkdir()
    shutil.copy(source / "config.json", work)
    random_weights(source, work / "model.safetensors")
    rows = json.loads((source / "config.json").read_text())["vocab_size"]
    (work / "spm.model").write_bytes(vocabulary(characters(rows), MODEL_TYPES[kind].bytes_to_unicode))
    path = work / "model.bin"
    options = dict.fromkeys(("attention_quant_bits", "feedforward_quant_bits", "embedding_quant_bits"), bits)
    real = MODEL_TYPES[kind]
    # The published start id may lie beyond this vocabulary.
    MODEL_TYPES[kind] = dataclasses.replace(real, start_id=_SPECIAL.index("<bos>"))
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
        MODEL_TYPES[kind] = real
    with open(path, "r+b") as file:
        file.truncate(max(_LEAST_BYTES, path.stat().st_size))
    return path


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


def characters(rows: int) -> list[str]:
    """What each id after the special ones stands for: as many as the model has rows."""
    found = [" ", "\n", *map(chr, range(0x21, 0x7F)), *map(chr, range(0xE0, 0x180))]
    return found[: rows - len(_SPECIAL)]


def vocabulary(texts: list[str], bytes_to_unicode: bool) -> bytes:
    """A SentencePiece model of single characters."""
    from sentencepiece import sentencepiece_model_pb2 as proto
    from tokenizers import normalizers

    model = proto.ModelProto()
    for piece in _SPECIAL:
        model.pieces.add(piece=piece, score=0, type=2 if piece == "<unk>" else 3)
    for index, text in enumerate(texts):
        piece = normalizers.ByteLevel().normalize_str(text) if bytes_to_unicode else text.replace(" ", "▁")
        model.pieces.add(piece=piece, score=-index, type=1)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.unk_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id = 3, 2, 1
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = not bytes_to_unicode
    return model.SerializeToString()


def run_official(files: dict[str, Path]) -> dict[str, dict]:
    """Texts and lengths of the prompts, by file and prompt, in MediaPipe's web runtime."""
    if problem := missing():
        raise SystemExit(f"web_check: {problem}")
    job = {
        "chromium": chromium(),
        "files": {name: str(path) for name, path in files.items()},
        "prompts": PROMPTS,
        "maxTokens": MAX_TOKENS,
    }
    script = Path(__file__).with_suffix(".mjs")
    done = subprocess.run(
        ["node", str(script)], input=json.dumps(job), cwd=web_folder(), capture_output=True, text=True, timeout=1200
    )
    if done.returncode:
        raise SystemExit(f"web_check: {script.name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def compare(name: str, path: Path, answers: dict) -> bool:
    """Whether our texts and ids are those of the official runtime; says what it found."""
    if "error" in answers:
        print(f"{name}: the official runtime failed: {answers['error']}")
        return False
    model = llmjax.load(path, numerics="mediapipe_gpu")
    texts = characters(model.config.vocab_size)
    ids = {text: len(_SPECIAL) + index for index, text in enumerate(texts)}
    agree = True
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
            same &= llmjax.LLM(model).generate([prompt], params)[0].outputs[0].text == official["text"]
        note = f", in a tie up to {gap:.0e} of the largest logit" if same and gap else ""
        print(f"{name}: {prompt!r}: {len(theirs)} ids {'agree' if same else 'DIFFER'}{note}: {official['text'][:30]!r}")
        if not same:
            print(f"  official: {official['tokens']} prompt tokens, {theirs} {official['text']!r}")
            print(f"  llmjax:   {len(fed) - 1} prompt tokens, {ours} after the official ones")
        agree &= same
    return agree


if __name__ == "__main__":
    sys.exit(main())
