"""A steering vector: what tells two texts apart is added to the residual stream (Turner et al. 2023, arXiv:2308.10248).

Run: python scripts/examples/steering_vector.py --output steering.svg
"""

import jax
import jax.numpy as jnp
from picture import bars, options

import llmjax

FOR, AGAINST = "I love this. It is wonderful and great", "I hate this. It is horrible and awful"
PROMPT, GOOD, BAD = "The new restaurant in town is", " good", " bad"


def main(argv: list[str] | None = None) -> list[float]:
    """How far ``GOOD`` is ahead of ``BAD``, in log-probability, for each strength."""
    parser = options(__doc__, "steering.svg")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--strengths", type=float, nargs="+", default=[-4, -2, -1, 0, 1, 2, 4])
    args = parser.parse_args(argv)

    model = llmjax.load(args.model)
    encode = model.tokenizer.encode
    tap = f"layers.{args.layer}.resid"
    love, hate = (trace.activations[tap].mean(0) for trace in llmjax.trace(model, [encode(FOR), encode(AGAINST)], tap))
    vector = jnp.asarray(love - hate)
    ids, good, bad = jnp.array([encode(PROMPT)]), encode(PROMPT + GOOD)[-1], encode(PROMPT + BAD)[-1]

    @jax.jit  # the strength is an argument: compiled once for all of them
    def ahead(params, strength):
        steer = {tap: lambda x: x + (strength * vector).astype(x.dtype)}
        log_probs = jax.nn.log_softmax(model.apply(params, ids, interventions=steer)[0, -1])
        return log_probs[good] - log_probs[bad]

    found = [float(ahead(model.params, s)) for s in args.strengths]
    for strength, value in zip(args.strengths, found, strict=True):
        print(f"{strength:5g} x: {value:+.3f}")
    bars(args.output, f"log p({GOOD!r}) - log p({BAD!r}) after {PROMPT!r}, steered at {tap}", found,
         [f"{s:g} x the vector" for s in args.strengths])  # fmt: skip
    return found


if __name__ == "__main__":
    main()
