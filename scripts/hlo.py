"""Reads a program's optimized HLO: what is launched, and the bytes that each kernel reads and writes."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4}
SIZES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8}
NOTHING = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all", "opt-barrier"}
PARTS = {"dynamic-slice", "gather", "slice"}  # which read a part of what they are given
PLACES = {"dynamic-update-slice", "scatter"}  # which write one


def arrays(shape: str) -> list[tuple[str, int]]:
    """Type and elements of each array of a shape, which may be a tuple's."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return [(dtype, math.prod(map(int, filter(None, dims.split(","))))) for dtype, dims in found]


def dims(shape: str) -> list[int]:
    """Of an array's shape."""
    return [int(n) for n in re.findall(r"\d+", shape[shape.index("[") : shape.index("]")])]


def elements(shape: str) -> int:
    return sum(count for _, count in arrays(shape))


def size(shape: str) -> float:
    return sum(SIZES.get(dtype, 0) * count for dtype, count in arrays(shape))


@dataclasses.dataclass(frozen=True)
class Op:
    """An instruction of HLO: its shape, what it does, to what, and the rest of its line."""

    name: str
    shape: str
    code: str
    operands: tuple[str, ...]
    rest: str

    @property
    def number(self) -> int:
        """Of a parameter."""
        return int(self.rest.split(",")[0])


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is launched: its operation, the bytes it reads and writes, the weights it reads, by number, and the flops of
    its matrix product, with the type of what is multiplied; 0 if it has none."""

    op: Op
    read: float
    written: float
    weights: tuple[int, ...]
    flops: float
    dtype: str


class Program:
    """The optimized HLO of a program, read.

    Args:
      text: of it.
      weights: by parameter number of the program, shapes of the weights.
      in_use: bytes of a cache that attention's kernel reads, of one that has room for more.
      seen: positions that one of its queries attends to, on average.

    Attributes:
      ops: by computation, those in it.
      kernels: of one call, loops' bodies once, of branches the one that does least.
    """

    def __init__(self, text: str, weights: dict[int, tuple[int, ...]], in_use: int, seen: float):
        self.weights, self.in_use, self.seen = weights, in_use, seen
        self.ops: dict[str, dict[str, Op]] = {}
        entry = here = ""
        text = re.sub(r"/\*index=\d+\*/|, (?:metadata|frontend_attributes)=\{[^}]*\}", "", text)
        for line in text.splitlines():
            if head := re.match(r"(ENTRY )?%([\w.-]+) \(.*\{$", line):
                here, entry = head[2], head[2] if head[1] else entry
                self.ops[here] = {}
            elif at := re.match(r"\s+(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)$", line):
                operands = tuple(re.findall(r"%([\w.-]+)", at[4]))
                rest = at[4] + at[5] if at[3] in ("parameter", "constant") else at[5]
                self.ops[here][at[1]] = Op(at[1], at[2], at[3], operands, rest)
        self.kernels = list(self._run(entry, {}))

    def _source(self, where: str, name: str, given: dict[int, Any]) -> Any:
        """Number of the program's parameter that a value is, a tuple of such, or None."""
        op = self.ops[where][name]
        if op.code == "parameter":
            number = op.number
            return given.get(number) if given else number
        if op.code in ("bitcast", "copy", "opt-barrier"):
            return self._source(where, op.operands[0], given)
        if op.code == "tuple":
            return tuple(self._source(where, operand, given) for operand in op.operands)
        if op.code == "get-tuple-element":
            of = self._source(where, op.operands[0], given)
            index = re.search(r"index=(\d+)", op.rest)
            return of[int(index[1])] if isinstance(of, tuple) and index else None
        return None

    def _run(self, where: str, given: dict[int, Any]) -> Iterator[Kernel]:
        for op in self.ops[where].values():
            if op.code in NOTHING:
                continue
            sources = [self._source(where, operand, given) for operand in op.operands]
            if op.code == "while":
                for part in re.findall(r"(?:condition|body)=%([\w.-]+)", op.rest):
                    yield from self._run(part, {0: sources[0]})
            elif op.code == "conditional":
                names = re.findall(r"(?:true_computation|false_computation)=%([\w.-]+)", op.rest)
                names = names or re.findall(r"%([\w.-]+)", re.findall(r"branch_computations=\{(.*?)\}", op.rest)[0])
                ways = [list(self._run(name, {0: source})) for name, source in zip(names, sources[1:], strict=True)]
                yield from min(ways, key=lambda kernels: sum(k.read + k.written for k in kernels))
            elif op.code == "call":
                name = re.findall(r"to_apply=%([\w.-]+)", op.rest)[0]
                yield from self._run(name, dict(enumerate(sources)))
            else:
                yield self._kernel(where, op, sources)

    def _kernel(self, where: str, op: Op, sources: list[Any]) -> Kernel:
        read = [size(self.ops[where][operand].shape) for operand in op.operands]
        written = size(op.shape)
        called = re.search(r"calls=%([\w.-]+)", op.rest) if op.code == "fusion" else None
        if called:
            inner = self.ops[called[1]]
            for parameter in (o for o in inner.values() if o.code == "parameter"):
                users = [o for o in inner.values() if parameter.name in self._through(inner, o)]
                if users and all(o.code in PARTS | PLACES for o in users):
                    part = sum(size(o.shape) for o in users if o.code in PARTS)
                    read[parameter.number] = part
            for o in inner.values():
                if o.code in PLACES and elements(o.shape) * 2 > elements(op.shape):
                    written = size(inner[o.operands[2 if o.code == "scatter" else 1]].shape)
        elif "__cublas" in op.rest:  # its second array is room to work in
            written = size(op.shape[: op.shape.index("]") + 1])
        elif 'name = "experts_product"' in op.rest:  # each expert's weight once, of no more experts than tiles
            shapes = [self.ops[where][operand].shape for operand in op.operands]
            experts = dims(shapes[1])[0]
            tiles = next(dims(shape)[0] for shape in shapes[2:] if shape.startswith("s32["))
            read = [bytes_ * min(1, tiles / experts) if dims(shape)[:1] == [experts] and not shape.startswith("s32[")
                    else bytes_ for bytes_, shape in zip(read, shapes, strict=True)]  # fmt: skip
        elif "attention" in op.rest:  # what lies in the rows' pages, of caches with pages for more
            read = [min(bytes_, self.in_use) for bytes_ in read]
        wholes = (size(self.ops[where][operand].shape) for operand in op.operands)
        numbers = tuple(
            source
            for source, whole, part in zip(sources, wholes, read, strict=True)
            if isinstance(source, int) and source in self.weights and part > whole / 2
        )
        return Kernel(op, sum(read), written, numbers, *self._product(where, op, called[1] if called else None))

    def _product(self, where: str, op: Op, called: str | None) -> tuple[float, str]:
        """Flops of a kernel's matrix products, and the type of their operands."""
        if called:
            found = [self._product(called, o, None) for o in self.ops[called].values() if o.code == "dot"]
            return sum(flops for flops, _ in found), next((dtype for _, dtype in found), "")
        given = [self.ops[where][operand].shape for operand in op.operands]
        if 'name = "packed_product"' in op.rest:
            (dtype, count), channels = arrays(given[0])[0], dims(given[1])[0]
            return 2.0 * count * channels, dtype
        if 'name = "experts_product"' in op.rest:
            dtype, (pieces, parts, _, width) = arrays(given[0])[0][0], dims(given[0])
            return 2.0 * pieces * parts * width * math.prod(dims(op.shape)[1:]), dtype
        if found := re.search(r'name = "attention(?:_parts)?(_in_halves)?"', op.rest):
            ((dtype, count),) = arrays(given[2])
            products, dtype = (3, "f16") if found[1] else (1, dtype)  # of pairs of halves
            return products * 4.0 * count * self.seen, dtype
        at = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]+)', op.rest)
        if at is None or not (op.code == "dot" or "__cublas" in op.rest):
            return 0.0, ""
        width = math.prod(dims(given[0])[int(i)] for i in re.findall(r"\d+", at[1]))
        return 2.0 * arrays(op.shape)[0][1] * width, arrays(given[0])[0][0]

    def _through(self, inner: dict[str, Op], op: Op) -> set[str]:
        """Names an operation reads first of, bitcasts seen through; all of its operands where it reads all."""
        if op.code == "bitcast":
            return set()
        names = set()
        for i, operand in enumerate(op.operands):
            while inner[operand].code == "bitcast":
                operand = inner[operand].operands[0]
            if i == 0 or op.code not in PARTS | PLACES or inner[operand].code != "parameter":
                names.add(operand)
        return names

    def copied_weights(self) -> list[Kernel]:
        """Kernels that make of a weight an array of more than a quarter of its elements; a reduction makes less."""

        def makes_one(kernel: Kernel) -> bool:
            least = min((math.prod(self.weights[number]) for number in kernel.weights), default=math.inf)
            return 4 * max((count for _, count in arrays(kernel.op.shape)), default=0) > least

        others = (k for k in self.kernels if "gemm" not in k.op.rest and k.op.code != "custom-call")
        return [k for k in others if makes_one(k)]

    def reads_of_weights(self) -> dict[int, int]:
        """How many kernels read each weight."""
        count = dict.fromkeys(self.weights, 0)
        for kernel in self.kernels:
            for number in set(kernel.weights):
                count[number] += 1
        return count

    def tf32(self) -> list[str]:
        """Products of float32 that may be rounded."""
        found = []
        for ops in self.ops.values():
            for op in ops.values():
                is_product = op.code == "dot" or "__cublas" in op.rest
                if is_product and all(ops[o].shape.startswith("f32") for o in op.operands[:2]):
                    if "operand_precision={highest,highest}" not in op.rest and "HIGHEST" not in op.rest:
                        found.append(op.name)
        return found

    def tiled(self) -> list[str]:
        """Matrix products that XLA compiles itself, with tiles it does not try."""
        return [op.name for ops in self.ops.values() for op in ops.values() if op.code == "dot"]

    def epilogues(self) -> list[str]:
        """What the library computes with its products, by its own lights."""
        found = re.findall(r'"epilogue":"(\w+)"', "".join(k.op.rest for k in self.kernels))
        return sorted(set(found) - {"DEFAULT"})

    def host_calls(self) -> list[str]:
        """Calls back to Python, and transfers."""
        codes = {"infeed", "outfeed", "send", "recv"}
        return [k.op.name for k in self.kernels if k.op.code in codes or "callback" in k.op.rest]
