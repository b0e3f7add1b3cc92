"""What ``llmjax compare`` found, and the forms it is told in."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmjax.errors import RequestError
from llmjax.oracle.dump import Dump
from llmjax.oracle.html import page
from llmjax.oracle.report import junit, text
from llmjax.outside.whole import write_text

SCHEMA = 1


def of_file(theirs: Dump) -> dict[str, Any]:
    """What coverage says of another program's file; nothing of a dump's directory."""
    if not theirs.kind:
        return {}
    return {"positions": sum(len(w.positions) for w in theirs.windows.values()), "file": theirs.kind}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What ``compare`` found.

    Attributes:
      verdict: ``identical``, ``equivalent``, ``different`` or ``not_comparable``.
      explained_by: the class of arithmetic whose floor holds the differences, or None.
      reason: one sentence.
      coverage: ``taps`` compared, ``of`` how many, ``tokens``, ``missing``, what is unknown, and which names of a map
        are ``unmatched``; of another program's file also its kind (``file``), at how many ``positions`` it holds
        values, and of several ``texts``, how many.
      logits: see ``oracle.metrics``; None where they were not dumped.
      taps: each with its error beside its floor, in the order of computation.
      first_divergence: the first tap above its floor, inherited or not; None for none.
      faults: what patching proves, in the order of computation.
      positions: those where the logits differ most, with both sides' best tokens.
      subject: what was compared with what, for people.
      map: errors by token of what leaves each layer, for the HTML report.
    """

    verdict: str
    explained_by: str | None
    reason: str
    coverage: Mapping[str, Any]
    logits: Mapping[str, Any] | None = None
    taps: Sequence[Mapping[str, Any]] = ()
    first_divergence: Mapping[str, Any] | None = None
    faults: Sequence[Mapping[str, Any]] = ()
    positions: Sequence[Mapping[str, Any]] = ()
    subject: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    map: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        by = f", explained by {self.explained_by}" if self.explained_by else ""
        return f"Comparison({self.verdict}{by}: {self.reason})"

    @property
    def exit_code(self) -> int:
        """As ``diff`` has it: 0 the same, 1 different, 2 not comparable."""
        return {"identical": 0, "equivalent": 0, "different": 1}.get(self.verdict, 2)

    def to_dict(self) -> dict[str, Any]:
        """As ``--json`` prints it."""
        return {"schema": SCHEMA, **{k: v for k, v in dataclasses.asdict(self).items() if k != "map"}}

    def to_json(self) -> str:
        """See ``to_dict``."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_text(self) -> str:
        """A page."""
        return text(self)

    def to_junit(self) -> str:
        """A test suite with a case for each tap and one for the verdict, as XML."""
        return junit(self)

    def to_html(self, path: str | Path | None = None) -> str:
        """One page that needs nothing else, written to ``path`` if there is one.

        Raises:
          RequestError: it cannot be written.
          OutputError: the disk is full.
        """
        found = page(self)
        if path is not None:
            write_text(path, found, RequestError)
        return found
