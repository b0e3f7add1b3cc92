"""Dumps what a Hugging Face model computes for a prompt, for `llmjax compare`.  Needs only torch and transformers.

    python transformers_dump.py MODEL OUTPUT --prompt "Once upon a time" [--dtype bfloat16]
    llmjax compare --model MODEL OUTPUT

    python transformers_dump.py MODEL theirs/ --vectors vectors/     # of each text that `llmjax vectors` wrote
    llmjax compare vectors/ theirs/

Every module's output is written under the module's own name, in its own dtype; beside them the logits and, where the
model shows them, attention weights (`NAME.attn_weights`), what goes into an attention's last projection (`NAME.input`)
and queries and keys after the rotation (`NAME.q_rot`, `NAME.k_rot`).
"""

import argparse
import json
import platform
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

_LAST = (
    "self_attn.o_proj",
    "self_attn.out_proj",
    "self_attn.dense",
    "self_attention.dense",
    "conv.out_proj",
    "linear_attn.out_proj",
)


def record(model: torch.nn.Module, ids: list[int]) -> dict[str, torch.Tensor]:
    """Runs the ids and returns the arrays by name."""
    seen: dict[str, torch.Tensor] = {}
    attention = [""]

    def keep(name: str, value: object) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            times = sum(key == name or key.startswith(f"{name}#") for key in seen)
            seen[f"{name}#{times + 1}" if times else name] = value.detach().clone().contiguous().cpu()

    def before(name: str):
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            if name.endswith(("self_attn", "self_attention")):
                attention[0] = name
            if name.endswith(_LAST):
                keep(f"{name}.input", args[0])

        return hook

    def after(name: str):
        def hook(module: torch.nn.Module, args: tuple, output: object) -> None:
            if isinstance(output, tuple):
                keep(name, output[0])
                weights = [x for x in output[1:] if isinstance(x, torch.Tensor) and x.dim() == 4]
                if weights and name == attention[0]:
                    keep(f"{name}.attn_weights", weights[0])
            else:
                keep(name, output)

        return hook

    hooks = []
    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            hooks.append(module.register_forward_hook(after(name)))
    source = sys.modules[type(model).__module__]
    rotate = getattr(source, "apply_rotary_pos_emb", None)

    def rotated(q, k, *args, **kwargs):
        result = rotate(q, k, *args, **kwargs)
        width = getattr(model.get_submodule(attention[0]), "head_dim", None)
        if isinstance(result, torch.Tensor):  # queries, then keys, by a call each
            keep(f"{attention[0]}.{'k' if f'{attention[0]}.q_rot' in seen else 'q'}_rot", result)
        elif result[0].shape[-1] == width:  # not the part of a partial rotation
            keep(f"{attention[0]}.q_rot", result[0])
            keep(f"{attention[0]}.k_rot", result[1])
        return result

    try:
        if rotate is not None:
            source.apply_rotary_pos_emb = rotated
        with torch.no_grad():
            output = model(torch.tensor([ids], device=next(model.parameters()).device), use_cache=False)
    finally:
        if rotate is not None:
            source.apply_rotary_pos_emb = rotate
        for hook in hooks:
            hook.remove()
    keep("logits", output.logits)
    return seen


def write(folder: Path, model: torch.nn.Module, ids: list[int], /, **facts: object) -> None:
    """Writes the dump."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(record(model, ids), folder / "activations.safetensors")
    manifest = {
        "token_ids": ids,
        "dtype": str(model.dtype).removeprefix("torch."),
        "runtime": "transformers",
        "runtime_version": transformers.__version__,
        "versions": {"torch": torch.__version__},
        "device": str(next(model.parameters()).device),
        "cpu": platform.processor() or platform.machine(),
        "attention": model.config._attn_implementation,
        **facts,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def vectors(folder: Path) -> dict[str, list[int]]:
    """Token ids by name, of what `llmjax vectors` wrote."""
    file, found = folder / "vectors.json", {}
    try:
        for vector in json.loads(file.read_text(encoding="utf-8"))["vectors"]:
            name = vector["name"]
            file = folder / name / "manifest.json"
            ids = json.loads(file.read_text(encoding="utf-8"))["token_ids"]
            if Path(name).name != name or not ids or not all(type(i) is int for i in ids):
                raise ValueError(f"{name!r}: expected a folder's name, and token ids in it, found {str(ids)[:40]}")
            found[name] = ids
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        sys.exit(f"{file}: expected what `llmjax vectors --output {folder}` writes: {' '.join(text.split())}")
    return found or sys.exit(f"{file}: no texts; expected what `llmjax vectors --output {folder}` writes")


def token_ids(text: str) -> list[int]:
    """Of ``--ids``."""
    return [int(i) for i in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint's directory")
    parser.add_argument("output", type=Path)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt")
    what.add_argument("--ids", type=token_ids, help="token ids: 1,2,3")
    what.add_argument("--vectors", type=Path, help="what `llmjax vectors` wrote: a folder in OUTPUT for each text")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--attention", default="eager", help="eager shows attention weights; falcon is right under sdpa"
    )
    parser.add_argument("--gguf-file", help="of the directory, to load instead")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    texts = vectors(args.vectors) if args.vectors else {}
    gguf = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    options = gguf | {"dtype": getattr(torch, args.dtype), "attn_implementation": args.attention}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, **options).to(args.device).eval()
        tokenizer = None if args.prompt is None else transformers.AutoTokenizer.from_pretrained(args.model, **gguf)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        sys.exit(f"{args.model}: transformers cannot load it: {' '.join(str(error).split())}")
    if not args.vectors:
        texts = {"": args.ids if tokenizer is None else tokenizer(args.prompt)["input_ids"]}
    rows = model.get_input_embeddings().num_embeddings
    for name, ids in texts.items():
        if not ids or not all(0 <= i < rows for i in ids):
            sys.exit(f"{name or 'prompt'}: expected token ids from 0 to {rows - 1}, found {ids[:20] or 'none'}")
        write(args.output / name, model, ids, model=str(args.model))
    print(f"{sum(map(len, texts.values()))} tokens in {args.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
