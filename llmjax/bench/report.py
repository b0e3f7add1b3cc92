"""A benchmark's report as a table."""

from collections.abc import Sequence

from llmjax.bench.measure import BenchReport, Measured, Spread
from llmjax.errors import amount

_HEAD = (
    *("phase", "tokens", "new", "cache", "slots", "tok/s", "min-max", "GB/s", "GFLOP/s", "of limit", "bound by"),
    *("first token ms", "compile s"),
)


def to_text(report: BenchReport) -> str:
    """What was measured on, the machine's peaks, and a line for each setting."""
    model, runtime = report.model, report.runtime
    device = runtime["cpu"] if runtime["platform"] == "cpu" else runtime["device"]
    memory = "reads" if runtime["platform"] == "cpu" else "copies"
    peak = "unknown" if report.peak_bytes is None else _gb(report.peak_bytes)
    facts = [
        ("model", f"{model['model']}, {model['parameters'] / 1e6:,.1f} million parameters"),
        ("weights", f"{', '.join(model['stored'])}, {_gb(model['weight_bytes'])}; numerics {model['numerics']}"),
        ("device", f"{device} ({runtime['platform']}); jax {runtime['versions']['jax']}"),
        ("engine", f"{amount(report.slots, 'slot')}, prefill in chunks of {report.chunk}"),
        ("load", f"{report.load_seconds:.2f} s; compile {report.compile_seconds:.2f} s; peak memory {peak}"),
        (memory, f"{_spread(report.read_bytes_per_second, 1e9)} GB/s"),
    ]
    for dtype, rate in report.matmul_flops_per_second.items():
        facts.append((f"{dtype} products", f"{_spread(rate, 1e9)} GFLOP/s"))
    width = max(len(name) for name, _ in facts)
    lines = [f"{name:{width}}  {value}" for name, value in facts]
    return "\n".join([*lines, "", *columns_of([_HEAD, *map(_cells, report.settings)])])


def _cells(m: Measured) -> tuple[str, ...]:
    rate, first = m.tokens_per_second, m.first_token_seconds
    return (
        m.phase,
        str(m.tokens),
        str(m.new or "-"),
        str(m.cache),
        str(m.in_use),
        _number(rate.median),
        f"{_number(rate.min)}-{_number(rate.max)}",
        f"{m.bytes_per_second / 1e9:.1f}",
        _number(m.flops_per_second / 1e9),
        f"{m.of_limit:.0%}",
        m.bound,
        "-" if first is None else _number(1e3 * first.median),
        f"{m.compile_seconds:.2f}",
    )


def columns_of(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of equal columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]


def _number(value: float) -> str:
    """Three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _spread(spread: Spread, unit: float) -> str:
    return f"{_number(spread.median / unit)} ({_number(spread.min / unit)}-{_number(spread.max / unit)})"


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
