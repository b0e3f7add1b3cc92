"""Weights and cache spread over several devices, by role: tensor parallelism (Shoeybi et al. 2019, arXiv:1909.08053).

Heads, the inner width of an MLP, experts and the vocabulary are split, so that a layer sums over the devices twice,
behind ``o`` and behind ``down``; everything else lies on each device whole.  Where arrays lie is all there is to it:
XLA splits the programs accordingly, and a sum over devices is the one thing that is rounded otherwise.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmjax.device import knows_cuda
from llmjax.errors import ConfigError, shown
from llmjax.models.config import DecoderConfig
from llmjax.models.tree import parameter_shapes
from llmjax.outside.values import POSITIVE, plain

# The mesh's axis that weights are split over; along others each device has the same.
AXIS = "model"
_HEADS = re.compile(r"layers\.(\d+)\.attn\.([qkvo])\.(weight|bias)")
_FIRST = re.compile(r"(layers\.\d+\.(mlp\.(gate|up)|experts\.\w+)|(per_layer\.)?embed|head)\.(weight|bias)")
_LAST = re.compile(r"layers\.\d+\.mlp\.down\.weight")


def as_mesh(mesh: Any) -> Mesh | None:
    """A mesh from what a user says: a number of devices, the first that JAX has, or a mesh with an axis ``model``; None
    for none.

    Raises:
      ConfigError: it is neither, there are fewer devices, or they would run kernels of llmjax's own, which compute on
        one.
    """
    if mesh is None:
        return None
    if isinstance(mesh, Mesh):
        if AXIS not in mesh.axis_names:
            raise ConfigError(f"mesh: expected an axis {AXIS!r} to split weights over, found {shown(mesh.axis_names)}")
        _check_kernels(mesh.devices.flat[0], mesh.size)
        return mesh
    count, devices = plain(mesh), jax.devices()
    if not POSITIVE.holds(count):
        raise ConfigError(f"mesh: expected a number of devices, or a jax.sharding.Mesh, found {shown(mesh)}")
    if count > len(devices):
        raise ConfigError(
            f"mesh: {count} devices are asked for, and JAX has {len(devices)} ({devices[0].platform}) here"
        )
    _check_kernels(devices[0], count)
    return Mesh(np.array(devices[:count]), (AXIS,))


def _check_kernels(device: jax.Device, count: int) -> None:
    if count > 1 and device.platform == "gpu" and knows_cuda():
        raise ConfigError(
            "mesh: llmjax's own kernels compute on one card; set LLMJAX_KERNELS=0 in the environment to go without them"
        )


def check_splits(mesh: Mesh | None, config: DecoderConfig, where: str) -> None:
    """Refuses a mesh that would hold a whole model on each device, since its size divides nothing.

    Raises:
      ConfigError: so it is.
    """
    count = 1 if mesh is None else mesh.shape[AXIS]
    axes = ((shape, _axis(name, config, count)) for name, shape in parameter_shapes(config).items())
    if count > 1 and all(axis is None or shape[axis] % count for shape, axis in axes):
        raise ConfigError(
            f"{where}: mesh: {count} divides neither its heads ({config.num_attention_heads}) nor the width of an MLP, "
            "experts or the vocabulary, so nothing would be split"
        )


def mesh_of(params: Any) -> Mesh | None:
    """The mesh that parameters are spread over by role; None where they lie on one device, or otherwise."""
    for leaf in jax.tree.leaves(params):
        where = leaf.sharding if isinstance(leaf, jax.Array) else None
        if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh) and AXIS in where.mesh.axis_names:
            return where.mesh
    return None


def of_parameter(mesh: Mesh, parameter: str, leaf: Any, config: DecoderConfig) -> Any:
    """Where a parameter lies: a sharding for each of its arrays.

    Args:
      mesh: of devices.
      parameter: canonical name.
      leaf: of the parameter; an array ``[out, in]``, ``[E, out, in]``, ``[out]``, or a ``QTensor`` of such.
      config: the model's.
    """
    axis = _axis(parameter, config, mesh.shape[AXIS])
    return jax.tree.map(lambda x: _split(mesh, x.shape, axis), leaf)


def of_cache(mesh: Mesh, cache: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """Where a cache's buffers ``[P, K, ...]`` lie: by key heads where the layer's keys do; what layers carry, on each
    device."""
    found = {}
    for layer, modules in cache.items():
        heads = _axis(f"{layer.replace('_', '.')}.attn.k.weight", config, mesh.shape[AXIS])
        axes = {"attn": None if heads is None else 1}
        found[layer] = {
            module: {name: _split(mesh, x.shape, axes.get(module)) for name, x in buffers.items()}
            for module, buffers in modules.items()
        }
    return found


def everywhere(mesh: Mesh) -> NamedSharding:
    """On each device whole."""
    return NamedSharding(mesh, PartitionSpec())


def _axis(parameter: str, config: DecoderConfig, count: int) -> int | None:
    """Of a parameter's dimensions the one that is split; None for none."""
    if found := _HEADS.fullmatch(parameter):
        layer, role, leaf = int(found[1]), found[2], found[3]
        keys = config.cache(layer).get("attn", {}).get("k", (1,))[0]
        heads = keys if role in "kv" else config.num_attention_heads
        if heads % count:
            return None
        return 0 if role != "o" else (1 if leaf == "weight" else None)
    if _FIRST.fullmatch(parameter):
        return 0
    return 1 if _LAST.fullmatch(parameter) else None


def _split(mesh: Mesh, shape: tuple[int, ...], axis: int | None) -> NamedSharding:
    if axis is None or shape[axis] % mesh.shape[AXIS]:  # one scale of a channel, say
        return everywhere(mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, AXIS))
