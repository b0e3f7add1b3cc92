"""Direct preference optimization: the loss of a pair, a completion that was chosen and one that was rejected, and what
a run tells of pairs.

The reference is the base without any adapter, also where training goes on from one (``start``).  Its log-probabilities
are computed with each batch: one pass forward more, and nothing that a run that goes on would have to find again.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

from llmjax.training.batches import Batch


def dpo_loss(policy: Any, reference: Any, beta: float, numpy: ModuleType = jnp) -> Any:
    """``-log sigmoid(beta * ((policy - reference) of chosen - (policy - reference) of rejected))`` of each pair,
    ``[P]``: a pure function (Rafailov et al. 2023, arXiv:2305.18290, equation 7).

    Args:
      policy: ``[P, 2]``, log-probabilities of the chosen and the rejected completion behind their prompt, summed over
        their tokens, the end token among them.
      reference: the like, of the model that training began with.
      beta: how dear it is to go away from the reference.
      numpy: ``numpy`` for arrays of the host, in their own precision.
    """
    rewards = beta * (policy - reference)
    return numpy.logaddexp(0.0, rewards[:, 1] - rewards[:, 0])


def pairs_of(rows: Any) -> Any:
    """``[P, 2]``, chosen and rejected, from what was computed of a batch's rows ``[2 P]``, between which they take
    turns."""
    return rows.reshape(-1, 2)


def measures(group: Sequence[Batch], sums: Sequence[np.ndarray], beta: float) -> dict[str, float]:
    """Means over the pairs of batches, by TRL's names: ``rewards/chosen`` and ``rewards/rejected``, ``beta`` times the
    distance from the reference; ``rewards/margins``, the one less the other; ``rewards/accuracies``, the share of the
    pairs whose margin is above 0; ``logps/chosen`` and ``logps/rejected``; and ``loss``.

    Args:
      group: batches, each with its reference.
      sums: float64 ``[2 P]`` of each: cross-entropies of the rows.
      beta: see ``dpo_loss``.
    """
    counts = [len(batch.rows) for batch in group]  # without what a batch is filled up with
    policy = pairs_of(np.concatenate([-found[:n] for found, n in zip(sums, counts, strict=True)]))
    kept = [np.asarray(batch.reference[:n], np.float64) for batch, n in zip(group, counts, strict=True)]
    reference = pairs_of(np.concatenate(kept))
    chosen, rejected = (beta * (policy - reference)).T
    found = {
        "loss": dpo_loss(policy, reference, beta, np),
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": chosen > rejected,
        "logps/chosen": policy[:, 0],
        "logps/rejected": policy[:, 1],
    }
    return {name: float(np.mean(values)) for name, values in found.items()}
