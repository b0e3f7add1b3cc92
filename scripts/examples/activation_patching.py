"""Activation patching: where a model keeps what tells two prompts apart (Meng et al. 2022, arXiv:2202.05262).

One activation at a time of the clean prompt takes its place in the run of the other; where the clean answer comes
back, the difference was there.

Run: python scripts/examples/activation_patching.py --output patching.svg
"""

import jax
import jax.numpy as jnp
import numpy as np
from picture import options, table

import llmjax

CLEAN, OTHER = "The capital of France is the city of", "The capital of Italy is the city of"
ANSWERS = [" Paris", " Rome"]


def main(argv: list[str] | None = None) -> np.ndarray:
    """``[L, T]``: the share of the clean answer that each residual brings back, 1 for all of it."""
    parser = options(__doc__, "patching.svg")
    parser.add_argument("--clean", default=CLEAN)
    parser.add_argument("--other", default=OTHER)
    parser.add_argument("--answers", nargs=2, default=ANSWERS)
    args = parser.parse_args(argv)

    model = llmjax.load(args.model)
    clean, other = (model.tokenizer.encode(text) for text in (args.clean, args.other))
    assert len(clean) == len(other), "the prompts must have as many tokens"
    right, wrong = (model.tokenizer.encode(args.clean + answer)[len(clean)] for answer in args.answers)
    kept = jnp.stack(list(llmjax.trace(model, clean, "layers.*.resid").activations.values()))  # [L, T, D]
    layers = len(kept)

    @jax.jit
    def ahead(params, ids, layer, position):  # one program for every place; layer -1 patches none
        def patch(i):
            return lambda x: jnp.where(i == layer, x.at[0, position].set(kept[i, position].astype(x.dtype)), x)

        logits = model.apply(params, ids[None], interventions={f"layers.{i}.resid": patch(i) for i in range(layers)})
        return logits[0, -1, right] - logits[0, -1, wrong]

    best, worst = (float(ahead(model.params, jnp.array(ids), -1, 0)) for ids in (clean, other))
    found = np.zeros((layers, len(clean)), np.float32)
    for layer, position in np.ndindex(*found.shape):
        found[layer, position] = float(ahead(model.params, jnp.array(other), layer, position))
    share = (found - worst) / (best - worst)
    words = [model.tokenizer.decode([i]) for i in other]
    print(f"{args.answers[0]!r} ahead of {args.answers[1]!r}: {best:+.2f} clean, {worst:+.2f} other")
    table(args.output, f"Share of {args.answers[0]!r} that one residual brings back", share,
          [f"layer {i}" for i in range(layers)], [w[:4] for w in words])  # fmt: skip
    return share


if __name__ == "__main__":
    main()
