"""A comparison as a page of text, and as JUnit's XML."""

from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from llmjax.errors import amount
from llmjax.oracle.patching import PROVEN

if TYPE_CHECKING:
    from llmjax.oracle.comparison import Comparison

_WORST = 12


def text(report: "Comparison") -> str:
    """Verdict, logits, the taps that are farthest from their floors, faults with proof and causes."""
    lines = [f"verdict: {report.verdict}" + (f" (explained by {report.explained_by})" if report.explained_by else "")]
    lines.append(f"  {report.reason}")
    if report.verdict == "not_comparable":
        return "\n".join(lines)
    lines.append(f"coverage: {coverage(report)}")
    if verdicts := report.subject.get("verdicts"):
        lines += ["texts:", *(f"  {name:22}{verdict}" for name, verdict in verdicts.items())]
    if report.logits:
        lines += ["logits:", *(f"  {name:22}{value(found)}" for name, found in report.logits.items())]
    if report.first_divergence:
        first = report.first_divergence
        lines.append(
            f"first divergence: {first['tap']} at token {first['token']}, error {first['error']:.2e}, "
            f"floor {first['floor']:.2e}"
        )
    for number, fault in enumerate(report.faults, 1):
        lines.append(f"fault {number}: {fault['module']}")
        lines.append(f"  {fault['proof']}")
        if fault["also"]:
            lines.append(f"  the same takes {', '.join(fault['also'])} along")
        lines += [f"  {c['cause']}: {c['detail']} (explains {c['explains']:.0%})" for c in fault["causes"]]
        if fault["tried"][0] < fault["tried"][1]:
            lines.append("  {} of {} causes tried (--search gives more time)".format(*fault["tried"]))
    worst = sorted(report.taps, key=lambda t: -t["error"] / t["floor"])[:_WORST]
    shown = [t for t in report.taps if t in worst]
    lines.append(f"taps nearest to or beyond their floors ({len(shown)} of {len(report.taps)}):")
    lines.append(f"  {'':28}{'error':>10}{'narrowed':>10}{'floor':>10}{'token':>7}{'channel':>9}")
    for tap in shown:
        mark = "!" if tap["error"] > tap["floor"] else " "
        lines.append(
            f"{mark} {tap['name']:28}{tap['error']:10.1e}{tap['error_narrowed']:10.1e}{tap['floor']:10.1e}"
            f"{tap['token']:7}{tap['channel']:9}"
        )
    return "\n".join([*lines, *_next(report)])


def _next(report: "Comparison") -> list[str]:
    """What to do now, of what is different."""
    if report.verdict != "different":
        return []
    if not report.faults:
        return ["next: compare with the model itself (--model), which says where it begins and why"]
    fault, best = report.faults[0], report.faults[0]["causes"][0]
    layer, missing = fault["tap"].rsplit(".", 1)[0], report.coverage["missing"]
    ends = [name for name in missing if name.endswith(".resid")]
    inside = [name for name in missing if layer.startswith("layers.") and name.startswith(f"{layer}.")]
    if best["explains"] >= PROVEN:
        what = f"look at {fault['module']} ({best['cause']}: {best['detail']}), and compare again without it"
    elif ends or inside:
        what = f"dump {'layers.*.resid' if ends else f'{layer}.*'} of the same token ids, and compare again"
    else:
        what = f"look at the weights and the formula of {fault['module']}: it was given the candidate's own input"
    return [f"next: {what}"]


def label(place: str | int) -> str:
    """What a text is called, by its folder or its place in a file."""
    return place if isinstance(place, str) else f"text {place}"


def coverage(report: "Comparison") -> str:
    """One line."""
    found = report.coverage
    percent = 100 * found["taps"] / max(1, found["of"])
    line = f"{found['taps']} of {found['of']} taps ({percent:.0f} %), {amount(found['tokens'], 'token')}"
    if "file" in found:
        line += f", {amount(found['positions'], 'position')}"
    if "texts" in found:
        line += ", {} of {} texts".format(*found["texts"])
    if "file" in found:
        line += f"; a file {found['file']}"
    for key, what in {"missing": "missing", "unknown": "unknown", "unmatched": "names of no array (--names)"}.items():
        names = found.get(key) or []
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            line += f"; {what}: {', '.join(names[:5])}{more}"
    return line + (f"; {found['note']}" if found.get("note") else "")


def value(found: Any) -> str:
    """A number, or a pair of them, as text."""
    if isinstance(found, (list, tuple)):
        return " / ".join(map(value, found))
    return "-" if found is None else f"{found:.4g}"


def junit(report: "Comparison") -> str:
    """A case for the verdict, and one for each tap, which fails where a fault begins there."""
    wrong = {fault["tap"]: fault for fault in report.faults}
    failures = (report.verdict not in ("identical", "equivalent")) + len(wrong)
    suite = ElementTree.Element(
        "testsuite", name="llmjax compare", tests=str(len(report.taps) + 1), failures=str(failures)
    )
    verdict = ElementTree.SubElement(suite, "testcase", classname="llmjax.compare", name="verdict")
    if report.verdict not in ("identical", "equivalent"):
        ElementTree.SubElement(verdict, "failure", message=report.verdict).text = report.reason
    for tap in report.taps:
        case = ElementTree.SubElement(suite, "testcase", classname="llmjax.compare.taps", name=tap["name"])
        if fault := wrong.get(tap["name"]):
            causes = "; ".join(f"{c['cause']}: {c['detail']} ({c['explains']:.0%})" for c in fault["causes"])
            ElementTree.SubElement(case, "failure", message=fault["module"]).text = f"{fault['proof']}\n{causes}"
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
