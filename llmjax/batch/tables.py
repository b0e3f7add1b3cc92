"""Tables as the input and the output of a job: Parquet, with pyarrow, and CSV.

A table is read as the JSONL it stands for, an object for each row, and written from the JSONL that a job keeps beside
it (``OUT.parquet.jsonl``): so resume, ids, seeds and errors are those of any job.

In: a column is the key of a row that it is named for, or that it is said to be (``columns``); what is in other columns
goes to the row's answer as it is.  Empty cells are as if they were not there.  In CSV text is text, a number or a list
what JSON makes of the cell.

Out: a column for each key that any answer has, and for each column that only went along; ``usage`` is two.  Its type is
that of its values, JSON as text where they have none in common.
"""

import contextlib
import csv
import datetime
import decimal
import io
import itertools
import json
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

from llmjax.batch.files import check_apart
from llmjax.batch.native import finite
from llmjax.errors import OutputError, RequestError, shown
from llmjax.outside.paths import checked_path
from llmjax.outside.urls import exists, file_name, is_url, opened, put, shown_url
from llmjax.outside.whole import whole_file, workspace

SUFFIXES = (".parquet", ".csv")
# Rows in memory at a time, in and out.
_ROWS = 1024
# Keys whose values are text, whatever they look like.
_TEXTS = ("id", "custom_id", "prompt", "text", "lora", "chat_template")
# The longest cell of a CSV file.
_LONGEST = 1 << 28
# Objects whose keys are columns of their own.
_FLAT = ("usage", "metadata")

Row = dict[str, Any]


def is_table(path: str) -> bool:
    """Whether a file's name says that it is one."""
    return file_name(path).lower().endswith(SUFFIXES)


def is_made(output: str) -> bool:
    """Whether an output is made at the end, of answers that a job keeps elsewhere until then."""
    return is_table(output) or is_url(output)


def rows_path(output: str) -> str:
    """Where a job keeps the answers that ``output`` is made of: beside it; of a URL, in the current folder."""
    name = file_name(output) if is_url(output) else output
    return f"{name}.jsonl" if is_table(output) else name


class TableLines:
    """A table's rows, each as a line of JSONL; see ``reading.Lines``.

    Args:
      path: of the table.
      columns: by key of a row, the column it is in, where that has another name.
      keys: what a row may hold; other columns are carried along as its ``metadata``.

    Raises:
      RequestError: no such file, none of its kind, or a column that is not there.
    """

    repeatable = True

    def __init__(self, path: str, columns: Mapping[str, str], keys: tuple[str, ...]):
        self._path = path if is_url(path) else str(checked_path("input", path, RequestError))
        self._name = path = shown_url(path)
        self._is_csv = file_name(path).lower().endswith(".csv")
        with self._told(), contextlib.closing(self._rows()) as rows:
            found = next(rows)
        if twice := sorted({name for name in found if found.count(name) > 1}):
            raise RequestError(f"{path}: two columns are named {shown(twice[0])}")
        self._keys = keys_of(path, found, columns, keys)

    def __iter__(self) -> Iterator[str]:
        """Raises RequestError where it cannot be read on."""
        with self._told(), contextlib.closing(self._rows()) as rows:
            names = next(rows)
            value = _parsed if self._is_csv else plain
            for values in rows:
                yield f"{json.dumps(row_of(names, values, self._keys, value))}\n"

    def count(self) -> int:
        """Rows, none of them made into JSON: Parquet knows their number, lines of CSV are told apart."""
        with self._told():
            if not self._is_csv:
                with opened(self._path) as data, _arrow().parquet.ParquetFile(data) as file:
                    return file.metadata.num_rows
            with contextlib.closing(self._rows()) as rows:
                return sum(1 for _ in rows) - 1

    def arriving(self, wait: Callable[[], bool]) -> Iterator[str | None]:
        """The same: nothing of a table is still to come."""
        return iter(self)

    def _rows(self) -> Generator[list[Any], None, None]:
        """The names of the columns, then the cells of each row."""
        return self._csv_rows() if self._is_csv else self._parquet_rows()

    def _csv_rows(self) -> Generator[list[Any], None, None]:
        csv.field_size_limit(_LONGEST)
        with opened(self._path) as data:
            text = io.TextIOWrapper(data, encoding="utf-8-sig", errors="surrogateescape", newline="")
            reader = csv.reader(text, strict=True)
            names = next(reader, None)
            if not names:
                raise RequestError(f"{self._name}: it is empty; expected a line with the names of its columns")
            yield names
            for cells in reader:
                if cells and len(cells) != len(names):
                    raise RequestError(
                        f"{self._name}: line {reader.line_num}: expected {len(names)} cells, as there are columns, "
                        f"found {len(cells)}"
                    )
                yield [cell or None for cell in cells] or [None] * len(names)

    def _parquet_rows(self) -> Generator[list[Any], None, None]:
        with opened(self._path) as data, _arrow().parquet.ParquetFile(data) as file:
            names = file.schema_arrow.names
            yield names
            for batch in file.iter_batches(batch_size=_ROWS):
                columns = [column.to_pylist() for column in batch.columns]
                for i in range(batch.num_rows):
                    yield [column[i] for column in columns]

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except RequestError:
            raise
        except OSError as error:
            raise RequestError(f"{self._name}: cannot read the input: {error.strerror or error}") from None
        except (csv.Error, ValueError) as error:  # pyarrow's are ValueErrors
            kind = "csv" if self._is_csv else "parquet"
            raise RequestError(f"{self._name}: cannot be read as {kind}: {error}") from None


def keys_of(path: str, found: list[str], columns: Mapping[str, str], keys: tuple[str, ...]) -> dict[str, str]:
    """Of each column the key that it is; empty where it is none.

    Args:
      path: of the table, for messages.
      found: the names of its columns.
      columns: see ``TableLines``.
      keys: see ``TableLines``.

    Raises:
      RequestError: a column that is named is not there, or none holds what to read.
    """
    for key, column in columns.items():
        if key not in keys:
            raise RequestError(f"--column {key}={column}: a row has no key {key!r}; its keys: {', '.join(keys)}")
        if column not in found:
            raise RequestError(f"{path}: no column {shown(column)}; it has {', '.join(map(shown, found))}")
    taken = {column: key for key, column in columns.items()}
    result = {name: taken.get(name, name if name in keys and name not in columns else "") for name in found}
    if not set(result.values()) & {"prompt", "messages", "prompt_token_ids", "text", "token_ids"}:
        raise RequestError(
            f"{path}: no column holds what to read; its columns are {', '.join(map(shown, found))}; say which one "
            f"does: --column {'text' if 'text' in keys else 'prompt'}=COLUMN"
        )
    return result


def row_of(names: list[str], values: list[Any], keys: Mapping[str, str], value_of: Callable[[str, Any], Any]) -> Row:
    """A row of a table as a job takes it, cells without a value left out.

    Args:
      names: of the columns.
      values: of the cells.
      keys: see ``keys_of``.
      value_of: for a key and a cell, what it is in JSON.
    """
    row: Row = {}
    along: Row = {}
    for name, value in zip(names, values, strict=True):
        if value is not None:
            key = keys[name]
            (row if key else along)[key or name] = value_of(key, value)
    if along:
        given = row.get("metadata", {})
        row["metadata"] = {**along, **(given if isinstance(given, dict) else {"metadata": given})}
    return row


def _parsed(key: str, cell: str) -> Any:
    """What a cell of CSV stands for, of a key that is no text: JSON, or else the text."""
    if not key or key in _TEXTS:
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


def plain(key: str, value: Any) -> Any:
    """A value of Arrow's, of whatever key, as JSON has it."""
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return str(value) if isinstance(value, decimal.Decimal | datetime.timedelta) else value


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RequestError("Parquet is read and written with pyarrow: pip install 'llmjax[tables]'") from None
    return pyarrow


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
        _arrow()
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
    kinds: dict[str, str] = {}
    for row in _answers(source):
        for name, value in row.items():
            kinds[name] = _common(kinds.get(name, ""), _kind(value))
    with whole_file(Path(output), RequestError) as path:
        (_write_csv if output.lower().endswith(".csv") else _write_parquet)(path, source, kinds)


def _answers(source: Path) -> Iterator[Row]:
    with open(source, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            flat: Row = {name: value for name, value in row.items() if name not in _FLAT}
            for name in _FLAT:
                inner = row.get(name)
                for key, value in (inner if isinstance(inner, dict) else {name: inner}).items():
                    if value is not None:
                        flat[f"{name}.{key}" if key in flat else key] = value
            yield flat


def _kind(value: Any) -> str:
    """Of a value; empty of none."""
    if value is None:
        return ""
    if isinstance(value, list):
        kinds = {_kind(v) for v in value}
        return "ints" if kinds <= {"int"} else "floats" if kinds <= {"int", "float", ""} else "json"
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        return "whole"
    names = {bool: "bool", int: "int", float: "float", str: "str"}
    return names.get(type(value), "json")


def _common(a: str, b: str) -> str:
    """The kind that holds values of both."""
    if a == b or not (a and b):
        return a or b
    for pair, both in (({"int", "float"}, "float"), ({"ints", "floats"}, "floats"), ({"int", "whole"}, "whole")):
        if {a, b} == pair:
            return both
    return "json"


def _cell(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if kind == "json":
        return json.dumps(value, ensure_ascii=False)
    return float(value) if kind == "float" else value


def _write_csv(path: Path, source: Path, kinds: dict[str, str]) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(kinds)
        kinds = {name: "json" if kind in ("ints", "floats", "bool") else kind for name, kind in kinds.items()}
        writer.writerows([_cell(row.get(name), kind) for name, kind in kinds.items()] for row in _answers(source))


def _write_parquet(path: Path, source: Path, kinds: dict[str, str]) -> None:
    arrow = _arrow()
    types = {"int": arrow.int64(), "whole": arrow.uint64(), "float": arrow.float64(), "bool": arrow.bool_(),
             "ints": arrow.list_(arrow.int64()), "floats": arrow.list_(arrow.float64())}  # fmt: skip
    schema = arrow.schema([(name, types.get(kind, arrow.string())) for name, kind in kinds.items()])
    with arrow.parquet.ParquetWriter(path, schema) as writer:
        answers = _answers(source)
        while rows := list(itertools.islice(answers, _ROWS)):
            cells = {name: [_cell(row.get(name), kind) for row in rows] for name, kind in kinds.items()}
            writer.write_table(arrow.table(cells, schema))
