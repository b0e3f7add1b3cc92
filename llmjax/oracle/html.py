"""A comparison as one HTML page that needs nothing else: no network, no script, light and dark."""

import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmjax.oracle.report import coverage, label, value
from llmjax.oracle.steps import split

if TYPE_CHECKING:
    from llmjax.oracle.comparison import Comparison

_STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1c1f23; --dim: #667; --line: #dde; --card: #f6f7f9;
  --good: #157347; --bad: #b3261e; --warn: #8a6100; --cell: 38, 92, 190; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171a; --fg: #e6e8ea; --dim: #9aa3ad; --line: #2c3238;
  --card: #1c2126; --good: #5fd39b; --bad: #ff8a80; --warn: #e6b655; --cell: 120, 170, 255; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 24px 16px 64px; background: var(--bg);
  color: var(--fg); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2.2em 0 .5em; }
code, pre, td.n, .mono { font-family: ui-monospace, monospace; font-size: .88em; }
pre { background: var(--card); padding: 10px 12px; border-radius: 8px; overflow-x: auto; }
.card { background: var(--card); border-radius: 10px; padding: 14px 18px; margin: 12px 0;
  border-left: 5px solid var(--dim); }
.good { border-color: var(--good); } .bad { border-color: var(--bad); } .warn { border-color: var(--warn); }
.good h1 { color: var(--good); } .bad h1 { color: var(--bad); } .warn h1 { color: var(--warn); }
.dim { color: var(--dim); } .scroll { overflow-x: auto; overflow-wrap: normal; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 8px; }
.facts div { background: var(--card); border-radius: 8px; padding: 8px 12px; }
.facts b { display: block; font-size: 1.05em; font-family: ui-monospace, monospace; }
table { border-collapse: collapse; min-width: 100%; } th { text-align: left; font-weight: 600; }
td, th { padding: 3px 8px; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; }
svg text { fill: var(--dim); font: 10px system-ui, sans-serif; } svg { display: block; }
.bar { display: inline-block; width: 90px; height: 8px; border-radius: 4px; background: var(--line);
  margin-right: 8px; }
.bar i { display: block; height: 100%; border-radius: 4px; background: var(--good); }
"""
_TONE = {"identical": "good", "equivalent": "good", "different": "bad", "not_comparable": "warn"}
# Columns of the token map, at most: more tokens than this share one, which shows the worst.
_COLUMNS = 160


def page(report: "Comparison") -> str:
    """The whole page."""
    parts = [_verdict(report)]
    if report.verdict != "not_comparable":
        parts += [*_texts(report), *_logits(report), *_faults(report), *_strip(report)]
        parts += [*_token_map(report), *_positions(report)]
        parts += _taps(report)
    parts += _reproduce(report)
    title = f"llmjax compare: {report.verdict}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_e(title)}</title><style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _e(text: Any) -> str:
    return html.escape(str(text))


def _verdict(report: "Comparison") -> str:
    by = f' <span class="dim">explained by {_e(report.explained_by)}</span>' if report.explained_by else ""
    first = report.first_divergence
    begins = (
        f"<p>First divergence: <code>{_e(first['tap'])}</code> at token {first['token']}, error {first['error']:.1e}, "
        f"floor {first['floor']:.1e}</p>"
        if first
        else ""
    )
    return (
        f'<div class="card {_TONE[report.verdict]}"><h1>{_e(report.verdict.replace("_", " "))}{by}</h1>'
        f'<p>{_e(report.reason)}</p>{begins}<p class="dim">{_e(coverage(report))}</p></div>'
    )


def _texts(report: "Comparison") -> Iterator[str]:
    if verdicts := report.subject.get("verdicts"):
        cells = "".join(f"<div>{_e(name)}<b>{_e(verdict)}</b></div>" for name, verdict in verdicts.items())
        yield f'<h2>Texts</h2><div class="facts">{cells}</div>'


def _logits(report: "Comparison") -> Iterator[str]:
    if report.logits:
        cells = "".join(f"<div>{_e(name)}<b>{_e(value(x))}</b></div>" for name, x in report.logits.items())
        yield f'<h2>Logits</h2><div class="facts">{cells}</div>'


def _faults(report: "Comparison") -> Iterator[str]:
    if not report.faults:
        return
    yield "<h2>Faults, proven by patching</h2>"
    for number, fault in enumerate(report.faults, 1):
        causes = "".join(
            f'<div><span class="bar"><i style="width:{100 * c["explains"]:.0f}%"></i></span>'
            f'<b>{_e(c["cause"])}</b> {_e(c["detail"])} <span class="dim">explains {c["explains"]:.0%}</span></div>'
            for c in fault["causes"]
        )
        if fault["tried"][0] < fault["tried"][1]:
            causes += '<p class="dim">{} of {} causes tried</p>'.format(*fault["tried"])
        also = f'<p class="dim">Takes along: {_e(", ".join(fault["also"]))}</p>' if fault["also"] else ""
        yield (
            f'<div class="card bad"><b>{number}. <code>{_e(fault["module"])}</code></b><p>{_e(fault["proof"])}.</p>'
            f"{causes}{also}</div>"
        )


def _strip(report: "Comparison") -> Iterator[str]:
    """Each layer's taps against their floors: a mark a tap, on a logarithmic scale, in the order of computation."""
    taps = report.taps
    if not taps:
        return
    step, height, left = max(4.0, min(14.0, 1000 / len(taps))), 150, 40
    width = left + step * len(taps) + 10
    small = 1e-8
    found = [x for t in taps for x in (t["error"], t["floor"]) if x > 0]
    low, high = (
        math.floor(math.log10(max(small, min(found, default=small)))),
        math.ceil(math.log10(max([1e-7, *found]))),
    )

    def y(x: float) -> float:
        return 8 + (height - 8) * (high - math.log10(max(x, 10.0**low))) / max(1, high - low)

    marks = []
    for power in range(low, high + 1, max(1, (high - low) // 5)):
        marks.append(
            f'<line x1="{left}" x2="{width:.0f}" y1="{y(10.0**power):.1f}" y2="{y(10.0**power):.1f}" '
            'stroke="var(--line)"/>'
        )
        marks.append(f'<text x="2" y="{y(10.0**power) + 3:.1f}">1e{power}</text>')
    last = None
    for i, tap in enumerate(taps):
        x = left + step * i
        tone = "bad" if tap["error"] > tap["floor"] else "good"
        tip = f"{tap['name']}: error {tap['error']:.1e}, floor {tap['floor']:.1e}"
        marks.append(
            f'<g><title>{_e(tip)}</title><rect x="{x:.1f}" y="{y(tap["floor"]):.1f}" width="{step - 1:.1f}" '
            f'height="2" fill="var(--dim)"/><rect x="{x:.1f}" y="{y(tap["error"]):.1f}" width="{step - 1:.1f}" '
            f'height="{max(2.0, height - y(tap["error"])):.1f}" fill="var(--{tone})" '
            'opacity=".75"/></g>'
        )
        layer = split(tap["name"])[0]
        if layer != last and layer is not None and (layer % max(1, round(40 / (step * 15))) == 0):
            marks.append(f'<text x="{x:.1f}" y="{height + 14}">{layer}</text>')
        last = layer
    yield "<h2>Every step against its floor</h2>"
    yield '<p class="dim">Bars: error of each tap, in the order of computation; lines: what arithmetic explains.</p>'
    yield (
        f'<div class="scroll"><svg role="img" aria-label="errors and floors of every tap" width="{width:.0f}" '
        f'height="{height + 20}">{"".join(marks)}</svg></div>'
    )


def _token_map(report: "Comparison") -> Iterator[str]:
    """Tokens across, layers down; the stronger, the larger the error of what leaves the layer."""
    rows = report.map
    largest = max((max(row) for row in rows.values()), default=0.0)
    if largest == 0:  # nothing to be seen
        return
    tokens = len(next(iter(rows.values())))
    per = math.ceil(tokens / _COLUMNS)
    columns = math.ceil(tokens / per)
    size = max(6.0, min(16.0, 960 / columns))
    tall, left = 14, 90
    cells = []
    for j, (name, row) in enumerate(rows.items()):
        cells.append(f'<text x="0" y="{j * tall + 10}">{_e(name.removesuffix(".resid"))}</text>')
        for i in range(columns):
            worst = max(row[i * per : (i + 1) * per])
            shade = 0.0 if worst <= 0 else max(0.04, 1 + math.log10(max(worst, 1e-8) / max(largest, 1e-8)) / 6)
            cells.append(
                f'<rect x="{left + i * size:.1f}" y="{j * tall}" width="{size - 0.5:.1f}" height="{tall - 1}" '
                f'fill="rgba(var(--cell), {shade:.2f})"><title>{_e(name)}, token {i * per}: {worst:.1e}</title></rect>'
            )
    of = f" of {label(report.subject['text'])}" if "text" in report.subject else ""
    yield f"<h2>Tokens and layers{_e(of)}</h2>"
    yield f'<p class="dim">Error of each token as it leaves each layer, on a logarithmic scale up to {largest:.1e}.</p>'
    yield (
        '<div class="scroll"><svg role="img" aria-label="errors by token and layer" '
        f'width="{left + columns * size + 4:.0f}" '
        f'height="{len(rows) * tall + 4}">{"".join(cells)}</svg></div>'
    )


def _positions(report: "Comparison") -> Iterator[str]:
    if not report.positions:
        return

    def place(p: Mapping[str, Any]) -> str:
        return f"{label(p['text'])}, {p['position']}" if "text" in p else str(p["position"])

    def tokens(best: Sequence[Sequence[float]]) -> str:
        return ", ".join(f"{int(i)} ({p:.3f})" for i, p in best)

    rows = "".join(
        f'<tr><td class="n">{place(p)}</td><td class="n">{p["kl"]:.2e}</td><td class="n">{p["margin"]:.3g}</td>'
        f"<td>{tokens(p['ours'])}</td><td>{tokens(p['theirs'])}</td></tr>"
        for p in report.positions
    )
    yield "<h2>Where the logits differ most</h2>"
    yield (
        '<div class="scroll"><table><tr><th class="n">position</th><th class="n">KL</th><th class="n">margin</th>'
        f"<th>the reference's best (log-prob)</th><th>the candidate's</th></tr>{rows}</table></div>"
    )


def _taps(report: "Comparison") -> Iterator[str]:
    keys = ("error", "error_narrowed", "floor", "token", "channel")

    def row(tap: Mapping[str, Any]) -> str:
        style = ' style="color:var(--bad)"' if tap["error"] > tap["floor"] else ""
        numbers = "".join(
            f'<td class="n">{tap[k] if isinstance(tap[k], int) else format(tap[k], ".1e")}</td>' for k in keys
        )
        return f'<tr{style}><td class="mono">{_e(tap["name"])}</td>{numbers}</tr>'

    head = "".join(f'<th class="n">{k.replace("_", " ")}</th>' for k in keys)
    rows = "".join(map(row, report.taps))
    yield f"<h2>All taps</h2><details><summary>{len(report.taps)} taps in the order of computation</summary>"
    yield f'<div class="scroll"><table><tr><th>tap</th>{head}</tr>{rows}</table></div></details>'


def _reproduce(report: "Comparison") -> Iterator[str]:
    found = report.subject
    yield "<h2>To reproduce</h2>"
    if "command" in found:
        yield f"<pre>{_e(found['command'])}</pre>"
    yield f"<pre>{_e(json.dumps(found.get('declared', {}), indent=1))}</pre>"
    ids = found.get("token_ids", [])
    shown = ", ".join(map(str, ids[:64])) + (" ..." if len(ids) > 64 else "")
    of = f" of {label(found['text'])}" if "text" in found else ""
    yield f'<p class="dim mono">token ids{_e(of)} ({len(ids)}): {_e(shown)}</p>'
