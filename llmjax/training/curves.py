"""Pictures of a run: the loss over its steps, as a PNG and as an HTML page that needs nothing else."""

import html
import importlib.util
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmjax.errors import printable
from llmjax.outside.whole import write_whole

PNG, HTML = "loss.png", "loss.html"
# Of the page's picture, in its own units.
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 860, 360, 64, 40, 16
_COLORS = {"loss": "#9db8d9", "smoothed": "#1f5fa8", "eval_loss": "#c4501b", "accuracy": "#3f8f4f"}
_NAMES = {"loss": "loss of each step", "smoothed": "loss, smoothed", "eval_loss": "loss of rows for evaluation",
          "accuracy": "share of pairs with a margin above 0, smoothed"}  # fmt: skip

Line = list[tuple[float, float]]


def write(folder: Path, metrics: Sequence[dict[str, Any]], title: str) -> str | None:
    """Writes both; says what to install where the PNG cannot be made.

    Args:
      folder: where to.
      metrics: what ``metrics.jsonl`` holds.
      title: of the pictures.
    """
    if not metrics:
        return None
    lines = curves(metrics)
    write_whole(folder / HTML, [page(lines, metrics, printable(title)).encode()])
    if importlib.util.find_spec("matplotlib") is None:
        return f"{folder / PNG}: not drawn: pip install 'llmjax[plots]'; {HTML} has the same curves"
    write_whole(folder / PNG, [_png(lines, printable(title), _what(metrics))])
    return None


def curves(metrics: Sequence[dict[str, Any]]) -> dict[str, Line]:
    """Loss of each step, its running mean, that of the rows for evaluation where there are any, and that of the
    accuracy of pairs."""
    loss, held_out, right = (
        [(float(m["step"]), float(m[name])) for m in metrics if name in m]
        for name in ("loss", "eval_loss", "rewards/accuracies")
    )
    found = {"loss": loss, "smoothed": _smoothed(loss), "eval_loss": held_out, "accuracy": _smoothed(right)}
    return {name: line for name, line in found.items() if line}


def _smoothed(line: Line) -> Line:
    keep = 1 - 1 / max(1.0, min(50.0, len(line) / 10))
    smoothed: Line = []
    total = weight = 0.0
    for step, value in line:
        total, weight = keep * total + value, keep * weight + 1  # a mean from the first step on
        smoothed.append((step, total / weight))
    return smoothed


def _what(metrics: Sequence[dict[str, Any]]) -> str:
    """What the loss is the mean over."""
    return "pairs" if "rewards/accuracies" in metrics[0] else "learned tokens"


def _png(lines: dict[str, Line], title: str, what: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, line in lines.items():
        axes.plot(
            *zip(*line, strict=True),
            color=_COLORS[name],
            label=_NAMES[name],
            linewidth=1 if name == "loss" else 2,
            marker="o" if name == "eval_loss" or len(line) == 1 else None,
            markersize=4,
        )
    axes.set(xlabel="step", ylabel=f"loss, mean over {what}")
    axes.set_title(Path(title).name, parse_math=False)  # a dollar is one
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    found = io.BytesIO()
    figure.savefig(found, format="png")
    return found.getvalue()


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two."""
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    size = next(power * n for n in (1, 2, 5, 10) if power * n >= rough)
    return [i * size for i in range(math.ceil(low / size), math.floor(high / size) + 1)]


def page(lines: dict[str, Line], metrics: Sequence[dict[str, Any]], title: str) -> str:
    """The page: one picture, and the last step's numbers."""
    points = [point for line in lines.values() for point in line]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    last, margin = max(last, first + 1), 0.05 * (high - low) or 0.5
    low, high = low - margin, high + margin

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - first) / (last - first) * (_WIDTH - _LEFT - 12)
        return across, _TOP + (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for y in _ticks(low, high, 6):
        _, down = place(first, y)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - 12}" y1="{down:.1f}" y2="{down:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{down + 4:.1f}" text-anchor="end">{y:.6g}</text>')
    for x in (x for x in _ticks(first, last, 8) if x == int(x)):
        across, _ = place(x, low)
        parts.append(f'<text x="{across:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{x:.0f}</text>')
    for name, line in lines.items():
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(*point) for point in line))
        width = 1 if name == "loss" else 2
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_COLORS[name]}" stroke-width="{width}"/>')
        if name == "eval_loss" or len(line) == 1:
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{_COLORS[name]}"><title>step {x:.0f}: {y:.5g}'
                      f"</title></circle>" for x, y in line for a, b in [place(x, y)]]  # fmt: skip
    keys = "".join(f'<span><i style="background:{_COLORS[n]}"></i>{_NAMES[n]}</span>' for n in lines)
    rows = "".join(
        f"<tr><th>{html.escape(k)}</th><td>{html.escape(_number(v))}</td></tr>" for k, v in metrics[-1].items()
    )
    data = json.dumps(list(metrics)).replace("<", r"\u003c")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 900px; color: #222; padding: 0 1rem }}
svg {{ width: 100%; height: auto }}
svg text {{ font: 12px system-ui, sans-serif; fill: #555 }}
.grid {{ stroke: #e4e4e4 }}
span {{ margin-right: 1.5rem }}
i {{ display: inline-block; width: 1.2rem; height: 3px; margin-right: .4rem; vertical-align: middle }}
th {{ text-align: left; font-weight: normal; color: #555; padding-right: 1.5rem }}
td {{ text-align: right; font-variant-numeric: tabular-nums }}
</style></head><body>
<h1>{html.escape(Path(title).name)}</h1>
<p>Loss over steps, each the mean over its {_what(metrics)}. {keys}</p>
<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="loss over steps">{"".join(parts)}</svg>
<table>{rows}</table>
<script type="application/json" id="metrics">{data}</script>
</body></html>
"""


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)
