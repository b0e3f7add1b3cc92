"""Several adapters kept beside one model, so that every row of a batch can use its own."""

import dataclasses
from collections.abc import Mapping

from llmjax.errors import LoraError, shown
from llmjax.lora.adapter import AnyLora, read_adapter, values_of
from llmjax.lora.apply import has_lora, together, with_loras
from llmjax.model import AdapterOrigin, Model, Origin


def with_adapters(model: Model, loras: Mapping[str, AnyLora]) -> Model:
    """The model with all of these adapters beside its weights: stacked, the first at place 1, none at place 0.

    Raises:
      LoraError: one does not fit, or the model has an adapter beside its weights already.
    """
    if not isinstance(loras, Mapping):
        raise LoraError(f"loras: expected adapters by name, found {shown(loras)}")
    if has_lora(model.params):
        raise LoraError(f"{model.path}: loaded with an adapter beside its weights (lora); give that one a name as well")
    values = values_of(model.params)
    adapters = {name: read_adapter(lora, model.architecture, model.config, values) for name, lora in loras.items()}
    parameters = sorted({name for adapter in adapters.values() for name in adapter.deltas})
    where = ", ".join(str(adapter.path) for adapter in adapters.values())
    beside = {n: together([adapter.deltas.get(n) for adapter in adapters.values()], values(n), f"{where}: {n}")
              for n in parameters}  # fmt: skip
    params = with_loras(model.params, beside)
    origin = model.origin if model.origin and model.origin.made(model.params) else None
    if origin is not None:
        resident = tuple(AdapterOrigin(name, "unmerged", a.options, a.files) for name, a in adapters.items())
        origin = Origin(params, origin.files, origin.quantize, (*origin.adapters, *resident))
    return dataclasses.replace(model, params=params, origin=origin)
