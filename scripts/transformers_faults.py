"""Faults of transformers' modules, for `scripts/fault_table.py`."""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch


def layer(model: Any, i: int) -> Any:
    decoder = model.get_decoder()
    return (decoder.h if hasattr(decoder, "h") else decoder.layers)[i]


def attn(model: Any, i: int) -> Any:
    block = layer(model, i)
    return block.self_attn if hasattr(block, "self_attn") else block.self_attention


def scaled(get: Callable[[Any], Any], by: float = 1.1) -> Callable[[Any], None]:
    def fault(model: Any) -> None:
        get(model).weight.data *= by

    return fault


def no_bias(get: Callable[[Any], Any]) -> Callable[[Any], None]:
    return lambda model: get(model).bias.data.zero_()


def weight(get: Callable[[Any], Any], change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    def fault(model: Any) -> None:
        module = get(model)
        module.weight.data = change(module.weight.data.clone()).contiguous()

    return fault


def swapped(a: Callable[[Any], Any], b: Callable[[Any], Any]) -> Callable[[Any], None]:
    def fault(model: Any) -> None:
        x, y = a(model).weight, b(model).weight
        x.data, y.data = y.data.clone(), x.data.clone()

    return fault


def copied(a: Callable[[Any], Any], b: Callable[[Any], Any]) -> Callable[[Any], None]:
    def fault(model: Any) -> None:
        a(model).load_state_dict(b(model).state_dict())

    return fault


def attribute(get: Callable[[Any], Any], **changes: Any) -> Callable[[Any], None]:
    def fault(model: Any) -> None:
        for key, value in changes.items():
            setattr(get(model), key, value)

    return fault


def forward(get: Callable[[Any], Any], make: Callable[[Any], Any]) -> Callable[[Any], None]:
    def fault(model: Any) -> None:
        module = get(model)
        module.forward = make(module)

    return fault


def int8(w: torch.Tensor, bits: int = 8, group: int = 0) -> torch.Tensor:
    rows = w.reshape(-1, group) if group else w
    scale = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (torch.clamp(torch.round(rows / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale).reshape(w.shape)


def frequencies(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    def fault(model: Any) -> None:
        rotary = model.get_decoder().rotary_emb
        rotary.inv_freq = change(rotary.inv_freq.clone())

    return fault


def theta(base: float, width: int) -> Callable[[Any], None]:
    return frequencies(lambda f: 1 / base ** (torch.arange(0, width, 2, dtype=torch.float32) / width))


def coarse(name: str) -> Callable[[Any], None]:
    """Cosines and sines as a table of 16 bits."""
    dtype = getattr(torch, name)

    def make(rotary: Any) -> Any:
        right = rotary.forward
        return lambda x, position_ids: tuple(t.to(dtype).float() for t in right(x, position_ids))

    return forward(lambda m: m.get_decoder().rotary_emb, make)


def begin_at(place: int) -> Callable[[Any], None]:
    """Positions that begin elsewhere."""

    def make(rotary: Any) -> Any:
        right = rotary.forward
        return lambda x, position_ids: right(x, position_ids + place)

    return forward(lambda m: m.get_decoder().rotary_emb, make)


def rows(get: Callable[[Any], Any], to: list[int], of: list[int] | None) -> Callable[[Any], None]:
    """Rows of a weight from others of it; from the first, upside down, without any."""

    def fault(model: Any) -> None:
        w = get(model).weight.data
        w[to] = w[: len(to)].flip(1) if of is None else w[of].clone()

    return fault


def one_head(right: Any) -> Any:
    """The second query head meets the last key/value head."""

    def repeat(x: torch.Tensor, n: int) -> torch.Tensor:
        y = right(x, n).clone()
        y[:, 1] = x[:, -1]
        return y

    return repeat


def windowed(width: int) -> Callable[[Any], Any]:
    """Attention that sees no farther back than so many tokens."""

    def make(right: Any) -> Any:
        def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
            far = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(-width)
            return right(module, q, k, v, mask.masked_fill(far, -1e30), *args, **kwargs)

        return attend

    return make


def in_sequence(i: int) -> Callable[[Any], None]:
    """Gives a parallel block's MLP the norm of the sum that attention is in."""

    def fault(model: Any) -> None:
        block, seen = layer(model, i), {}
        norm = block.input_layernorm

        def normed(module: Any, args: Any) -> Any:
            x = seen["in"] + seen["attn"]
            return (torch.nn.functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps),)

        block.register_forward_pre_hook(lambda module, args: seen.update({"in": args[0]}))
        block.self_attn.register_forward_hook(lambda module, args, out: seen.update(attn=out[0]))
        block.mlp.register_forward_pre_hook(normed)

    return fault


def one_scale(w: torch.Tensor) -> torch.Tensor:
    """To 8 bits with one scale for all."""
    scale = w.abs().max() / 127
    return torch.round(w / scale) * scale


def more_bias(get: Callable[[Any], Any]) -> Callable[[Any], None]:
    def fault(model: Any) -> None:
        get(model).bias.data += torch.linspace(-0.05, 0.05, len(get(model).bias))

    return fault


def cache16(right: Any) -> Any:
    """Keys and values as a cache of float16 gives them."""

    def attend(module: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        return right(module, q, k.half().float(), v.half().float(), *args, **kwargs)

    return attend


def activation16(model: Any) -> None:
    """Activations of the MLPs by a table of float16."""
    for module in [m for m in model.modules() if hasattr(m, "act_fn")]:
        right = module.act_fn.forward
        module.act_fn.forward = lambda x, right=right: right(x.half().float()).half().float()


def plain_rms(module: Any, x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + module.eps) * module.weight


def hidden(get: Callable[[Any], Any], change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], None]:
    """Changes a module's output."""

    def fault(model: Any) -> None:
        get(model).register_forward_hook(lambda module, args, out: change(out))

    return fault


def patched(name: str, make: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Another function in the place of one of the model's file."""

    def fault(model: Any) -> None:
        source = sys.modules[type(model).__module__]
        right = getattr(source, name)
        model._restore = (source, name, right)
        setattr(source, name, make(right))

    return fault


def interleaved(right: Any) -> Any:
    def rotate(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        width = cos.shape[-1]
        to = torch.cat([torch.arange(0, width, 2), torch.arange(1, width, 2)])
        back = torch.argsort(to)
        q, k = right(q[..., to], k[..., to], cos, sin, *args, **kwargs)
        return q[..., back], k[..., back]

    return rotate


def both(*faults: Callable[[Any], None]) -> Callable[[Any], None]:
    def fault(model: Any) -> None:
        for one in faults:
            one(model)

    return fault


def q(i: int) -> Callable[[Any], Any]:
    return lambda m: attn(m, i).q_proj


def sub(i: int, path: str) -> Callable[[Any], Any]:
    return lambda m: layer(m, i).get_submodule(path)


def head(m: Any) -> Any:
    return m.lm_head


def drop_layer(i: int) -> Callable[[Any], None]:
    return forward(lambda m: layer(m, i), lambda module: lambda x, *args, **kwargs: x)


def swap_layers(i: int, j: int) -> Callable[[Any], None]:
    def fault(model: Any) -> None:
        a, b = layer(model, i), layer(model, j)
        a_state, b_state = copy.deepcopy(a.state_dict()), copy.deepcopy(b.state_dict())
        a.load_state_dict(b_state), b.load_state_dict(a_state)

    return fault


# (variant, function that breaks a model, modules it may be told as, words it may have)
THEIRS: dict[str, tuple[str, Callable[[Any], None], str, str]] = {
    "llama q scaled": ("llama", scaled(q(1)), "layers.1.attn.q", "weight"),
    "llama o transposed": ("llama_llama3", weight(sub(1, "self_attn.o_proj"), lambda w: w.T), "layers.1.attn.o", "weight_transposed"),
    "llama k of another layer": ("llama", copied(sub(2, "self_attn.k_proj"), sub(0, "self_attn.k_proj")), "layers.2.attn.k", "weight_swapped"),
    "llama k and v swapped": ("llama", swapped(sub(1, "self_attn.k_proj"), sub(1, "self_attn.v_proj")), "layers.1.attn.k", "weight_swapped"),
    "llama gate and up swapped": ("llama", swapped(sub(1, "mlp.gate_proj"), sub(1, "mlp.up_proj")), "layers.1.mlp.gate", "weight_swapped"),
    "llama down int8": ("llama", weight(sub(1, "mlp.down_proj"), int8), "layers.1.mlp.down", "quantization"),
    "llama down int4": ("llama", weight(sub(2, "mlp.down_proj"), lambda w: int8(w, 4)), "layers.2.mlp.down", "quantization"),
    "phi3 o int4 in groups of 32": ("phi3", weight(sub(1, "self_attn.o_proj"), lambda w: int8(w, 4, 32)), "layers.1.attn.o", "quantization"),
    "llama up bfloat16": ("llama", weight(sub(1, "mlp.up_proj"), lambda w: w.bfloat16().float()), "layers.1.mlp.up", "quantization"),
    "llama epsilon": ("llama", attribute(sub(1, "input_layernorm"), variance_epsilon=1e-3), "layers.1.attn_norm", "norm_eps"),
    "llama epsilon of the first norm, 1e-6": ("llama", attribute(sub(0, "input_layernorm"), variance_epsilon=1e-6), "layers.0.attn_norm", "norm_eps"),
    "llama norm takes the mean away": ("llama", forward(sub(1, "post_attention_layernorm"), lambda n: lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:], n.weight, None, n.variance_epsilon)), "layers.1.mlp_norm", "norm_kind"),
    "llama norm with 1 + w": ("llama", weight(sub(1, "input_layernorm"), lambda w: 1 + w), "layers.1.attn_norm", "norm_offset"),
    "llama norms swapped": ("llama", swapped(sub(1, "input_layernorm"), sub(1, "post_attention_layernorm")), "layers.1.attn_norm", "weight_swapped"),
    "llama rope base": ("llama", theta(5e5, 14), "layers.0.attn", "rope_theta"),
    "llama rope base 10500": ("llama", theta(10500, 14), "layers.0.attn", "rope_theta"),
    "llama rope base 10001": ("llama", theta(10001, 14), "layers.0.attn", "rope_theta"),
    "llama rope in bfloat16": ("llama", coarse("bfloat16"), "layers.0.attn", "precision"),
    "llama frequencies in bfloat16": ("llama", frequencies(lambda f: f.bfloat16().float()), "layers.0.attn", "precision"),
    "llama positions begin at 3": ("llama", begin_at(3), "layers.0.attn", "rope_positions"),
    "llama two rows of down swapped": ("llama", rows(sub(1, "mlp.down_proj"), [3, 4], [4, 3]), "layers.1.mlp.down", "weight_swapped"),
    "llama one row of q another": ("llama", rows(q(1), [5], None), "layers.1.attn.q", "weight"),
    "llama one head meets another": ("llama", patched("repeat_kv", one_head), "layers.0.attn", "head_mapping"),
    "qwen2 k bias another": ("qwen2", more_bias(sub(1, "self_attn.k_proj")), "layers.1.attn.k", "bias"),
    "llama neighbours rotate": ("llama", patched("apply_rotary_pos_emb", interleaved), "layers.0.attn", "rope_pairing"),
    "llama linear scaling ignored": ("llama_linear", theta(1e4, 14), "layers.0.attn", "rope_scaling"),
    "llama llama3 scaling ignored": ("llama_llama3", theta(5e5, 14), "layers.0.attn", "rope_scaling"),
    "llama no attention scale": ("llama", attribute(lambda m: attn(m, 1), scaling=1.0), "layers.1.attn", "attention_scale"),
    "llama attention scale of the model's width": ("llama", attribute(lambda m: attn(m, 2), scaling=56**-0.5), "layers.2.attn", "attention_scale"),
    "llama heads tiled": ("llama", patched("repeat_kv", lambda right: lambda x, n: x.repeat(1, n, 1, 1)), "layers.0.attn", "head_mapping"),
    "llama gelu": ("llama", attribute(sub(1, "mlp"), act_fn=torch.nn.GELU()), "layers.1.mlp.act", "activation"),
    "llama relu": ("llama", attribute(sub(0, "mlp"), act_fn=torch.nn.ReLU()), "layers.0.mlp.act", "activation"),
    "llama head is the table": ("llama", copied(head, lambda m: m.get_input_embeddings()), "head", "head"),
    "llama layers swapped": ("llama", swap_layers(1, 2), "layers.1", "layer_order"),
    "llama layer left out": ("llama", drop_layer(1), "layers.1", "layer_order"),
    "llama mlp doubled": ("llama", hidden(sub(1, "mlp"), lambda y: 2 * y), "layers.1.mlp", "residual|unknown|weight"),
    "llama attention dropped": ("llama", forward(lambda m: attn(m, 1), lambda a: lambda **k: (torch.zeros_like(k["hidden_states"]), None)), "layers.1", "residual|unknown|weight"),
    "llama o bias missing": ("llama_biases_tied", no_bias(sub(1, "self_attn.o_proj")), "layers.1.attn.o", "bias"),
    "llama gate bias missing": ("llama_biases_tied", no_bias(sub(1, "mlp.gate_proj")), "layers.1.mlp.gate", "bias"),
    "llama q and down": ("llama", both(scaled(q(0)), weight(sub(2, "mlp.down_proj"), int8)), "layers.0.attn.q", "weight"),
    "qwen2 k bias missing": ("qwen2", no_bias(sub(1, "self_attn.k_proj")), "layers.1.attn.k", "bias"),
    "qwen2 window ignored": ("qwen2_windows_untied", attribute(lambda m: m.config, layer_types=["full_attention"] * 4), "layers.1.attn", "window"),
    "qwen3 query norm missing": ("qwen3", forward(sub(1, "self_attn.q_norm"), lambda n: lambda x: x), "layers.1.attn.q_norm", "qk_norm"),
    "qwen3 key norm epsilon": ("qwen3", attribute(sub(2, "self_attn.k_norm"), variance_epsilon=1e-3), "layers.2.attn.k_norm", "norm_eps"),
    "mistral window off by one": ("mistral", attribute(lambda m: m.config, sliding_window=7), "layers.0.attn", "window"),
    "mistral no window": ("mistral", attribute(lambda m: m.config, sliding_window=None), "layers.0.attn", "window"),
    "gemma norm without 1": ("gemma_mqa", forward(sub(1, "input_layernorm"), lambda n: lambda x: plain_rms(n, x)), "layers.1.attn_norm", "norm_offset"),
    "gemma scale missing": ("gemma_mqa", attribute(lambda m: m.get_input_embeddings(), embed_scale=torch.tensor(1.0)), "embed", "embedding_scale"),
    "gemma scale in bfloat16": ("gemma_mqa", attribute(lambda m: m.get_input_embeddings(), embed_scale=torch.tensor(72**0.5).bfloat16().float()), "embed", "embedding_scale"),
    "gemma erf gelu": ("gemma_mqa", attribute(sub(1, "mlp"), act_fn=torch.nn.GELU()), "layers.1.mlp.act", "activation"),
    "gemma2 no soft-cap on scores": ("gemma2", attribute(lambda m: attn(m, 1), attn_logit_softcapping=None), "layers.1.attn", "attention_softcap"),
    "gemma2 no soft-cap on logits": ("gemma2", attribute(lambda m: m.config, final_logit_softcapping=None), "logits", "final_softcap"),
    "gemma2 scale of the head width": ("gemma2", attribute(lambda m: attn(m, 2), scaling=16**-0.5), "layers.2.attn", "attention_scale"),
    "gemma2 window off by one": ("gemma2", attribute(lambda m: m.config, sliding_window=9), "layers.0.attn", "window"),
    "gemma2 post norm missing": ("gemma2", forward(sub(2, "post_feedforward_layernorm"), lambda n: lambda x: x), "layers.2.post_mlp_norm", "norm_kind"),
    "gemma2 head scaled": ("gemma2", hidden(head, lambda y: 1.02 * y), "head", "weight"),
    "gemma3 query norm without 1": ("gemma3", forward(sub(1, "self_attn.q_norm"), lambda n: lambda x: plain_rms(n, x)), "layers.1.attn.q_norm", "norm_offset"),
    "phi head bias missing": ("phi", no_bias(head), "head", "bias"),
    "phi dense bias missing": ("phi", no_bias(sub(1, "self_attn.dense")), "layers.1.attn.o", "bias"),
    "phi erf gelu": ("phi", attribute(sub(1, "mlp"), activation_fn=torch.nn.GELU()), "layers.1.mlp.act", "activation"),
    "phi epsilon": ("phi", attribute(sub(1, "input_layernorm"), eps=1e-2), "layers.1.attn_norm", "norm_eps"),
    "phi norm's bias missing": ("phi", no_bias(sub(2, "input_layernorm")), "layers.2.attn_norm", "bias"),
    "phi norm takes no mean away": ("phi", forward(sub(1, "input_layernorm"), lambda n: lambda x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + n.eps) * n.weight + n.bias), "layers.1.attn_norm", "norm_kind"),
    "phi attention and MLP in sequence": ("phi", in_sequence(1), "layers.1.mlp", "residual"),
    "phi down in int8 with one scale": ("phi", weight(sub(1, "mlp.fc2"), one_scale), "layers.1.mlp.down", "quantization"),
    "phi window where there is none": ("phi", patched("eager_attention_forward", windowed(6)), "layers.0.attn", "window"),
    "phi rope base": ("phi", theta(1e6, 8), "layers.0.attn", "rope_theta"),
    "falcon tanh gelu": ("falcon_6_heads_no_bias", attribute(sub(1, "mlp"), act=torch.nn.GELU(approximate="tanh")), "layers.1.mlp.act", "activation"),
    "falcon dense scaled": ("falcon_7b", scaled(sub(1, "self_attention.dense"), 0.5), "layers.1.attn.o", "weight"),
    "falcon 40b norms swapped": ("falcon_40b", swapped(sub(1, "ln_attn"), sub(1, "ln_mlp")), "layers.1.attn_norm", "weight_swapped"),
    "falcon rope base": ("falcon_40b", theta(1e4, 10), "layers.0.attn", "rope_theta"),
    "stablelm rope base": ("stablelm", theta(1e6, 6), "layers.0.attn", "rope_theta"),
    "stablelm up transposed tensor of another layer": ("stablelm", copied(sub(0, "mlp.up_proj"), sub(2, "mlp.up_proj")), "layers.0.mlp.up", "weight_swapped"),
    "olmo2 post norm missing": ("olmo2", forward(sub(1, "post_attention_layernorm"), lambda n: lambda x: x), "layers.1.post_attn_norm", "norm_kind"),
    "granite no attention scale": ("granite", attribute(lambda m: attn(m, 1), scaling=1.0), "layers.1.attn", "attention_scale"),
    "granite q and down": ("granite", both(scaled(q(0)), weight(sub(1, "mlp.down_proj"), int8)), "layers.0.attn.q", "weight"),
    "qwen3_moe router scaled": ("qwen3_moe", scaled(sub(1, "mlp.gate")), "layers.1.router", "weight"),
    "lfm2 what enters a convolution scaled": ("lfm2", scaled(sub(0, "conv.in_proj")), "layers.0.conv.enter", "weight"),
    "lfm2 norm with 1 + w": ("lfm2", weight(sub(1, "operator_norm"), lambda w: 1 + w), "layers.1.attn_norm", "norm_offset"),
    "smollm3 up int4": ("smollm3", weight(sub(1, "mlp.up_proj"), lambda w: int8(w, 4)), "layers.1.mlp.up", "quantization"),
    "olmo3 post norm missing": ("olmo3_yarn", forward(sub(1, "post_attention_layernorm"), lambda n: lambda x: x), "layers.1.post_attn_norm", "norm_kind"),
    "gemma4 q scaled": ("gemma4_moe", scaled(sub(1, "self_attn.q_proj")), "layers.1.attn.q", "weight"),
    "phi3 fused gate and up swapped": ("phi3", weight(sub(1, "mlp.gate_up_proj"), lambda w: torch.cat(list(reversed(w.chunk(2))))), "layers.1.mlp.gate", "weight_swapped"),
}  # fmt: skip
