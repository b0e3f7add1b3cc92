"""What a job makes of the answers that it keeps, when it has them all: tables, and files by URL."""

import csv
import dataclasses
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmjax.batch.files import check_apart
from llmjax.batch.native import IDS
from llmjax.batch.tables import ROWS, Row, arrow, is_table
from llmjax.errors import OutputError, RequestError
from llmjax.outside.paths import checked_path
from llmjax.outside.urls import exists, file_name, is_url, put, shown_url
from llmjax.outside.whole import whole_file, workspace

# Columns that rows bring are named otherwise, whether or not any answer has these.
_OURS = {"error", "line"}
# Tables and packed files of kinds that none is made of; rows of JSONL under such a name would not be seen for what they
# are.
_TABLES = (".tsv", ".csv.gz", ".tsv.gz", ".parquet.gz", ".xls", ".xlsx", ".ods", ".arrow", ".feather", ".orc", ".avro")
_OTHERS = (*_TABLES, ".zst", ".bz2", ".xz", ".lz4", ".zip")


def is_made(output: str) -> bool:
    """Whether an output is made at the end, of answers that a job keeps elsewhere until then.

    Raises:
      RequestError: its name says that it is a table of another kind, or packed by anything but gzip.
    """
    if file_name(output).lower().endswith(_OTHERS):
        kinds = (
            "tables are written as *.parquet or *.csv, all else as JSONL, packed or not: expected a name such as "
            "answers.jsonl or answers.jsonl.gz"
        )
        raise RequestError(f"{shown_url(output)}: {kinds}")
    return is_table(output) or is_url(output)


def rows_path(output: str) -> str:
    """Where a job keeps the answers that ``output`` is made of: beside it; of a URL, in the current folder."""
    name = file_name(output) if is_url(output) else output
    return f"{name}.jsonl" if is_table(output) else name


def check_output(output: str, source: str) -> None:
    """Before anything runs, that an output that is made at the end can be.

    Raises:
      RequestError: pyarrow is missing, or a file stands there that no job made.
    """
    name, rows = shown_url(output), rows_path(output)
    if not rows or rows == ".jsonl":
        raise RequestError(f"{name}: expected a URL that ends in the name of a file")
    if is_url(output):
        try:
            found = exists(output)
        except OSError as error:
            raise RequestError(f"{name}: cannot write the output: {error.strerror or error}") from None
        if output == source:
            raise RequestError(f"{name}: the output is the input file")
    else:
        path = checked_path("output", output, RequestError)
        check_apart(path, source)
        found = path.exists()
    if file_name(output).lower().endswith(".parquet"):
        arrow()
    if found and not Path(rows).exists():
        raise RequestError(
            f"{name}: it is there, without the {Path(rows).name} of a job that made it; name another output, or delete "
            "it"
        )


def write(source: Path, output: str) -> None:
    """Writes what is made of a finished job's answers, whole or not at all.

    Args:
      source: the answers as JSONL.
      output: the table, or a URL.

    Raises:
      RequestError: it cannot be written.
      OutputError: it cannot be copied to where it belongs.
    """
    if is_url(output):
        with workspace(Path(tempfile.gettempdir())) as folder:
            made = source
            if is_table(output):
                made = folder / file_name(output)
                write(source, str(made))
            try:
                put(made, output)
            except OSError as error:
                raise OutputError(
                    f"{shown_url(output)}: cannot write the output: {error.strerror or error}; all rows are in "
                    f"{source}, and the same command tries again"
                ) from None
        return
    columns = _Columns(source)
    with whole_file(Path(output), RequestError) as path:
        (_write_csv if output.lower().endswith(".csv") else _write_parquet)(path, columns)


class _Columns:
    """The columns that answers make.

    Args:
      source: the answers as JSONL.

    Attributes:
      kinds: of their values, by name.
    """

    def __init__(self, source: Path):
        self._source = source
        own: dict[str, _Values] = {}
        along: dict[str, _Values] = {}
        for answer, brought in _answers(source):
            for columns, row in ((own, answer), (along, brought)):
                for name, value in row.items():
                    columns.setdefault(name, _Values()).add(value)
        self._names: dict[str, str] = {}
        for key in along:
            name = _written(key)
            while name in own or name in _OURS or name in self._names.values():
                name = f"metadata.{name}"
            self._names[key] = name
        found = own | {self._names[key]: values for key, values in along.items()}
        self.kinds = {name: values.kind() for name, values in found.items()} or {"id": "str"}
        # Ids that are equal as text are one id.
        self.kinds |= {name: "text" for name in IDS if self.kinds.get(name) == "json"}

    def rows(self) -> Iterator[Row]:
        """Their cells by name, where there are any."""
        for answer, brought in _answers(self._source):
            yield answer | {self._names[key]: value for key, value in brought.items()}


def _answers(source: Path) -> Iterator[tuple[Row, Row]]:
    """Of each row, what the answer is, and what only went along."""
    with open(source, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            along = row.pop("metadata", {})
            along = along if isinstance(along, dict) else {"metadata": along}
            yield row | row.pop("usage", {}), {name: value for name, value in along.items() if value is not None}


@dataclasses.dataclass
class _Values:
    """What values a column has.

    Attributes:
      types: theirs.
      least: of integers, or 0 if all are above it.
      greatest: the same.
      items: those of lists.
    """

    types: set[type] = dataclasses.field(default_factory=set)
    least: int = 0
    greatest: int = 0
    items: "_Values | None" = None

    def add(self, value: Any) -> None:
        """One more."""
        self.types.add(type(value))
        if type(value) is int:
            self.least, self.greatest = min(self.least, value), max(self.greatest, value)
        if isinstance(value, list):
            self.items = self.items or _Values()
            for item in value:
                self.items.add(item)

    def kind(self) -> str:
        """That which holds them all as they are."""
        types = self.types - {type(None)}
        if not types:
            return "null"
        if types == {int} and -(2**63) <= self.least and self.greatest < 2**63:
            return "int"
        if types == {int} and self.least >= 0 and self.greatest < 2**64:
            return "whole"
        if types <= {int, float} and float in types and -(2**53) <= self.least and self.greatest <= 2**53:
            return "float"
        if types == {list} and self.items is not None:
            lists = {"int": "ints", "float": "floats", "null": "floats" if self.items.types else "ints"}
            return lists.get(self.items.kind(), "json")
        return "bool" if types == {bool} else "str" if types == {str} else "json"


def _cell(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if kind in ("str", "text", "json"):
        return _written(json.dumps(value, ensure_ascii=False) if kind == "json" else str(value))
    return float(value) if kind == "float" else value


def _written(text: str) -> str:
    """Half a surrogate pair, which no UTF-8 text has, as the escape that JSON has for it."""
    return text.encode("utf-8", "backslashreplace").decode()


def _write_csv(path: Path, columns: _Columns) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns.kinds)
        kinds = {name: "json" if kind in ("ints", "floats", "bool") else kind for name, kind in columns.kinds.items()}
        writer.writerows([_cell(row.get(name), kind) for name, kind in kinds.items()] for row in columns.rows())


def _write_parquet(path: Path, columns: _Columns) -> None:
    pa = arrow()
    types = {"int": pa.int64(), "whole": pa.uint64(), "float": pa.float64(), "bool": pa.bool_(),
             "ints": pa.list_(pa.int64()), "floats": pa.list_(pa.float64())}  # fmt: skip
    schema = pa.schema([(name, types.get(kind, pa.string())) for name, kind in columns.kinds.items()])
    with pa.parquet.ParquetWriter(path, schema) as writer:
        answers = columns.rows()
        while rows := list(itertools.islice(answers, ROWS)):
            cells = {name: [_cell(row.get(name), kind) for row in rows] for name, kind in columns.kinds.items()}
            writer.write_table(pa.table(cells, schema))
