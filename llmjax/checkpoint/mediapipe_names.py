"""MediaPipe's tensor names, by role, written once for its six model types.

Source: the mappers of MediaPipe's converter (``tasks/python/genai/converter``) and files it wrote.
"""

from llmjax.models.names import From, Names

_LAYER = "params.lm.transformer.x_layers_{}."
_ATTENTION = {f"attn.{r}": f"self_attention.{name}" for r, name in zip("qkvo", ("q", "k", "v", "post"), strict=True)}
_MLP = {f"mlp.{r}": f"ff_layer.{name}" for r, name in (("up", "ffn_layer1"), ("down", "ffn_layer2"))}
_GATE = {"mlp.gate": "ff_layer.ffn_layer1_gate"}

_WEIGHT = {"weight": "w"}
_LINEAR = {"weight": "linear.w", "bias": "bias.b"}  # of modules that have biases
_NORM = {"weight": "scale"}


def names(model_type: str, backend: str) -> Names:
    """The table of MediaPipe's tensor names.

    Args:
      model_type: Hugging Face's name of the architecture.
      backend: ``cpu`` or ``gpu``: the norm before the MLP has another name in each, but for Gemma.
    """
    gemma = model_type.startswith("gemma")
    after = gemma or backend == "cpu"
    norms = {
        "attn_norm": "pre_layer_norm",
        "post_attn_norm": "post_layer_norm",
        "mlp_norm": "ff_layer.pre_layer_norm" if after else "post_layer_norm",
        "post_mlp_norm": "ff_layer.post_layer_norm",
    }
    linear = _LINEAR if model_type in ("phi", "falcon") else _WEIGHT
    table: dict[str, str | From] = {}
    for roles, endings in ((norms, _NORM), (_ATTENTION | _MLP | _GATE, linear)):
        for role, name in roles.items():
            table[f"layers.{{}}.{role}"] = From((_LAYER + name,), endings=endings)
    head = From(("params.lm.softmax.logits_ffn",), endings=_LINEAR if model_type == "phi" else _WEIGHT)
    embed = From(("params.lm.token_embedding",), endings=_WEIGHT)
    table |= {"embed": head if gemma else embed, "head": head}
    table["final_norm"] = From(("params.lm.final_ln",), endings=_NORM)
    return table
