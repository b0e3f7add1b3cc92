"""LiteRT's graphs in NumPy, as their operators are documented: nothing to compile, and nothing of llmjax in it but the
reader of the file.  Weights of few bits mean what they stand for; activations are never rounded."""

import math
from pathlib import Path

import numpy as np

from converters.readers.litert import tflite

_erf = np.vectorize(math.erf, otypes=[np.float64])
HIDDEN = -0.7 * float(np.finfo(np.float32).max)


def _softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _gelu(x, approximate):
    inner = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)) if approximate else _erf(x / math.sqrt(2))
    return 0.5 * x * (1 + inner)


def _matmul(x, y, options):
    x = x.swapaxes(-1, -2) if options["adj_x"] else x
    return x @ (y.swapaxes(-1, -2) if options["adj_y"] else y)


def _update(array, update, start):
    start = [int(np.clip(s, 0, n - u)) for s, n, u in zip(start, array.shape, update.shape, strict=True)]
    out = array.copy()
    out[tuple(slice(s, s + u) for s, u in zip(start, update.shape, strict=True))] = update
    return out


def _slice(x, begin, size):
    return x[tuple(slice(b, b + s) for b, s in zip(begin, size, strict=True))]


def _reduced(function):
    return lambda o, x, axes: function(x, axis=tuple(axes.reshape(-1)), keepdims=o["keep_dims"])


def _plain(function):
    return lambda o, *x: function(*x)


OPERATORS = {
    **{
        name: _plain(function)
        for name, function in {
            "ADD": np.add,
            "BROADCAST_TO": np.broadcast_to,
            "COS": np.cos,
            "DEQUANTIZE": lambda x: x,
            "DIV": np.divide,
            "DYNAMIC_UPDATE_SLICE": _update,
            "EMBEDDING_LOOKUP": lambda ids, table: table[ids],
            "EQUAL": np.equal,
            "EXP": np.exp,
            "FLOOR_DIV": np.floor_divide,
            "GREATER": np.greater,
            "GREATER_EQUAL": np.greater_equal,
            "LESS": np.less,
            "LESS_EQUAL": np.less_equal,
            "LOG": np.log,
            "LOGICAL_AND": np.logical_and,
            "LOGISTIC": lambda x: 1 / (1 + np.exp(-x)),
            "MAXIMUM": np.maximum,
            "MINIMUM": np.minimum,
            "MUL": np.multiply,
            "NEG": np.negative,
            "POW": np.power,
            "RESHAPE": np.reshape,
            "RSQRT": lambda x: 1 / np.sqrt(x),
            "SELECT_V2": np.where,
            "SIN": np.sin,
            "SLICE": _slice,
            "SOFTMAX": _softmax,
            "SQRT": np.sqrt,
            "SUB": np.subtract,
            "TANH": np.tanh,
            "TRANSPOSE": np.transpose,
        }.items()
    },
    "UNPACK": lambda o, x: list(np.moveaxis(x, o["axis"], 0)),
    "BATCH_MATMUL": lambda o, x, y: _matmul(x, y, o),
    "CONCATENATION": lambda o, *x: np.concatenate(x, o["axis"]),
    "FULLY_CONNECTED": lambda o, x, w, b=None: x @ w.T if b is None else x @ w.T + b,
    "GATHER": lambda o, x, ids: np.take(x, ids, o["axis"]),
    "GELU": lambda o, x: _gelu(x, o["approximate"]),
    "MEAN": _reduced(np.mean),
    "PACK": lambda o, *x: np.stack(x, o["axis"]),
    "REDUCE_MAX": _reduced(np.max),
    "SUM": _reduced(np.sum),
    "TOPK_V2": lambda o, x, k: [a[..., :k] for a in (-np.sort(-x), np.argsort(-x, kind="stable"))],
}
_TYPES = {"FLOAT32": np.float32, "FLOAT16": np.float16, "INT32": np.int32, "BOOL": np.bool_, "INT8": np.int8}


class Lite:
    """A file of a language model's signatures."""

    def __init__(self, path: Path):
        self.file = tflite.read_file(path)
        decode = self.file.signatures["decode"]
        tensors = self.file.subgraphs[decode.subgraph].tensors
        self.caches = {
            n: np.zeros(tensors[i].shape, np.float32) for n, i in decode.inputs.items() if n in decode.outputs
        }
        self.context = tensors[decode.inputs["mask"]].shape[-1]
        self._constants: dict[tuple[int, int], np.ndarray] = {}

    def constant(self, number: int, index: int) -> np.ndarray:
        """A constant's values."""
        if (number, index) not in self._constants:
            graph = self.file.subgraphs[number]
            tensor, q = graph.tensors[index], graph.tensors[index].quantization
            data = self.file.data(tensor)
            if tensor.type == "INT4":
                data = np.stack([(data << 4).view(np.int8) >> 4, data.view(np.int8) >> 4], -1)
            value = data.reshape(-1).view(_TYPES.get(tensor.type, np.int8)).reshape(tensor.shape)
            if q is not None:
                scales = q.scales if not q.block else self.constant(number, q.scales_tensor).astype(np.float32)
                value = value.reshape(len(value), -1, q.block or value.shape[1]) * scales.reshape(len(value), -1, 1)
                value = value.reshape(tensor.shape).astype(np.float32)
            self._constants[number, index] = value
        return self._constants[number, index]

    def weights(self) -> list[np.ndarray]:
        """All constants of decode that have two dimensions and a name."""
        number = self.file.signatures["decode"].subgraph
        tensors = self.file.subgraphs[number].tensors
        return [self.constant(number, i) for i, t in enumerate(tensors) if t.name and self.file.is_constant(t)]

    def run(self, signature: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by name."""
        found = self.file.signatures[signature]
        graph = self.file.subgraphs[found.subgraph]
        values = {i: inputs[name] for name, i in found.inputs.items()}
        for op in graph.operators:
            given = [values[i] if i in values else self.constant(found.subgraph, i) for i in op.inputs if i >= 0]
            made = given[0] if op.name == "CAST" else OPERATORS[op.name](op.options, *given)
            for at, value in zip(op.outputs, made if isinstance(made, list) else [made], strict=True):
                assert value.shape == graph.tensors[at].shape, op.label
                values[at] = value.astype(_TYPES[graph.tensors[at].type])
        return {name: values[i] for name, i in found.outputs.items()}

    def feed(self, ids: list[int], at: int, length: int) -> np.ndarray | None:
        """Tokens through decode, or as many as fit through a prefill of this ``length``, padded as LiteRT-LM pads:
        token 0 at position 0 that sees nothing.  The logits of the last one, where there are any."""
        tokens, positions = np.zeros((1, length), np.int32), np.zeros(length, np.int32)
        mask = np.full((1, 1, length, self.context), HIDDEN, np.float32)
        tokens[0, : len(ids)] = ids
        positions[: len(ids)] = np.arange(at, at + len(ids))
        for i in range(len(ids)):
            mask[0, 0, i, : at + i + 1] = 0
        name = "decode" if length == 1 else f"prefill_{length}"
        found = self.run(name, tokens=tokens, input_pos=positions, mask=mask, **self.caches)
        self.caches = {name: found[name] for name in self.caches}
        return found["logits"].reshape(-1) if "logits" in found else None
