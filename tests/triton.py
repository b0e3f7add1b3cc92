"""Runs a Pallas kernel as Triton is given it, in NumPy, one program of its grid after the other.

Pallas's own interpreter runs what was written: it clamps an index that is out of bounds, and never sees what Pallas
makes of it.  Here pointers are offsets into an array: what is read must lie in it, be it masked or not only where the
mask allows it, what is written is written once, by one program, and nothing of a result is left as it was but by what
writes a row's places in use, of which there is room for more (``PARTIAL``): whoever reads those sees it.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import ml_dtypes
import numpy as np
from jax._src.pallas.triton import lowering
from jax.experimental.pallas import pallas_call
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from tests import ptx

DTYPES = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16, "i1": np.bool_, "i8": np.int8}
DTYPES |= {"i16": np.int16, "i32": np.int32, "i64": np.int64}
PARTIAL = ("attention_parts", "attention_parts_in_halves", "attention_halves")
UNSIGNED = {np.dtype(f"i{n}"): np.dtype(f"u{n}") for n in (1, 2, 4, 8)} | {np.dtype(bool): np.dtype(bool)}
INTEGERS = ["__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"]  # predicates, signed, then unsigned
FLOATS = {1: "__eq__", 2: "__gt__", 3: "__ge__", 4: "__lt__", 5: "__le__", 13: "__ne__"}
FUNCTIONS = {"exp": np.exp, "tanh": np.tanh, "fabs": np.abs, "log": np.log, "exp2": np.exp2}


class Pointers:
    """Into an array: offsets, of elements."""

    def __init__(self, array: "Memory", offsets: np.ndarray):
        self.array, self.offsets = array, offsets


class Memory:
    """Of an argument or a result: its values, flat, and by whom each was written."""

    def __init__(self, name: str, values: np.ndarray):
        values = values.reshape(-1)
        self.name, self.values = name, values.view(f"i{values.dtype.itemsize}") if values.dtype.kind == "u" else values
        self.writer = np.full(self.values.shape, -1, np.int64)

    def check(self, offsets: np.ndarray, mask: np.ndarray) -> None:
        outside = mask & ((offsets < 0) | (offsets >= len(self.values)))
        assert not outside.any(), f"{self.name}: offset {offsets[outside][0]} of {len(self.values)}"

    def load(self, offsets: np.ndarray, mask: np.ndarray, other: Any) -> np.ndarray:
        self.check(offsets, mask)
        # What nobody asked for is whatever there is: here what would be seen.
        missing = other if other is not None else poison(self.values.dtype)
        return np.where(mask, self.values[np.where(mask, offsets, 0)], missing)

    def store(self, offsets: np.ndarray, values: np.ndarray, mask: np.ndarray, program: int) -> None:
        self.check(offsets, mask)
        where, new = offsets[mask], values[mask]
        assert len(np.unique(where)) == len(where), f"{self.name}: written twice at once"
        again = self.writer[where] >= 0
        old = self.values[where][again].view(f"u{new.dtype.itemsize}")
        assert (old == new[again].view(old.dtype)).all(), f"{self.name}: other values from programs that race"
        self.values[where], self.writer[where] = new, program


def poison(dtype: np.dtype) -> Any:
    return np.asarray(np.nan, dtype) if dtype.kind in "fV" else np.asarray(np.iinfo(dtype).max // 3, dtype)


def kernel(
    function: Callable[..., Any], *, grid: tuple[int, ...], out_shape: Any, **options: Any
) -> Callable[..., Any]:
    """In the place of ``pallas_call``, of what Triton serves."""
    options.pop("interpret", None)

    def run(*args: Any) -> Any:
        module, its_grid = as_triton(pallas_call(function, grid=grid, out_shape=out_shape, **options), args)
        args = tuple(jax.tree.leaves(args))
        shapes, structure = jax.tree.flatten(out_shape)
        memory = [Memory(f"argument {i}", np.array(x)) for i, x in enumerate(args)]
        memory += [Memory(f"result {i}", np.full(s.shape, poison(np.dtype(s.dtype)), s.dtype))
                   for i, s in enumerate(shapes)]  # fmt: skip
        (body,) = (op for op in module.body.operations if op.operation.name == "tt.func")
        with np.errstate(over="ignore"):  # of what a mask leaves out
            for number, program in enumerate(np.ndindex(*reversed(its_grid))):
                Program(program[::-1], number, memory).block(
                    body.regions[0].blocks[0], [Pointers(m, np.int64(0)) for m in memory]
                )
        for result in memory[len(args) :] if options.get("name") not in PARTIAL else []:
            assert (result.writer >= 0).all(), f"{result.name}: {np.argmin(result.writer)} is not written"
        results = [m.values.reshape(s.shape) for m, s in zip(memory[len(args) :], shapes, strict=True)]
        return jax.tree.unflatten(structure, map(jax.numpy.asarray, results))

    return run


def as_triton(call: Callable[..., Any], args: Any) -> tuple[Any, tuple[int, ...]]:
    """What Pallas hands on, and the grid of programs."""
    found: list[Any] = []
    lower = lowering.lower_jaxpr_to_triton_module

    def kept(*args: Any, **kwargs: Any) -> Any:
        found.append(lower(*args, **kwargs))
        return found[-1]

    facts = {
        "device_kind": "NVIDIA H100 80GB HBM3",
        "num_cores": 132,
        "platform": "gpu",
    }  # JAX 0.11 asks for no platform
    known = inspect.signature(AbstractDevice).parameters
    card = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(**{k: v for k, v in facts.items() if k in known}))
    with mock.patch.object(lowering, "lower_jaxpr_to_triton_module", kept), use_abstract_mesh(card):
        jax.jit(call).trace(*args).lower(lowering_platforms=("cuda",))
    return found[0].module, tuple(found[0].grid)


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``a @ b`` in float32, each element of it summed in one order: a library's own hangs on where in a tile it is."""
    found = np.zeros((a.shape[0], b.shape[1]), np.float32)
    for column, row in zip(a.T.astype(np.float32), b.astype(np.float32), strict=True):
        found += column[:, None] * row
    return found


class Program:
    """One program: ``values`` by the names that they have."""

    def __init__(self, place: tuple[int, ...], number: int, memory: list[Memory]):
        self.place, self.number, self.memory, self.values = place, number, memory, {}

    def block(self, block: Any, args: list[Any]) -> list[Any]:
        """Runs a block, and gives what it ends with."""
        for name, value in zip(block.arguments, args, strict=True):
            self.values[name] = value
        for op in block.operations:
            op = op.operation
            given = [self.values[v] for v in op.operands]
            if op.name in ("tt.return", "scf.yield", "tt.reduce.return", "scf.condition"):
                return given
            found = self.run(op, given)
            for name, value in zip(op.results, found, strict=True):
                self.values[name] = value
        return []

    def run(self, op: Any, x: list[Any]) -> list[Any]:
        name = op.name
        if name == "scf.for":
            low, high, step, *carry = x
            for i in range(int(low), int(high), int(step)):
                carry = self.block(op.regions[0].blocks[0], [np.int32(i), *carry])
            return carry
        if name == "scf.while":
            while True:
                go, *x = self.block(op.regions[0].blocks[0], x)
                if not go:
                    return x
                x = self.block(op.regions[1].blocks[0], x)
        if name == "scf.if":
            region = op.regions[0 if x[0] else 1]
            return self.block(region.blocks[0], []) if len(region.blocks) else []
        if name == "tt.store":
            pointers, value, mask = (*x, np.bool_(True))[:3]
            shape = np.shape(pointers.offsets)
            pointers.array.store(
                *(np.broadcast_to(a, shape).reshape(-1) for a in (pointers.offsets, value, mask)), self.number
            )
            return []
        if name == "tt.reduce":
            axis = number(op.attributes["axis"])
            block = op.regions[0].blocks[0]
            parts = [np.moveaxis(v, axis, 0) for v in x]
            while len(parts[0]) > 1:  # as a tree, like threads
                half = len(parts[0]) // 2
                parts = self.block(block, [p[:half] for p in parts] + [p[half:] for p in parts])
            return [p[0] for p in parts]
        shape, dtype = kind(op.results[0].type)
        return [self.value(op, name, x, shape, dtype)]

    def value(self, op: Any, name: str, x: list[Any], shape: tuple[int, ...], dtype: Any) -> Any:
        attribute = op.attributes
        dialect, _, what = name.partition(".")
        if name == "arith.constant":
            given = attribute["value"]
            assert shape == (), given
            text = str(given).split(" :")[0]
            if dtype.kind in "ib":
                return np.asarray({"true": 1, "false": 0}.get(text) if text in ("true", "false") else int(text)).astype(
                    dtype
                )[()]
            if text.startswith("0x"):
                return np.asarray(int(text, 16), f"u{dtype.itemsize}").view(dtype)[()]
            return np.asarray(float(text), dtype)[()]
        if name == "tt.get_program_id":
            return np.int32(self.place[int(number(attribute["axis"]))])
        if name == "tt.make_range":
            return np.arange(number(attribute["start"]), number(attribute["end"]), dtype=np.int32)
        if name == "tt.load":
            mask = np.broadcast_to(x[1] if len(x) > 1 else np.bool_(True), np.shape(x[0].offsets))
            return x[0].array.load(x[0].offsets, mask, x[2] if len(x) > 2 else None)
        if isinstance(x[0], Pointers):
            if name == "tt.addptr":
                return Pointers(x[0].array, x[0].offsets + x[1].astype(np.int64))
            moved = {"tt.splat": np.broadcast_to, "tt.broadcast": np.broadcast_to, "tt.reshape": np.reshape}.get(name)
            if moved:
                return Pointers(x[0].array, moved(x[0].offsets, shape))
            if name == "tt.expand_dims":
                return Pointers(x[0].array, np.reshape(x[0].offsets, shape))
            raise NotImplementedError(name)
        if name in ("tt.splat", "tt.broadcast"):
            return np.broadcast_to(x[0], shape)
        if name in ("tt.expand_dims", "tt.reshape"):
            return np.reshape(x[0], shape)
        if name == "tt.trans":
            return np.transpose(x[0], [int(n) for n in re.findall(r"\d+", str(attribute["order"]).split(":")[1])])
        if name in ("tt.bitcast", "arith.bitcast"):
            return np.ascontiguousarray(x[0]).view(dtype).reshape(shape)[()]
        if name == "tt.join":
            return np.stack(x, -1)
        if name == "tt.dot":
            precision = number(attribute["inputPrecision"])
            assert x[0].dtype.itemsize == 2 or precision == 2, "TF32"  # 2: IEEE
            return product(x[0], x[1]).astype(dtype) + x[2]
        if name == "tt.extern_elementwise":
            symbol = str(attribute["symbol"]).strip('"').removeprefix("__nv_")
            return FUNCTIONS[symbol[:-1] if symbol.endswith("f") and symbol != "fabs" else symbol](x[0]).astype(dtype)
        if name == "tt.elementwise_inline_asm":
            asm, constraints = (str(attribute[key]).strip('"') for key in ("asm_string", "constraints"))
            return ptx.elementwise(asm, number(attribute["packed_element"]), constraints.count("="), x[0], dtype)
        if dialect == "math":
            return FUNCTIONS[{"absf": "fabs"}.get(what, what)](x[0]).astype(dtype)
        return self.arithmetic(what, x, dtype, attribute)

    def arithmetic(self, what: str, x: list[Any], dtype: Any, attribute: Any) -> Any:
        if what in ("cmpi", "cmpf"):
            predicate = number(attribute["predicate"])
            if what == "cmpf":
                return getattr(np.asarray(x[0]), FLOATS[predicate])(x[1])
            a, b = (v if predicate < 6 else unsigned(v) for v in x)
            return getattr(np.asarray(a), INTEGERS[predicate if predicate < 6 else predicate - 4])(b)
        if what == "select":
            return np.where(*x)
        if what in ("extui", "uitofp", "trunci", "extsi", "sitofp", "truncf", "extf", "fptosi"):
            return (unsigned(x[0]) if what in ("extui", "uitofp") else x[0]).astype(dtype)
        if what.endswith("ui"):
            return {
                "div": np.floor_divide,
                "rem": np.remainder,
                "shr": np.right_shift,
                "max": np.maximum,
                "min": np.minimum,
            }[what[:-2]](*map(unsigned, x)).astype(dtype)
        simple = {
            "addi": np.add, "addf": np.add, "subi": np.subtract, "subf": np.subtract, "muli": np.multiply,
            "mulf": np.multiply, "divf": np.divide, "andi": np.bitwise_and, "ori": np.bitwise_or,
            "xori": np.bitwise_xor, "shli": np.left_shift, "shrsi": np.right_shift, "maxsi": np.maximum,
            "minsi": np.minimum, "maxnumf": np.fmax, "minnumf": np.fmin, "maximumf": np.maximum,
            "minimumf": np.minimum, "negf": np.negative,
        }  # fmt: skip
        if what == "divsi":
            return np.trunc(x[0].astype(np.float64) / x[1]).astype(dtype)
        if what == "remsi":
            return np.fmod(*x)
        return simple[what](*x)


def unsigned(x: Any) -> Any:
    return np.asarray(x).view(UNSIGNED[np.asarray(x).dtype])


def kind(of: Any) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of a type; of pointers none."""
    at = re.match(r"tensor<((?:\d+x)*)(.*)>$", str(of))
    name = at[2] if at else str(of)
    shape = tuple(map(int, at[1].split("x")[:-1])) if at else ()
    return shape, np.dtype(DTYPES[name]) if name in DTYPES else None


def number(attribute: Any) -> int:
    return int(str(attribute).split(":")[0])
