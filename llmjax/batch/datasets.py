"""Rows of a dataset through an LLM, a table at a time, as ``Dataset.map_batches`` hands them to an actor."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llmjax.batch.answering import Answering
from llmjax.batch.index import Written
from llmjax.batch.native import IDS
from llmjax.batch.progress import Count
from llmjax.batch.rows import WHOLE, Generating, InputRow, read_row
from llmjax.batch.tables import keys_of, plain, row_of
from llmjax.errors import RequestError, shown
from llmjax.llm import LLM
from llmjax.runtime.asking import Params

# What is added to the columns that are there; ``row`` is all of the answer, as a job would write it.
ADDED = ("generated_text", "generated_tokens", "finish_reason", "error", "row")


class Answers:
    """Takes tables, gives each back with the answers to its rows as further columns.

    A row's draws and bits are those of a job with the same settings: they follow from its id, which therefore must be
    there, and no other row's.

    Args:
      load: makes the LLM.
      params: what rows do not set.
      columns: by key of a row, the column it is in, where that has another name.
      date: what chat templates take for the present.
    """

    def __init__(self, load: Callable[[], LLM], params: Params, columns: Mapping[str, str], date: str):
        self._work, self._columns, self._date = Generating(load(), params), columns, date

    def __call__(self, table: Any) -> Any:
        """Raises RequestError for columns that are missing, or are there already."""
        import pyarrow

        names = table.column_names
        keys = keys_of("the dataset", names, self._columns, self._work.keys)
        if not set(keys.values()) & set(IDS):
            raise RequestError(
                "the dataset: no column holds ids, from which rows draw; say which one does: columns={'id': COLUMN}"
            )
        if taken := [name for name in ADDED if name in names]:
            raise RequestError(f"the dataset: has a column {shown(taken[0])} already; drop it, or rename it")
        names = [name for name in names if keys[name]]
        cells = [table.column(name).to_pylist() for name in names]
        rows = [row_of(names, list(row), keys, plain) for row in zip(*cells, strict=True)]
        answers = [_without_line(json.loads(line)) for line in self._answered(rows)]
        kinds = pyarrow.string(), pyarrow.list_(pyarrow.int64()), *[pyarrow.string()] * 3
        values = [
            [row.get("text") for row in answers],
            [row.get("token_ids") for row in answers],
            [row.get("finish_reason") for row in answers],
            [row.get("error") for row in answers],
            [json.dumps(row, ensure_ascii=False) for row in answers],
        ]
        for name, kind, column in zip(ADDED, kinds, values, strict=True):
            table = table.append_column(name, pyarrow.array(column, kind))
        return table

    def _answered(self, rows: list[dict[str, Any]]) -> list[bytes]:
        out = _Lines()

        def asked(wait: Callable[[], bool]) -> Iterator[InputRow | None]:
            for number, row in enumerate(rows, 1):
                yield read_row(number, json.dumps(row), self._work, out, WHOLE, self._date)

        for _ in Answering(self._work, out, Count(), False, lambda: False).run(asked):
            pass
        return [out.lines[number] for number in range(1, len(rows) + 1)]


def _without_line(row: dict[str, Any]) -> dict[str, Any]:
    """An answer that does not say where in its table the row was: no one knows which table that was."""
    if "line" in row:
        row["error"] = row["error"].removeprefix(f"line {row.pop('line')}: ")
    return row


class _Lines:
    """The ``Sink`` and the ``Ids`` of a table."""

    def __init__(self) -> None:
        self.lines: dict[int, bytes] = {}
        self._ids: set[str] = set()

    def is_new(self, row_id: str) -> bool:
        new = row_id not in self._ids
        self._ids.add(row_id)
        return new

    def known(self, key: bytes) -> Written | None:
        return None

    def keep(self, key: bytes, line: int) -> None:
        raise AssertionError("there are no rows of an earlier run")

    def append(self, row: Written, text: bytes, line: int) -> None:
        self.lines[line] = text
