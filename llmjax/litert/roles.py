"""What the parts of a language model's graph are: which tensor holds a module's weight, and which its output.

Tensors' names tell (``llmjax.litert.steps.leaves``); what has no module (scores, queries that are rotated) is found by
how it is computed.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from converters.readers.litert.options import COMPOSITE
from converters.readers.litert.tflite import Operator, Subgraph, TfliteFile
from llmjax.litert.ports import LOGITS, Ports
from llmjax.litert.steps import Attention, Step, leaves

_SAME = ("RESHAPE", "TRANSPOSE", "DEQUANTIZE")  # the same values in another form
_RMS_NORM = "odml.rms_norm"
_MOST_PRODUCTS = 1 << 12  # far above any model's


class Roles:
    """The parts of a model's ``decode``.

    Args:
      file: the model's graph.
      ports: of ``decode``.

    Attributes:
      index, graph: the subgraph of ``decode``.
      steps: by module, in the order of computation.
      attentions: by the module they lie in, ``layers.3.self_attn``.
      acts: by module, the tensor of an MLP's activation.
      kernels: by module, the constant ``[1, D, k]`` of a short convolution, and its bias ``[1, D]`` or None.
      table: the tensor of the embedding, None where the model has embedders of its own.
      head: the product that the logits come from; its module is ``lm_head``.
      softcap: of the logits, or None.
      outputs: tensors by what they are: ours for the residual stream (``embed``, ``layers.3.resid``), else as Hugging
        Face calls a module's output, and what ``llmjax.oracle.names`` knows beside (``layers.3.self_attn.q_rot``).
    """

    def __init__(self, file: TfliteFile, ports: Ports):
        self.file = file
        self.index = file.signatures[ports.name].subgraph
        self.graph: Subgraph = file.subgraphs[self.index]
        self._made = {i: (place, op) for place, op in enumerate(self.graph.operators) for i in op.outputs}
        self._users: dict[int, list[Operator]] = defaultdict(list)
        for op in self.graph.operators:
            for i in op.inputs:
                self._users[i].append(op)
        logits = file.signatures[ports.name].outputs[LOGITS]
        self.head, self.softcap = self._head(logits)
        products = self._products()
        self._first: dict[int | None, int] = {}
        for step in products:
            self._first[step.layer] = min(step.place, self._first.get(step.layer, step.place))
        self.attentions = {step.parent: mixing for step in products if (mixing := self._attention(step))}
        self.acts = {step.parent: act for step in products if (act := self._act(step)) is not None}
        self.kernels = {module: (kernel, bias) for module, kernel, bias in self._convolutions()}
        found = sorted([*map(self._unscaled, products), *self._norms()], key=lambda step: step.place)
        self.steps = {step.module: step for step in found}
        lookups = [op for op in self.graph.operators if op.name == "EMBEDDING_LOOKUP"]
        self.table = self.back(lookups[0].inputs[1]) if lookups else None
        self.outputs = self._outputs()

    # How tensors hang together.

    def op(self, i: int, *names: str) -> Operator | None:
        """What computes a tensor, if it is one of these operators."""
        found = self._made.get(i)
        return found[1] if found and (not names or found[1].name in names) else None

    def constant(self, i: int) -> bool:
        """Whether a tensor's value is in the file."""
        return i >= 0 and self.file.is_constant(self.graph.tensors[i])

    def number(self, i: int) -> float | None:
        """The value of a constant that is one float."""
        tensor = self.graph.tensors[i] if i >= 0 else None
        if tensor is None or tensor.type != "FLOAT32" or np.prod(tensor.shape) != 1 or not self.constant(i):
            return None
        return float(self.file.data(tensor).view("<f4")[0])

    def back(self, i: int) -> int:
        """The tensor that this one is another form of."""
        while op := self.op(i, *_SAME):
            i = op.inputs[0]
        return i

    def _scaled(self, i: int) -> tuple[int, float]:
        """What a tensor is a multiple of, and the factor."""
        i, factor = self.back(i), 1.0
        while op := self.op(i, "MUL"):
            parts = [(n, other) for n, other in zip(map(self.number, op.inputs), op.inputs[::-1], strict=True)]
            known = next(((n, other) for n, other in parts if n is not None), None)
            if known is None:
                break
            factor, i = factor * known[0], self.back(known[1])
        return i, factor

    def _before(self, i: int, *stop: str) -> Iterator[Operator]:
        """The operators that a tensor hangs on, as far as those named ``stop`` and the products."""
        todo, seen = [i], set[int]()
        while todo:
            at = todo.pop()
            if at not in seen and (op := self.op(at)) and op.name not in (*stop, "FULLY_CONNECTED"):
                yield op
                todo += op.inputs
            seen.add(at)

    # What the steps are.

    def _head(self, logits: int) -> tuple[Step | None, float | None]:
        at, cap = self._scaled(logits)
        tanh = self.op(at, "TANH")
        at, inside = self._scaled(tanh.inputs[0]) if tanh else (at, 1.0)
        op = self.op(at, "FULLY_CONNECTED")
        factor = 1 / (cap * inside) if tanh else 1.0
        return (self._product(op, "lm_head", factor) if op else None), cap if tanh else None

    def _product(self, op: Operator, module: str, factor: float = 1.0) -> Step:
        bias = op.inputs[2] if len(op.inputs) > 2 and op.inputs[2] >= 0 else None
        place = self._made[op.outputs[0]][0]
        return Step(module, place, op.inputs[0], op.outputs[0], self.back(op.inputs[1]), bias, factor=factor)

    def _unscaled(self, step: Step) -> Step:
        """The product of queries under its own name where their scale, which nothing parts from it, is in its weight:
        then it is mostly called as the attention that it lies in."""
        module = step.module.removesuffix(".q_proj")
        attention = self.attentions.get(module)
        if attention is None or self.back(step.output) != attention.q_rot:
            return step
        if module != step.module and attention.scale != 1:
            return step
        return dataclasses.replace(step, module=f"{module}.q_proj", factor=attention.width**-0.5)

    def _products(self) -> list[Step]:
        """The products by module: of several modules that a name may mean, one that no other product is."""
        left: dict[int, tuple[Operator, list[str]]] = {}
        for place, op in enumerate(self.graph.operators):
            if op.name == "FULLY_CONNECTED" and self.constant(self.back(op.inputs[1])):
                called = (self.graph.tensors[i].name for i in (self.back(op.inputs[1]), op.outputs[0]))
                left[place] = op, next((found for name in called if (found := leaves(name))), [])
        if self.head is not None:
            left.pop(self.head.place, None)
        # What other products lie in is a product's name only where it has no other.
        around = {m.rpartition(".")[0] for _, names in left.values() for m in names}
        left = {place: (op, [m for m in names if m not in around] or names) for place, (op, names) in left.items()}
        if len(left) > _MOST_PRODUCTS:
            raise ValueError(f"expected at most {_MOST_PRODUCTS} products, found {len(left)}")
        steps = [self.head] if self.head else []
        taken: set[str] = set()
        while left:
            open_ = {place: [m for m in names if m not in taken] for place, (_, names) in left.items()}
            clear = [place for place, names in open_.items() if len(names) < 2] or [min(left)]
            for place in clear:
                op, _ = left.pop(place)
                module = next((m for m in open_[place] if m not in taken), None)
                if module is not None:
                    taken.add(module)
                    steps.append(self._product(op, module))
        return steps

    def _norms(self) -> Iterator[Step]:
        taken: set[str] = set()
        for place, op in enumerate(self.graph.operators):
            found: Step | None = None
            if op.name == COMPOSITE and op.options["name"] == _RMS_NORM:
                weight = op.inputs[1] if len(op.inputs) > 1 and self.constant(op.inputs[1]) else None
                found = Step("", place, op.inputs[0], op.outputs[0], weight, eps=self._eps(op))
            elif op.name == "RSQRT" or (op.name == "POW" and self.number(op.inputs[1]) == -0.5):
                found = self._spelled_out(op, place)
            names = [m for m in leaves(self.graph.tensors[found.output].name) if m not in taken] if found else []
            if found and names:
                module = next((m for m in names if "norm" in m.rpartition(".")[2]), names[0])
                taken.add(module)
                yield dataclasses.replace(found, module=module)

    def _eps(self, op: Operator) -> float:
        """Of a composite's body."""
        body = self.file.subgraphs[op.options["body"]] if 0 <= op.options["body"] < len(self.file.subgraphs) else None
        for inner in body.operators if body else ():
            for i in inner.inputs if inner.name == "ADD" else ():
                if body and i >= 0 and np.prod(body.tensors[i].shape) == 1 and self.file.is_constant(body.tensors[i]):
                    return float(self.file.data(body.tensors[i]).view("<f4")[0])
        return 0.0

    def _spelled_out(self, root: Operator, place: int) -> Step | None:
        """A norm whose operators stand in the graph: ``x * rsqrt(...)``, less the mean, times a weight, plus a bias."""
        add = self.op(self.back(root.inputs[0]), "ADD")
        eps = next((n for i in add.inputs if (n := self.number(i)) is not None), None) if add else None
        if eps is None:
            return None
        product = next((op for op in self._uses(root.outputs[0], "MUL") if self._width(op.outputs[0]) > 1), None)
        if product is None:
            return None
        x = next(i for i in product.inputs if self.back(i) != root.outputs[0])
        y, weight, bias = product.outputs[0], None, None
        for name in ("ADD", "MUL", "ADD"):
            op = next(self._uses(y, name), None)
            other = None if op is None else next((i for i in op.inputs if self.back(i) != y), None)
            if op is None or other is None or len(self._users[y]) > 1:
                continue
            if name == "ADD" and weight is None and not self.constant(other) and self._width(self.back(other)) == 1:
                y = op.outputs[0]  # the mean, with its sign
            elif name == "MUL" and self.constant(other):
                y, weight = op.outputs[0], other
            elif name == "ADD" and weight is not None and self.constant(other):
                y, bias = op.outputs[0], other
        return Step("", place, self.back(x), y, weight, bias, eps)

    def _uses(self, i: int, *names: str) -> Iterator[Operator]:
        for op in self._users[i]:
            if op.name in names:
                yield op
            elif op.name in _SAME:
                yield from self._uses(op.outputs[0], *names)

    def _width(self, i: int) -> int:
        shape = self.graph.tensors[i].shape
        return shape[-1] if shape else 1

    def _attention(self, step: Step) -> Attention | None:
        """That of the last product of an attention."""
        mixed = self.op(self.back(step.input), "BATCH_MATMUL")
        softmax = self.op(self.back(mixed.inputs[0]), "SOFTMAX") if mixed else None
        if softmax is None:
            return None
        at, window = self.back(softmax.inputs[0]), None
        if masked := self.op(at, "ADD"):
            window = self._window(masked.inputs[1])
            at = self.back(masked.inputs[0])
        at, factor = self._scaled(at)
        softcap = None
        if tanh := self.op(at, "TANH"):
            softcap = factor
            at, factor = self._scaled(tanh.inputs[0])
            factor *= softcap
        scores = self.op(at, "BATCH_MATMUL")
        if scores is None:
            return None
        q_rot, scale = self._scaled(scores.inputs[0])
        keys = self.op(self.back(scores.inputs[1]), "DYNAMIC_UPDATE_SLICE")
        k_rot = self.back(keys.inputs[1]) if keys and self._own(keys, step) else None
        return Attention(
            step.input,
            softmax.outputs[0],
            q_rot,
            k_rot,
            scale * factor,
            softcap,
            window,
            self._frequencies(q_rot),
            self._width(scores.inputs[0]),
        )

    def _own(self, keys: Operator, step: Step) -> bool:
        """Whether keys are of the layer of a product; others take those of a layer before."""
        return self._made[keys.outputs[0]][0] >= self._first[step.layer]

    def _window(self, mask: int) -> int | None:
        """How far back a mask that the graph makes lets a query see."""
        for op in self._before(mask, "CAST"):
            if op.name == "SUB":
                for i in op.inputs:
                    if self.constant(i) and self.graph.tensors[i].type == "INT32":
                        values = self.file.data(self.graph.tensors[i]).view("<i4")
                        return int(values[0]) if len(values) == 1 else None
        return None

    def _frequencies(self, q: int) -> int | None:
        for op in self._before(q):
            if op.name == "COS":
                for inner in self._before(op.inputs[0]):
                    constants = [i for i in inner.inputs if self.constant(i)]
                    if inner.name == "MUL" and constants and self._width(constants[0]) > 1:
                        return constants[0]
        return None

    def _act(self, step: Step) -> int | None:
        """What comes out of the activation of an MLP whose last product this is."""
        x = self.back(step.input)
        op = self.op(x)
        if op is None or op.name not in ("MUL", "GELU", "RELU"):
            return None
        if op.name != "MUL":
            return x
        made = [self.back(i) for i in op.inputs]
        return next((i for i in made if self.op(i, "GELU", "RELU") or self._is_silu(i)), None)

    def _is_silu(self, i: int) -> bool:
        op = self.op(i, "MUL")
        return op is not None and any(self.op(self.back(j), "LOGISTIC") for j in op.inputs)

    def _convolutions(self) -> Iterator[tuple[str, int, int | None]]:
        for op in self.graph.operators:
            product = self.op(op.inputs[0], "MUL") if op.name == "SUM" else None
            for i in product.inputs if product else ():
                if self.constant(i) and (modules := leaves(self.graph.tensors[i].name)):
                    added = (j for user in self._users[op.outputs[0]] if user.name == "ADD" for j in user.inputs)
                    yield f"{modules[0]}.conv", i, next(filter(self.constant, added), None)

    # What is known of a model by them.

    def _outputs(self) -> dict[str, int]:
        steps = list(self.steps.values())
        found = {step.module: step.output for step in steps if step.factor == 1}
        starts = {n: next(step.input for step in steps if step.layer == n) for n in {s.layer for s in steps} - {None}}
        found |= {f"layers.{n - 1}.resid" if n else "embed": self.back(i) for n, i in starts.items() if n is not None}
        last = next((step.input for step in reversed(steps) if step.layer is None and step.eps is not None), None)
        if last is not None:
            found[f"layers.{self.layers - 1}.resid"] = self.back(last)
        for parent, attention in self.attentions.items():
            output = next(step for step in steps if step.input == attention.out)
            found[f"{output.module}.input"] = attention.out
            if attention.frequencies is not None:
                found[f"{parent}.q_rot"] = attention.q_rot
            if attention.frequencies is not None and attention.k_rot is not None:
                found[f"{parent}.k_rot"] = attention.k_rot
            behind = (self.back(s.input) for s in steps if s.layer == output.layer and s.eps and s.place > output.place)
            if (total := next((i for i in behind if self.op(i, "ADD")), None)) is not None:
                found[f"layers.{output.layer}.resid_attn"] = total
        return found | {f"{parent}.act_fn": act for parent, act in self.acts.items()}

    @property
    def layers(self) -> int:
        """L."""
        return max((step.layer for step in self.steps.values() if step.layer is not None), default=-1) + 1
