"""An attention of one's own: a short window, with and without the first tokens as sinks (arXiv:2309.17453).

Run: python scripts/examples/own_attention.py --output attention.svg
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from picture import bars, options

import llmjax
from llmjax.models.context import Context, tap
from llmjax.models.layers import ACTIVATIONS, GatedMLP, Projection, RMSNorm
from llmjax.models.llama import LlamaConfig

TEXT = "The sun rises in the east and sets in the west. Every morning people wake up, eat and go to work. "


@dataclasses.dataclass(frozen=True)
class Config(LlamaConfig):
    """Llama's, with a window in tokens and how many of the first are always seen."""

    seen: int = 0
    sinks: int = 0

    def block(self, layer: int) -> nn.Module:
        return Block(self, name=f"layers_{layer}")


class Block(nn.Module):
    """Llama's, but for what a token may see; without a cache, for ``apply`` and ``logits``."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        x = x + Attention(c, name="attn")(RMSNorm(c.rms_norm_eps, name="attn_norm")(x), ctx)
        mlp = GatedMLP(c.intermediate_size, ACTIVATIONS[c.hidden_act], name="mlp")
        return tap(self, "resid", x + mlp(RMSNorm(c.rms_norm_eps, name="mlp_norm")(x), ctx))


class Attention(nn.Module):
    """``[B, T, D] -> [B, T, D]``."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, ctx: Context) -> jax.Array:
        c = self.config
        kv, group = c.num_key_value_heads * c.head_dim, c.num_attention_heads // c.num_key_value_heads
        q, k, v = (Projection(w, name=n)(x, ctx) for n, w in {"q": kv * group, "k": kv, "v": kv}.items())
        q, k, v = (y.reshape(*y.shape[:2], -1, c.head_dim) for y in (q, k, v))
        q, k, v = c.rope(q, ctx), jnp.repeat(c.rope(k, ctx), group, 2), jnp.repeat(v, group, 2)
        at, of = ctx.positions[:, None, :, None], ctx.positions[:, None, None, :]
        sees = (of <= at) & ((of > at - c.seen) | (of < c.sinks))
        scores = jnp.where(sees, jnp.einsum("BTNH,BSNH->BNTS", q, k) * c.head_dim**-0.5, -jnp.inf)
        out = jnp.einsum("BNTS,BSNH->BTNH", tap(self, "probs", jax.nn.softmax(scores)), v)
        return Projection(c.hidden_size, name="o")(out.reshape(*x.shape[:2], -1), ctx)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """The mean loss under each attention."""
    args = options(__doc__, "attention.svg").parse_args(argv)
    model, found = llmjax.load(args.model), {}
    ids = model.tokenizer.encode(TEXT * 3)
    for name, seen, sinks in (("all", len(ids), 0), ("window 16", 16, 0), ("window 12 + 4 sinks", 12, 4)):
        config = Config(**vars(model.config), seen=seen, sinks=sinks)
        logits = jax.nn.log_softmax(dataclasses.replace(model, config=config).logits([ids])[0])
        found[name] = -float(logits[jnp.arange(len(ids) - 1), jnp.array(ids[1:])].mean())
    print(found)
    bars(args.output, "Mean loss a token, by what attention sees", list(found.values()), list(found))
    return found


if __name__ == "__main__":
    main()
