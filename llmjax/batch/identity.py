"""What a job's answers depend on beside its rows: compared before a job goes on."""

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmjax.batch.rows import WHOLE, Shard
from llmjax.llm import LLM
from llmjax.model import Model
from llmjax.quant.qtensor import QTensor
from llmjax.runtime.params import SamplingParams

# Of each tensor this much goes into the hash, in pieces spread over it; smaller ones as a whole.
SAMPLED_BYTES = 1 << 20
_PIECES = 256


def identity(llm: LLM, params: SamplingParams, shard: Shard = WHOLE) -> dict[str, Any]:
    """Everything that fixes a job's answers, by name, as JSON would hold it.

    ``model.weights_sha256`` is over the weights as they are computed with: the name, shape and dtype of every tensor,
    all bytes of those up to 1 MiB, and 256 pieces of 4 KiB spread evenly over larger ones.
    """
    model = llm.model
    tokenizer = model.tokenizer
    return {
        "model": {
            "weights_sha256": _weights_hash(model),
            "config_sha256": _hash(dataclasses.asdict(model.config) | {"eos_ids": model.eos_ids}),
            "tokenizer_sha256": tokenizer and tokenizer.fingerprint(),
            "chat_template_sha256": tokenizer and tokenizer.chat_template and _hash(tokenizer.chat_template),
        },
        "loras": list(llm.loras),
        "numerics": model.numerics.label,
        "weights": stored(model),
        "slots": llm.engine.slots,
        "chunk": llm.engine.chunk,
        "block": llm.engine.block,
        "seed": llm.seed,
        "params": json.loads(json.dumps(params.to_dict())),
        "shard": str(shard),
        "versions": {name: importlib.metadata.version(name) for name in ("llmjax", "jax", "jaxlib")},
        "device": describe_device(),
    }


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Where two identities differ, a line a field."""
    for name in sorted({*old, *new}):
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from differences(before, now, f"{prefix}{name}.")
        elif before != now:
            yield f"{prefix}{name}: was {_shown(before)}, now {_shown(now)}"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:24]}..."


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _weights_hash(model: Model) -> str:
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        sha.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}\n".encode())
        for piece in _pieces(leaf):
            sha.update(piece)
    return sha.hexdigest()


def _pieces(leaf: jax.Array) -> Iterator[bytes]:
    """A tensor's bytes, or some of them; on the CPU nothing is copied but those."""
    if jax.default_backend() != "cpu":
        leaf = jnp.copy(leaf)  # an array of another device keeps what NumPy was given of it
    flat = np.asarray(leaf).reshape(-1).view(np.uint8)
    if flat.size <= SAMPLED_BYTES:
        yield flat.tobytes()
        return
    size = SAMPLED_BYTES // _PIECES
    for start in np.linspace(0, flat.size - size, _PIECES).astype(np.int64):
        yield flat[start : start + size].tobytes()


def stored(model: Model) -> list[str]:
    """The kinds of weights there are: dtypes, and schemes of quantized ones."""
    leaves = jax.tree.leaves(model.params, is_leaf=lambda x: isinstance(x, QTensor))
    return sorted({x.scheme if isinstance(x, QTensor) else str(x.dtype) for x in leaves})


def describe_device() -> dict[str, str]:
    """Platform, kind and, of a CPU, the processor's name."""
    device = jax.devices()[0]
    found = {"platform": device.platform, "kind": device.device_kind}
    return found | ({"processor": _processor()} if device.platform == "cpu" else {})


def _processor() -> str:
    """The name of the processor: compiled programs differ with what it can do."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
