"""LiteRT's own interpreter, operator by operator (``pip install ai-edge-litert flatbuffers``)."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from llmjax.litert.graph import Graph
from llmjax.litert.products import as_array


def exposed(path: Path) -> bytes:
    """A file whose signatures give all tensors that they compute, too: ``t17``, by their numbers."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    data = path.read_bytes()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    for buffer in model.buffers:
        if buffer.offset > 1:  # beyond the flatbuffer, which is as long again
            buffer.data = np.frombuffer(data, np.uint8)[buffer.offset : buffer.offset + buffer.size]
            buffer.offset = buffer.size = 0
    for signature in model.signatureDefs:
        graph = model.subgraphs[signature.subgraphIndex]
        more = [int(i) for op in graph.operators for i in op.outputs if i not in graph.outputs]
        signature.outputs += [schema.TensorMapT(name=f"t{i}", tensorIndex=i) for i in more]
        graph.outputs = np.array([*graph.outputs, *more], np.int32)
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


class Operators:
    """The operators of one signature, each apart from all others, a composite as one.

    Args:
      path: the file.
      graph: it as ours.
      signature: its name.
    """

    def __init__(self, path: Path, graph: Graph, signature: str):
        from ai_edge_litert.interpreter import Interpreter

        self._runs = [
            Interpreter(model_content=data, num_threads=1).get_signature_runner(signature)
            for data in (path.read_bytes(), exposed(path))
        ]
        self._graph, self._signature = graph, graph.signatures[signature]
        self._body = graph.file.subgraphs[self._signature.subgraph]
        self._apart = jax.jit(self._each)

    def _each(self, weights: dict, values: dict) -> list:
        """What each of our kernels gives, from the interpreter's values."""
        number, found = self._signature.subgraph, []
        for op in self._body.operators:
            constants = {i: self._graph.constant(number, i, weights) for i in op.inputs if i >= 0 and i not in values}
            given = [None if i < 0 else (constants | values)[i] for i in op.inputs]
            made: dict[int, Any] = {}
            self._graph._step(weights, self._body, op, given, made)
            found.append([as_array(made[i]) for i in op.outputs])
        return found

    def distances(self, **inputs: np.ndarray) -> dict[str, float]:
        """By operator's name, how far our kernels are from the interpreter's, each from what that one was given: the
        largest difference as a share of the tensor's largest value.  Those that agree in every bit are left out."""
        plain, seen = (run(**inputs) for run in self._runs)
        for name, value in plain.items():  # to be looked at changes nothing
            np.testing.assert_array_equal(seen[name], value)
        values = {i: inputs[name] for name, i in self._signature.inputs.items()}
        values |= {i: seen[name] for name, i in self._signature.outputs.items()}
        values |= {int(name[1:]): value for name, value in seen.items() if name[1:].isdigit()}
        found: dict[str, float] = {}
        for op, made in zip(self._body.operators, self._apart(self._graph.weights, values), strict=True):
            for i, ours in zip(op.outputs, made, strict=True):
                if gap := float(np.abs(np.float64(ours) - values[i]).max()):
                    share = gap / max(float(np.abs(values[i]).max()), float(np.finfo(np.float32).tiny))
                    found[op.name] = max(share, found.get(op.name, 0))
        return found
