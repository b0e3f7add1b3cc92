"""Which heads matter: each is silenced in turn, and the loss on a text that repeats itself is what it costs.

Heads that copy from an earlier repetition stand out (Olsson et al. 2022, arXiv:2209.11895).

Run: python scripts/examples/head_ablation.py --output heads.svg
"""

import jax
import jax.numpy as jnp
import numpy as np
from picture import options, table

import llmjax

TEXT = "Four blue birds sat on a quiet stone wall near the lake."


def main(argv: list[str] | None = None) -> np.ndarray:
    """float32 ``[L, N]``: how the mean loss on the second repetition grows without each head."""
    args = options(__doc__, "heads.svg").parse_args(argv)

    model = llmjax.load(args.model)
    layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    once = model.tokenizer.encode(TEXT)
    ids = jnp.array([once + once])

    @jax.jit
    def loss(params, kept):  # [L, N], 0 for a head that is silent
        def silenced(layer):
            def change(x):  # [B, T, N * H]: all heads, before the projection o
                return (x.reshape(*x.shape[:2], heads, -1) * kept[layer, :, None].astype(x.dtype)).reshape(x.shape)

            return change

        changes = {f"layers.{layer}.attn.out": silenced(layer) for layer in range(layers)}
        log_probs = jax.nn.log_softmax(model.apply(params, ids[:, :-1], interventions=changes))
        found = -jnp.take_along_axis(log_probs, ids[:, 1:, None], -1)[0, :, 0]
        return found[len(once) :].mean()

    every = np.ones((layers, heads), np.float32)
    whole = float(loss(model.params, every))
    cost = np.zeros_like(every)
    for layer, head in np.ndindex(layers, heads):
        kept = every.copy()
        kept[layer, head] = 0
        cost[layer, head] = float(loss(model.params, kept)) - whole
    for place in np.argsort(cost, axis=None)[::-1][:5]:
        layer, head = np.unravel_index(place, cost.shape)
        print(f"layer {layer}, head {head}: loss {whole:.3f} -> {whole + cost[layer, head]:.3f}")
    table(args.output, f"Loss on a repetition without a head (with all {whole:.3f})", cost,
          [f"layer {i}" for i in range(layers)], [str(i) for i in range(heads)])  # fmt: skip
    return cost


if __name__ == "__main__":
    main()
