"""The steps of a model, which taps name, in the order of computation, and what each is computed from."""

import re
from collections.abc import Collection

# Within a layer.  "in" is what goes into it, "own" the layer's own input.  Of names with | between them the first that
# the layer has counts; one with ? counts where the layer has it; of another that it lacks, what that is computed from.
LAYER: dict[str, tuple[str, ...]] = {
    "altup.prediction": ("in",),
    "attn_norm": ("in", "altup.prediction?"),
    "laurel.left": ("attn_norm",),
    "laurel.right": ("laurel.left",),
    "laurel.norm": ("laurel.right",),
    "conv.enter": ("attn_norm",),
    "conv.convolved": ("conv.enter",),
    "conv.out": ("conv.convolved", "conv.enter"),
    "conv.leave": ("conv.out",),
    **{f"delta.{name}": ("attn_norm",) for name in ("qkv", "gate", "beta", "decay")},
    "delta.convolved": ("delta.qkv",),
    "delta.read": ("delta.convolved", "delta.beta", "delta.decay"),
    "delta.norm": ("delta.read",),
    "delta.out": ("delta.norm", "delta.gate"),
    "delta.o": ("delta.out",),
    "attn.q": ("attn_norm",),
    "attn.k": ("attn_norm",),
    "attn.v": ("attn_norm",),
    "attn.q_norm": ("attn.q",),
    "attn.k_norm": ("attn.k",),
    "attn.v_norm": ("attn.v|attn.k",),
    "attn.q_rot": ("attn.q_norm",),
    "attn.k_rot": ("attn.k_norm",),
    "attn.probs": ("attn.q_rot", "attn.k_rot"),
    "attn.out": ("attn.probs", "attn.v_norm|attn.v"),
    "attn.gated": ("attn.out", "attn.q"),
    "attn.o": ("attn.gated|attn.out",),
    "attn": ("attn.o",),
    "post_attn_norm": ("attn",),
    "resid_attn": ("in", "post_attn_norm|attn.o|conv.leave|delta.o", "laurel.norm?", "altup.prediction?"),
    "mlp_norm": ("resid_attn|in",),
    "mlp.gate": ("mlp_norm|attn_norm|resid_attn",),
    "mlp.up": ("mlp_norm|attn_norm|resid_attn",),
    "mlp.act": ("mlp.gate|mlp.up",),
    "mlp.down": ("mlp.act", "mlp.up"),
    "mlp": ("mlp.down",),
    "router": ("mlp_norm",),
    "router.project": ("resid_attn",),
    "router.weights": ("router.project",),
    "experts_norm": ("resid_attn",),
    "experts": ("experts_norm|mlp_norm", "router.weights|router"),
    "post_dense_norm": ("mlp",),
    "post_experts_norm": ("experts",),
    "post_mlp_norm": ("post_dense_norm|mlp", "post_experts_norm?"),
    "resid_mlp": ("resid_attn", "post_mlp_norm"),
    "altup.router_norm": ("resid_mlp",),
    "altup.router": ("altup.router_norm",),
    "altup.correction": ("altup.router",),
    "per_layer.gate": ("resid_mlp", "altup.correction?", "altup.prediction?"),
    "per_layer.act": ("per_layer.gate",),
    "per_layer.project": ("per_layer.act", "own"),
    "per_layer.norm": ("per_layer.project",),
    "streams": ("in", "altup.prediction", "resid_mlp", "altup.correction", "per_layer.norm"),
    "resid": ("streams|resid_mlp|resid_attn", "per_layer.norm?", "post_mlp_norm|mlp.down|experts"),
}
# Before and after the layers.
_BEFORE = {"per_layer.embed": (), "per_layer.project": ("embed",), "per_layer.norm": ("per_layer.project",)}
# A module's output under the module's own name, as other runtimes dump it, too: in ours it is that of its last step.
OUTER = {"attn": "attn.o", "mlp": "mlp.down", "conv": "conv.leave", "delta": "delta.o"}
_ENDS = ("embed", "enter", "per_layer", "layers", "leave", "final_norm", "head", "logits")
_PLACE = {name: i for i, name in enumerate(LAYER)}


def split(tap: str) -> tuple[int | None, str]:
    """A tap's layer, None before and after the layers, and its name there."""
    if not tap.startswith("layers."):
        return None, tap
    _, layer, *rest = tap.split(".")
    return int(layer), ".".join(rest)


def order(tap: str) -> tuple[int, int, int, str]:
    """The key to sort taps by, in the order of computation."""
    layer, name = split(tap)
    first = "layers" if layer is not None else re.sub(r"_\d+$", "", name.split(".")[0])
    end = _ENDS.index(first) if first in _ENDS else len(_ENDS)
    return end, layer or 0, _PLACE.get(name, len(_PLACE)), name


def segment(tap: str, taps: Collection[str], dumped: Collection[str], layers: int) -> list[str]:
    """The steps that lie between a tap and the dumped ones it is computed from, itself included, in order.

    Args:
      tap: one of the model's.
      taps: all the model has.
      dumped: those whose values are known.
      layers: L.
    """
    found: set[str] = set()

    def add(name: str) -> None:
        if name not in found:
            found.add(name)
            for source in sources(name, taps, layers):
                if source not in dumped:
                    add(source)

    add(tap)
    return sorted(found, key=order)


def sources(tap: str, taps: Collection[str], layers: int) -> list[str]:
    """What a step is computed from directly, of the model's taps."""
    layer, name = split(tap)
    if layer is None:
        return _of_an_end(name, taps, layers)
    prefix = f"layers.{layer}."
    found: list[str] = []
    for entry in LAYER.get(name, ("in",)):
        options = entry.rstrip("?").split("|")
        option = next((o for o in options if prefix + o in taps), options[-1])
        if option == "in":
            found += _leaving(layer - 1, taps) if layer else _entering(taps)
        elif option == "own":
            found += [tap for tap in ("per_layer.norm", "per_layer.embed") if tap in taps]
        elif prefix + option in taps:
            found.append(prefix + option)
        elif not entry.endswith("?"):
            found += sources(prefix + option, taps, layers)
    return found


def _of_an_end(name: str, taps: Collection[str], layers: int) -> list[str]:
    leaving = _leaving(layers - 1, taps)
    found = {"final_norm": [*(tap for tap in taps if tap.startswith("leave_")), *leaving], "head": ["final_norm"],
             "logits": ["head"]} | {end: list(before) for end, before in _BEFORE.items()}  # fmt: skip
    return found.get(name, ["embed"] if name.startswith("enter_") else leaving if name.startswith("leave_") else [])


def _entering(taps: Collection[str]) -> list[str]:
    return ["embed", *(tap for tap in taps if tap.startswith("enter_"))]


def _leaving(layer: int, taps: Collection[str]) -> list[str]:
    """What a layer hands on: its streams, of which the residual is one, or that."""
    return [tap for tap in (f"layers.{layer}.streams", f"layers.{layer}.resid") if tap in taps]


def common(names: Collection[str]) -> str:
    """The module that all of these steps lie in: the beginning of their names."""
    parts = [name.split(".") for name in names]
    shared = []
    for same in zip(*parts, strict=False):
        if len(set(same)) > 1:
            break
        shared.append(same[0])
    return ".".join(shared) if shared != ["layers"] else ""
