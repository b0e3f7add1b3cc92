"""The steps of a model, which taps name, in the order of computation, and what each is computed from."""

from collections.abc import Collection

# Within a layer; "in" is what goes into it.  Of names with | between them the first that the model has counts; of one
# it has not, what that one is computed from.
LAYER: dict[str, tuple[str, ...]] = {
    "attn_norm": ("in",),
    "attn.q": ("attn_norm",),
    "attn.k": ("attn_norm",),
    "attn.v": ("attn_norm",),
    "attn.q_norm": ("attn.q",),
    "attn.k_norm": ("attn.k",),
    "attn.v_norm": ("attn.v",),
    "attn.q_rot": ("attn.q_norm",),
    "attn.k_rot": ("attn.k_norm",),
    "attn.probs": ("attn.q_rot", "attn.k_rot"),
    "attn.out": ("attn.probs", "attn.v_norm"),
    "attn.o": ("attn.out",),
    "attn": ("attn.o",),
    "post_attn_norm": ("attn",),
    "resid_attn": ("in", "post_attn_norm"),
    "mlp_norm": ("resid_attn",),
    "mlp.gate": ("mlp_norm|attn_norm|resid_attn",),
    "mlp.up": ("mlp_norm|attn_norm|resid_attn",),
    "mlp.act": ("mlp.gate|mlp.up",),
    "mlp.down": ("mlp.act", "mlp.up"),
    "mlp": ("mlp.down",),
    "post_mlp_norm": ("mlp",),
    "resid": ("resid_attn", "post_mlp_norm"),
}
# A module's output under the module's own name, as other runtimes dump it, too: in ours it is that of its last step.
OUTER = {"attn": "attn.o", "mlp": "mlp.down"}
_ENDS = ("embed", "layers", "final_norm", "head", "logits")
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
    first = "layers" if layer is not None else name.split(".")[0]
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
        last = f"layers.{layers - 1}.resid"
        return {"final_norm": [last], "head": ["final_norm"], "logits": ["head"]}.get(name, [])
    prefix = f"layers.{layer}."
    found: list[str] = []
    for entry in LAYER.get(name, ("in",)):
        options = entry.split("|")
        option = next((o for o in options if prefix + o in taps), options[-1])
        if option == "in":
            found.append(f"layers.{layer - 1}.resid" if layer else "embed")
        elif prefix + option in taps:
            found.append(prefix + option)
        else:
            found += sources(prefix + option, taps, layers)
    return found


def common(names: Collection[str]) -> str:
    """The module that all of these steps lie in: the beginning of their names."""
    parts = [name.split(".") for name in names]
    shared = []
    for same in zip(*parts, strict=False):
        if len(set(same)) > 1:
            break
        shared.append(same[0])
    return ".".join(shared) if shared != ["layers"] else ""
