"""The logit lens (nostalgebraist 2020): what the model would say if it ended after each layer.

Run: python scripts/examples/logit_lens.py --output lens.svg
"""

import jax
import jax.numpy as jnp
import numpy as np
from picture import options, table

import llmjax

PROMPT = "The capital of France is the city of"


def main(argv: list[str] | None = None) -> tuple[np.ndarray, list[list[str]]]:
    """The most likely tokens' probabilities ``[L, T]`` after each layer, and the tokens."""
    parser = options(__doc__, "lens.svg")
    parser.add_argument("--prompt", default=PROMPT)
    args = parser.parse_args(argv)

    model = llmjax.load(args.model)
    ids = model.tokenizer.encode(args.prompt)
    trace = llmjax.trace(model, ids, "layers.*.resid")
    last = f"layers.{model.config.num_hidden_layers - 1}.resid"

    @jax.jit  # a layer's residual in the place of the last one's: final norm and head are all that is left to compute
    def lens(params, residual):
        return jax.nn.softmax(model.apply(params, jnp.array([ids]), interventions={last: residual})[0])

    probs = np.stack([np.asarray(lens(model.params, residual)) for residual in trace.activations.values()])
    best = probs.argmax(-1)
    tokens = [[model.tokenizer.decode([int(i)]) for i in row] for row in best]
    for name, row in zip(trace.activations, tokens, strict=True):
        print(f"{name:18} {row[-1]!r}")
    words = [model.tokenizer.decode([i]) for i in ids]
    table(args.output, f"The most likely next token after each layer: {args.prompt}", probs.max(-1),
          list(trace.activations), words, tokens)  # fmt: skip
    return probs.max(-1), tokens


if __name__ == "__main__":
    main()
