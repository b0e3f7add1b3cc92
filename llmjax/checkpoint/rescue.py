"""A checkpoint out of an op graph, proven: what was found computes what the graph does, or it is refused."""

import numpy as np

from converters.readers.source import Source
from llmjax.checkpoint.graph_source import GraphSource
from llmjax.checkpoint.loading import fitting_plan
from llmjax.checkpoint.parameters import read_all
from llmjax.checkpoint.placing import put
from llmjax.checkpoint.plan import Override, Plan
from llmjax.errors import CheckpointError
from llmjax.model import Model
from llmjax.numerics import REFERENCE
from llmjax.quant.schemes import Recipe

_TOKENS = 12
# Of the largest logit: float32's roundings, in another order and with constants unfolded, leave a hundredth of it.
_ALLOWED = 1e-4


def proven_plan(source: Source, recipe: Recipe | None, override: Override) -> Plan:
    """How to read a checkpoint, that in a graph after it was proven.

    Raises:
      CheckpointError: it is damaged, or what was found in the graph computes something else.
      ConfigError: see ``fitting_plan``.
    """
    plan = fitting_plan(source, recipe, override)
    if isinstance(source, GraphSource):
        prove(source, plan)
    return plan


def prove(source: GraphSource, plan: Plan) -> None:
    """Compares the logits of what was found with the graph's, activations unrounded in both.

    Raises:
      CheckpointError: they differ.
    """
    params: dict[str, object] = {}
    for name, value in read_all(source, plan, None, None):
        put(params, name, value)
    graph = source.model.under(REFERENCE)
    model = Model(plan.architecture, plan.config, params, graph.numerics, None, (), source.path)
    count = min(_TOKENS, graph.context_length)
    # Token 0 is padding in some graphs.
    ids = np.random.default_rng(0).integers(1, plan.config.vocab_size, count).tolist()
    (ours,), (theirs,) = model.logits([ids]), graph.logits([ids])
    far = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not far <= _ALLOWED:
        raise CheckpointError(
            f"{source.path}: the weights found in its graph, under the configuration {_short(source, plan)}, compute "
            f"logits {far:.1e} of the largest from the graph's (at most {_ALLOWED:.0e} is allowed), so nothing is "
            "written; the graph does something that its family does not: llmjax compare with the checkpoint that it "
            "was exported from names the step"
        )


def _short(source: GraphSource, plan: Plan) -> str:
    return "found there" if source.config.get("model_type") == plan.architecture.model_type else "given"
