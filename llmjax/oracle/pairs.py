"""Models that ``compare`` runs itself: on what, and their activations; an op graph's (``.tflite``, ``.task``,
``.litertlm``) are its tensors that are steps of a model."""

from collections.abc import Sequence

import numpy as np

from llmjax.errors import RequestError
from llmjax.litert.model import GraphModel
from llmjax.litert.ports import LOGITS
from llmjax.model import Model, check_ids
from llmjax.oracle.dump import Dump
from llmjax.oracle.trace import Trace, trace

# For two models and no prompt.
_PROMPT = "The quick brown fox jumps over the lazy dog. In 1905 she wrote: 3.14 is not 22/7, but it is near."


def check_reference(model: Model | None) -> None:
    """A reference is computed step by step, without interventions.

    Raises:
      RequestError: it has some.
    """
    if model is not None and model.interventions:
        raise RequestError("compare: the reference is a model as it is; interventions go with the candidate")


def text(model: Model, candidate: Model, given: Sequence[int] | None) -> list[int]:
    """What two models are compared on, where it is not ``given``.

    Raises:
      RequestError: one of them has no such token, or too short a context.
    """
    most = min(model.context_length, candidate.context_length)
    ids: Sequence[int]
    if given is not None:
        ids = given
    elif model.tokenizer is not None:
        ids = model.tokenizer.encode(_PROMPT)[:most]
    else:
        ids = np.random.default_rng(0).integers(0, model.config.vocab_size, min(32, most)).tolist()
    for one in (model, candidate):
        checked = check_ids(ids, one, f"{one.path}: token_ids")
    return checked.tolist()


def traced(model: Model, ids: Sequence[int]) -> Trace:
    """All activations of a model; of a graph the tensors that are steps of a model, scores and folded ones among
    them."""
    if not isinstance(model, GraphModel):
        return trace(model, ids)
    roles, tensors = model.roles, model.decode_names
    probs = {f"{parent}.attn_weights": tensors[a.probs] for parent, a in roles.attentions.items()}
    folded = {step.module: (tensors[step.output], step.factor) for step in roles.steps.values() if step.factor != 1}
    names = {tensors[i] for i in roles.outputs.values() if i in tensors}
    wanted = {*names, *probs.values(), *(name for name, _ in folded.values()), LOGITS}
    found = trace(model, ids, sorted(wanted))
    arrays = {name: found.activations[name] for name in [*names, LOGITS]}
    count = len(ids)
    for meaning, name in probs.items():
        array = found.activations[name]
        arrays[meaning] = np.ascontiguousarray(array.reshape(count, -1, array.shape[-1])[..., :count].swapaxes(0, 1))
    for meaning, (name, factor) in folded.items():
        arrays[meaning] = found.activations[name] / np.float32(factor)
    if model.numerics.digits == 1:  # whose activations are rounded at run time
        found.manifest["numerics"] += ", dynamic"
    return Trace(arrays, found.manifest)


def beside(model: GraphModel, theirs: Dump) -> Trace:
    """A graph's tensors of another's token ids: those that the other has by the same names, else its steps."""
    ids, tensors = theirs.token_ids.tolist(), {*model.decode_names.values(), LOGITS}
    same = sorted(name for name in theirs.arrays if name in tensors)
    return trace(model, ids, same) if same else traced(model, ids)
