"""What a result came from, by name: every output says it, and a job goes on only where it is the same.

``model_facts`` and ``runtime_facts`` together are the manifest of a trace, and what batches, scores and benchmarks
record.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from converters.readers import digest
from llmjax import __version__
from llmjax.checkpoint.hashes import array_sha256
from llmjax.device import device_of, wants_kernels
from llmjax.lora.apply import Lora
from llmjax.model import Model
from llmjax.models.sharding import mesh_of
from llmjax.models.tree import canonical
from llmjax.quant.qtensor import QTensor, is_qtensor
from llmjax.quant.schemes import Recipe, role_of

# Rows and tokens: functions may do one thing to prompts, another to what is generated.
_LOOKED_AT = ((1, 1), (1, 16))


def model_facts(model: Model) -> dict[str, Any]:
    """Everything that fixes what a model computes, as JSON would hold it.

    ``model``
        its path, for people: nothing hangs on it.
    ``model_type``, ``config``, ``eos_ids``
        the configuration as it is used, whatever overrode the checkpoint's own.
    ``weights_sha256``, ``weights_from``
        over all bytes of what the weights were read from (``converters.readers.digest.sha256``), from ``files``; or of
        the arrays themselves, from ``memory``, where they were not read from files, or these have changed since.
    ``adapters``
        of each ``name``, ``sha256`` of its files, ``mode`` and what its files left open.
    ``dtype``, ``quantization``, ``stored``
        of most unquantized weights; the scheme of quantized ones, by role where there are several, or None; the number
        of weights of each kind.
    ``numerics``
        the profile.
    ``products``
        what quantized weights are multiplied in, where that is not float32: the dtype that was asked for beside them.
    ``interventions``
        where there are some, by tap a hash of what it computes (``models.functions``) of one token and of several.
    ``tokenizer_sha256``, ``chat_template_sha256``
        None where there is none.
    """
    tokenizer = model.tokenizer
    origin = model.origin if model.origin and model.origin.made(model.params) else None
    sha = digest.sha256(origin.files) if origin else None
    adapters = [
        {"name": a.name, "sha256": digest.sha256(a.files), "mode": a.mode, **a.options}
        for a in (origin.adapters if origin else ())
    ]
    in_files = sha is not None and all(a["sha256"] for a in adapters)
    kinds = model.stored()
    floats = [kind for kind in kinds if not kind.startswith("int")]
    quantization, products = _quantization(model, origin.quantize if origin else None), str(model.numerics.products)
    facts = {
        "model": str(model.path),
        "model_type": model.architecture.model_type,
        "weights_sha256": sha if in_files else _arrays_sha256(model.params),
        "weights_from": "files" if in_files else "memory",
        "adapters": adapters,
        "config": dataclasses.asdict(model.config),
        "eos_ids": model.eos_ids,
        "dtype": max(floats, key=lambda kind: kinds[kind], default="float32"),
        "quantization": quantization,
        "stored": kinds,
        "numerics": model.numerics.label,
        **({"products": products} if quantization and products != "float32" else {}),
        **({"interventions": _interventions(model)} if model.interventions else {}),
        "tokenizer_sha256": tokenizer and _sha256([tokenizer.fingerprint(), tokenizer.stop]),
        "chat_template_sha256": tokenizer
        and tokenizer.chat_template
        and _sha256([tokenizer.chat_template, tokenizer.special, *filter(None, [tokenizer.tools_template])]),
    }
    return json.loads(json.dumps(facts, default=str))


def _interventions(model: Model) -> dict[str, str]:
    found = model.module.computed(*_LOOKED_AT)
    return {name: _sha256([found[name, *shape] for shape in _LOOKED_AT]) for name in sorted(model.interventions)}


def runtime_facts(params: Any = None) -> dict[str, Any]:
    """What computes with these parameters: llmjax under what, and on which machine; compiled programs differ with the
    processor, with ``xla_flags``, where the environment has any, and on a card without ``kernels``."""
    device = device_of(params)
    versions = {"llmjax": __version__} | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return {
        "runtime": "llmjax",
        "runtime_version": versions["llmjax"],
        "versions": versions,
        "platform": device.platform,
        "device": device.device_kind,
        **({"mesh": dict(mesh.shape)} if (mesh := mesh_of(params)) else {}),
        "cpu": _processor(),
        **({"xla_flags": flags} if (flags := _compiler_flags()) else {}),
        **({"kernels": "off"} if device.platform == "gpu" and not wants_kernels() else {}),
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Where two identities differ, a line a field."""
    for name in sorted({*old, *new}):
        before, now = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            yield from differences(before, now, f"{prefix}{name}.")
        elif before != now:
            yield f"{prefix}{name}: was {_abridged(before)}, now {_abridged(now)}"


# What leaves programs as they are: what is dumped, how many devices there are.
_OTHER_FLAGS = "--xla_dump", "--xla_force_host_platform_device_count"
# JAX's own settings that change what XLA makes of a program, as they are where nobody sets them.
_OF_JAX = {
    "jax_disable_most_optimizations": False,
    "jax_exec_time_optimization_effort": 0.0,
    "jax_memory_fitting_effort": 0.0,
    "jax_optimization_level": "UNKNOWN",
}


def _compiler_flags() -> list[str]:
    """What the compiler is told by ``XLA_FLAGS``, or by the file that it names, and by JAX."""
    text = os.environ.get("XLA_FLAGS", "").strip()
    if text and not text.startswith("--"):
        try:
            text = Path(text).read_text(errors="replace")
        except OSError:
            text = ""
    flags = [_without_path(flag) for flag in text.split() if not flag.startswith(_OTHER_FLAGS)]
    values = jax.config.values
    return sorted(flags + [f"{n}={values[n]}" for n, usual in _OF_JAX.items() if values.get(n, usual) != usual])


def _without_path(flag: str) -> str:
    """A flag that names a file with a hash of what that holds: where it lies is nobody's business."""
    name, _, value = flag.partition("=")
    if os.sep not in value:
        return flag
    try:
        return f"{name}=sha256:{hashlib.sha256(Path(value).read_bytes()).hexdigest()}"
    except OSError:  # a folder, of caches and the like
        return f"{name}=..."


def _quantization(model: Model, recipe: Recipe | None) -> Any:
    roles: dict[str, set[str]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        model.params, is_leaf=lambda x: isinstance(x, QTensor | Lora)
    ):
        name = canonical(path)
        if role := role_of(name):
            # A recipe also says how scales were found, which a weight does not.
            scheme = (str(recipe.scheme(name)) if recipe else leaf.scheme) if isinstance(leaf, QTensor) else "float"
            roles.setdefault(role, set()).add(scheme)
    found = {role: ", ".join(sorted(schemes)) for role, schemes in sorted(roles.items())}
    if not found:  # a graph's weights have names of its own
        return ", ".join(k for k in model.stored() if k.startswith("int")) or None
    same = set(found.values())
    return found if len(same) > 1 else None if same == {"float"} else same.pop()


def _abridged(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:24]}..."


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _arrays_sha256(params: Any) -> str:
    """Over the name, shape, dtype and SHA-256 of every array, and how quantized ones are to be read."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    with ThreadPoolExecutor(4) as pool:
        hashes = pool.map(lambda item: array_sha256(item[1]), leaves)
    lines = [
        f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {sha}"
        for (path, leaf), sha in zip(leaves, hashes, strict=True)
    ]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_qtensor):
        if isinstance(leaf, QTensor):
            lines.append(f"{jax.tree_util.keystr(path)} {leaf.bits} {leaf.zero}")
    return _sha256(lines)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
