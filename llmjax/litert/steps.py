"""The steps of a language model in its graph, and their names.

litert-torch names a tensor by the PyTorch modules it was computed in, classes and attributes by turns:
``...modeling_llama.LlamaDecoderLayer_3/...LlamaMLP_mlp/...Linear_up_proj;``.  Where operations were fused their names
are joined by ``;``, whichever came first; constants are often nameless, and what uses them tells what they are.
"""

import dataclasses
import re

from llmjax.models.names import stem

# What looking for steps raises in a graph whose operators lack inputs, or whose numbers cannot be.
DAMAGE = (ArithmeticError, IndexError, KeyError, RuntimeError, StopIteration, TypeError, ValueError)


@dataclasses.dataclass(frozen=True)
class Step:
    """A product with a weight, or a norm.

    Attributes:
      module: as Hugging Face calls it, without what stands before the layers: ``layers.3.mlp.up_proj``.
      place: of its first operator.
      input: tensor.
      output: tensor.
      weight: a constant's tensor; None for a norm without one.
      bias: another's, or None.
      eps: of a norm; None for a product.
      factor: what was multiplied into the weight of a product: a scale of the queries, or one over a soft-cap.
    """

    module: str
    place: int
    input: int
    output: int
    weight: int | None
    bias: int | None = None
    eps: float | None = None
    factor: float = 1.0

    @property
    def parent(self) -> str:
        """The module it lies in."""
        return self.module.rpartition(".")[0]

    @property
    def layer(self) -> int | None:
        """The number of its layer."""
        found = re.match(r"layers\.(\d+)\.", self.module)
        return int(found[1]) if found else None


@dataclasses.dataclass(frozen=True)
class Attention:
    """How a layer mixes tokens; numbers of tensors.

    Attributes:
      out: what its last product takes.
      probs: ``[1, K, G, C]``.
      q_rot: rotated queries, before any scale.
      k_rot: rotated keys, as they go into the cache; None where another layer's are taken.
      scale: of the queries.
      softcap: of the scores, or None.
      window: tokens a query sees, or None for all.
      frequencies: the constant of the rotation's angles, or None where there is none.
      width: H.
    """

    out: int
    probs: int
    q_rot: int
    k_rot: int | None
    scale: float
    softcap: float | None
    window: int | None
    frequencies: int | None
    width: int


def leaves(name: str) -> list[str]:
    """The modules that a tensor's name may mean, without those that hold others of them."""
    found: list[str] = []
    for part in name.split(";"):
        attributes = [
            match[1] for c in part.split("/") if (match := re.fullmatch(r"[A-Za-z0-9]+_(\w+)", c.rpartition(".")[2]))
        ]
        number = next((k for k, a in enumerate(attributes) if a.isdigit()), None)
        if number is not None:
            attributes.insert(number, "layers")
        if attributes and (module := stem(".".join(attributes))) not in found:
            found.append(module)
    return [m for m in found if not any(other.startswith(f"{m}.") for other in found)]
