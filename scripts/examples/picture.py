"""What the examples share: their pictures, as SVG (a table of colours, or bars), and the options all have."""

import argparse
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

CELL, LEFT, TOP = 26, 150, 56
STYLE = "text{font:12px system-ui,sans-serif;fill:#333}.t{font-size:15px}.e{text-anchor:end}.m{text-anchor:middle}"


def options(doc: str | None, output: str) -> argparse.ArgumentParser:
    """Which model, and where the picture goes."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--output", default=output)
    return parser


def colour(share: float) -> str:
    """From blue at -1 over white to red at 1."""
    fade = round(255 * (1 - min(1.0, abs(share))))
    return f"rgb(255,{fade},{fade})" if share >= 0 else f"rgb({fade},{fade},255)"


def save(path: str | Path, title: str, width: int, height: int, parts: Sequence[str]) -> None:
    """Writes the file."""
    width = max(width, 32 + 8 * len(title))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">'
    body = f'<rect width="100%" height="100%" fill="#fff"/><text class="t" x="16" y="26">{escape(title)}</text>'
    Path(path).write_text(f"{head}<style>{STYLE}</style>{body}{''.join(parts)}</svg>\n", encoding="utf-8")


def table(
    path: str | Path,
    title: str,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    texts: Sequence[Sequence[str]] | None = None,
) -> None:
    """Colours of ``values [rows, columns]``, the strongest at the largest; with texts in wider cells."""
    cell, most = 80 if texts else CELL, float(np.abs(values).max()) or 1.0
    parts = []
    for j, name in enumerate(columns):
        parts.append(f'<text class="m" x="{LEFT + (j + 0.5) * cell}" y="{TOP - 8}">{escape(name)}</text>')
    for i, name in enumerate(rows):
        y = TOP + i * CELL
        parts.append(f'<text class="e" x="{LEFT - 8}" y="{y + 17}">{escape(name)}</text>')
        for j, value in enumerate(values[i]):
            x, fill = LEFT + j * cell, colour(float(value) / most)
            parts.append(f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{CELL - 1}" fill="{fill}"/>')
            if texts:
                shown = texts[i][j].strip()[:10] or "␣"
                parts.append(f'<text class="m" x="{x + cell / 2}" y="{y + 17}">{escape(shown)}</text>')
    end = TOP + len(rows) * CELL
    parts.append(f'<text x="16" y="{end + 24}">the strongest colour is {most:.3g}; red above 0, blue below</text>')
    save(path, title, max(LEFT + len(columns) * cell + 16, 640), end + 40, parts)


def bars(path: str | Path, title: str, values: Sequence[float], labels: Sequence[str]) -> None:
    """A bar for each value, from 0."""
    low, high = min(0.0, *values), max(0.0, *values)
    scale = 360 / ((high - low) or 1.0)
    parts = []
    for i, (value, label) in enumerate(zip(values, labels, strict=True)):
        y, zero = TOP + i * CELL, LEFT + 60 - low * scale
        x = zero + min(value, 0) * scale
        parts.append(f'<text class="e" x="{LEFT}" y="{y + 17}">{escape(label)}</text>')
        parts.append(f'<rect x="{x}" y="{y}" width="{abs(value) * scale}" height="{CELL - 6}" '
                     f'fill="{"#c44" if value < 0 else "#48c"}"/>')  # fmt: skip
        edge, side = (x - 4, "e") if value < 0 else (x + value * scale + 4, "")
        parts.append(f'<text class="{side}" x="{edge}" y="{y + 15}">{value:.3g}</text>')
    save(path, title, 680, TOP + len(values) * CELL + 16, parts)
