"""Tables that tokens are only looked up in stay in their file, where they lie as JAX wants them."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import llmjax
from converters.readers.safetensors import SafetensorsFile
from llmjax.checkpoint import parameters
from llmjax.checkpoint.safetensors_writer import SafetensorsWriter
from llmjax.models.registry import read_config
from llmjax.models.tree import parameter_shapes
from llmjax.quant.qtensor import QTensor
from tests import tiny


def in_file(leaf: jax.Array, path: Path) -> bool:
    """Whether a buffer's memory is that of a file."""
    address = leaf.unsafe_buffer_pointer()
    for line in Path("/proc/self/maps").read_text().splitlines():
        if match := re.match(r"(\w+)-(\w+) .*?(/.*)", line):
            begin, end = (int(match[i], 16) for i in (1, 2))
            if begin <= address < end and match[3] == str(path.resolve()):
                return True
    return False


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps")
@pytest.mark.parametrize("scheme", [None, "int8"])
def test_a_table_stays_in_its_file(scheme, tmp_path, monkeypatch):
    """The embedding of an untied head; the head itself, which is multiplied with, does not."""
    llmjax.convert(tiny.checkpoint(tmp_path / "base"), tmp_path / "made", quantize=scheme)
    file = tmp_path / "made/model.safetensors"
    own = llmjax.load(tmp_path / "made").params
    monkeypatch.setattr(parameters, "_IN_PLACE", 1024)
    mapped = llmjax.load(tmp_path / "made").params
    table = mapped["embed"]["weight"]
    assert in_file(table.values if isinstance(table, QTensor) else table, file)
    assert not any(in_file(leaf, file) for leaf in jax.tree.leaves((own, mapped["head"], mapped["layers_0"])))
    jax.tree.map(np.testing.assert_array_equal, mapped, own)
    if scheme is None:
        changed = jax.jit(lambda x: x.at[0].set(0), donate_argnums=0)(table)  # a file is not written to
        assert not in_file(changed, file)
        np.testing.assert_array_equal(llmjax.load(tmp_path / "made").params["embed"]["weight"], own["embed"]["weight"])
        narrowed = llmjax.load(tmp_path / "made", dtype="bfloat16").params["embed"]["weight"]
        assert not in_file(narrowed, file)


def test_which_tables_are_only_looked_up():
    case = json.loads((Path(__file__).parents[1] / "data/cases/gemma4_cond/config.json").read_text())
    for facts, tables in ((case, {"per_layer.embed.weight"}), (tiny.CONFIG, {"embed.weight"})):
        _, config = read_config(facts, "test")
        assert {name for name in parameter_shapes(config) if parameters._is_table(name, config)} == tables


def test_tensors_begin_at_multiples_of_64_bytes(tmp_path):
    rng = np.random.default_rng(0)
    shapes = [(1,), (16, 4), (3, 5), (32,), (7,), (64, 64)]
    arrays = {f"t{i}": rng.normal(size=shape).astype(np.float32) for i, shape in enumerate(shapes)}
    writer = SafetensorsWriter(tmp_path / "x.safetensors", len(arrays))
    for name, array in arrays.items():
        writer.write(name, array)
    writer.close({})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file.names()) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.read(name), array)
        assert array.nbytes % 64 or file.read(name).ctypes.data % 64 == 0, name
