"""Tables as the input and the output of a job: Parquet, with pyarrow, and CSV.

A table is read as the JSONL it stands for, an object for each row, and written from the JSONL that a job keeps beside
it (``OUT.parquet.jsonl``): so resume, ids, seeds and errors are those of any job.

In: a column is the key of a row that it is named for, or that it is said to be (``columns``); what is in other columns
goes to the row's answer as it is.  Empty cells are as if they were not there, but an id's: such a row fails, where the
number of its line might be another row's id.  In CSV text is text, a number or a list what JSON makes of the cell.
Whole floats are integers where those are wanted: pandas makes floats of a column of them in which a cell is empty.
Decimals, which SQL makes of ``0.7``, are numbers for the parameters of a row, and else their digits as text.

Out: a column for each key that any answer has, and for each column that only went along; ``usage`` is two.  Its type is
that of its values, JSON as text where they have none in common; ids are text then, as they are.
"""

import contextlib
import csv
import dataclasses
import datetime
import decimal
import io
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

from converters.readers.jsonfile import unique_keys
from llmjax.batch.magic import binary_kind
from llmjax.batch.native import IDS, finite
from llmjax.errors import RequestError, shown
from llmjax.outside.paths import checked_path
from llmjax.outside.urls import file_name, is_url, opened, shown_url
from llmjax.runtime.params import SamplingParams

SUFFIXES = (".parquet", ".csv")
# Rows in memory at a time, in and out.
ROWS = 1024
# Of a beginning, what tells what a file is.
_SAMPLE = 64
# Keys whose values are text, whatever they look like.
_TEXTS = (*IDS, "prompt", "text", "lora", "chat_template")
# Keys whose values are integers.
_INTEGERS = {*IDS, *(field.name for field in dataclasses.fields(SamplingParams) if field.type in (int, int | None))}
# The longest cell of a CSV file.
_LONGEST = 1 << 28

Row = dict[str, Any]


def is_table(path: str) -> bool:
    """Whether a file's name says that it is one."""
    return file_name(path).lower().endswith(SUFFIXES)


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
                # A blank line of CSV is no row, though it is a line.
                yield "\n" if not values else f"{json.dumps(row_of(names, values, self._keys, value))}\n"

    def count(self) -> int:
        """Rows, none of them made into JSON: Parquet knows their number, lines of CSV are told apart."""
        with self._told():
            if not self._is_csv:
                with opened(self._path) as data, arrow().parquet.ParquetFile(data) as file:
                    return file.metadata.num_rows
            with contextlib.closing(self._rows()) as rows:
                return sum(1 for row in rows if row) - 1

    def arriving(self, wait: Callable[[], bool]) -> Iterator[str | None]:
        """The same: nothing of a table is still to come."""
        return iter(self)

    def _rows(self) -> Generator[list[Any], None, None]:
        """The names of the columns, then the cells of each row."""
        return self._csv_rows() if self._is_csv else self._parquet_rows()

    def _csv_rows(self) -> Generator[list[Any], None, None]:
        csv.field_size_limit(_LONGEST)
        with opened(self._path) as data:
            if kind := binary_kind(data.peek(_SAMPLE)):
                raise RequestError(f"{self._name}: this is {kind}; expected CSV in UTF-8, as the name says")
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
                yield [cell or None for cell in cells]

    def _parquet_rows(self) -> Generator[list[Any], None, None]:
        with opened(self._path) as data, arrow().parquet.ParquetFile(data) as file:
            names = file.schema_arrow.names
            yield names
            for batch in file.iter_batches(batch_size=ROWS):
                columns = [_cells(column) for column in batch.columns]
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
    if twice := [column for column, count in Counter(columns.values()).items() if count > 1]:
        raise RequestError(f"--column: {shown(twice[0])} is named for two keys; a column can be one")
    taken = {column: key for key, column in columns.items()}
    result = {name: taken.get(name, name if name in keys and name not in columns else "") for name in found}
    commas = "; cells of CSV have commas between them" if len(found) == 1 and set(found[0]) & set(";\t|") else ""
    if not set(result.values()) & {"prompt", "messages", "prompt_token_ids", "text", "token_ids"}:
        raise RequestError(
            f"{path}: no column holds what to read; its columns are {', '.join(map(shown, found))}; say which one "
            f"does: --column {'text' if 'text' in keys else 'prompt'}=COLUMN{commas}"
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
            value = value_of(key, value)
            if key in _INTEGERS and isinstance(value, float) and value.is_integer():
                value = int(value)
            (row if key else along)[key or name] = value
    if not row.keys() & set(IDS):
        row |= dict.fromkeys([key for key in keys.values() if key in IDS][:1])
    if along:
        given = row.get("metadata", {})
        row["metadata"] = {**along, **(given if isinstance(given, dict) else {"metadata": given})}
    return row


def _parsed(key: str, cell: str) -> Any:
    """What a cell of CSV stands for, of a key that is no text: JSON, or else the text."""
    if not key or key in _TEXTS:
        return cell
    try:
        return json.loads(cell, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError):
        return cell


def plain(key: str, value: Any) -> Any:
    """A value of Arrow's as JSON has it; bytes that are no UTF-8 spoil the row whose key they are."""
    number = _number if key and key not in _TEXTS else str
    return _plain(value, "surrogateescape" if key else "backslashreplace", number)


def _plain(value: Any, errors: str, number: Callable[[decimal.Decimal], Any]) -> Any:
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, dict):
        return {name: _plain(v, errors, number) for name, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v, errors, number) for v in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", errors)
    if isinstance(value, datetime.timedelta):  # pandas has others, which are written otherwise
        return str(datetime.timedelta(value.days, value.seconds, value.microseconds))
    return number(value) if isinstance(value, decimal.Decimal) else value


def _number(value: decimal.Decimal) -> int | float:
    """What SQL makes of ``0.7``, and of integers that it counts: a parameter's number, as JSON has it."""
    return int(value) if value == value.to_integral_value() else float(value)


def _cells(column: Any) -> list[Any]:
    """Of a column of Arrow's."""
    try:
        return column.to_pylist()
    except ValueError:  # nanoseconds, which Python's times do not have
        return [_cell(scalar) for scalar in column]


def _cell(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except ValueError:
        return scalar.cast("string").as_py().replace(" ", "T", 1)


def arrow() -> Any:
    """The pyarrow package.

    Raises:
      RequestError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RequestError("Parquet is read and written with pyarrow: pip install 'llmjax[tables]'") from None
    return pyarrow
