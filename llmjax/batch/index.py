"""What a job knows of its rows, in a temporary database on the disk: memory does not grow with their number."""

import hashlib
import sqlite3
from collections.abc import Iterator
from typing import NamedTuple

from llmjax.errors import OutputError


def digest(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


class Written(NamedTuple):
    """A row of the output.

    Attributes:
      key: which row it is.
      content: digest of what it answers: prompt, parameters, seed.
      failed: it holds an error.
      prompt_tokens: of its usage.
      completion_tokens: of its usage.
    """

    key: bytes
    content: bytes
    failed: bool
    prompt_tokens: int
    completion_tokens: int


class Totals(NamedTuple):
    """Sums over the rows of the output that belong to the input."""

    rows: int
    failed: int
    prompt_tokens: int
    completion_tokens: int


class Index:
    """Rows of the output by key, with their place in it, and rows of the input by id.

    Attributes:
      forgotten: rows that were dropped.
    """

    def __init__(self) -> None:
        self.forgotten = 0
        # Without a name SQLite keeps a database in a file of its own that goes away with the connection, and no more
        # than a fixed cache of it in memory.
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
            CREATE TABLE written (key BLOB PRIMARY KEY, content BLOB, failed INT, prompt INT, completion INT,
                                  start INT, size INT, line INT) WITHOUT ROWID;
            CREATE TABLE ids (id BLOB PRIMARY KEY) WITHOUT ROWID;
            BEGIN;
            """
        )

    def put(self, row: Written, start: int, size: int, line: int | None = None) -> None:
        """Notes a row of the output at bytes ``start`` to ``start + size``; it supersedes an earlier one."""
        self._execute("INSERT OR REPLACE INTO written VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*row, start, size, line))

    def get(self, key: bytes) -> Written | None:
        """The latest row of the output with this key."""
        found = self._execute("SELECT key, content, failed, prompt, completion FROM written WHERE key = ?", (key,))
        row = found.fetchone()
        return row and Written(*row)

    def keep(self, key: bytes, line: int) -> None:
        """Notes that a row of the output answers this line of the input."""
        self._execute("UPDATE written SET line = ? WHERE key = ?", (line, key))

    def forget(self, start: int) -> None:
        """Drops the rows of the output from byte ``start`` on."""
        self.forgotten += self._execute("DELETE FROM written WHERE start >= ?", (start,)).rowcount

    def is_new(self, row_id: str) -> bool:
        """Whether no earlier row of the input had this id."""
        return self._execute("INSERT OR IGNORE INTO ids VALUES (?)", (digest(row_id),)).rowcount == 1

    def totals(self, *, everything: bool) -> Totals:
        """Of all rows of the output, or of those that are kept."""
        sums = "COUNT(*), TOTAL(failed), TOTAL(prompt), TOTAL(completion)"
        found = self._execute(f"SELECT {sums} FROM written WHERE ? OR line IS NOT NULL", (everything,)).fetchone()
        return Totals(*map(int, found))

    def places(self, order: str) -> Iterator[tuple[int, int]]:
        """Start and size of the rows that are kept, by ``line`` of the input or by ``start``."""
        yield from self._execute(f"SELECT start, size FROM written WHERE line IS NOT NULL ORDER BY {order}")

    def failed(self, count: int) -> list[tuple[int, int]]:
        """Start and size of the first kept rows that failed, by ``line`` of the input."""
        found = self._execute(
            "SELECT start, size FROM written WHERE failed AND line IS NOT NULL ORDER BY line LIMIT ?", (count,)
        )
        return found.fetchall()

    def close(self) -> None:
        """Removes it."""
        self._db.close()

    def _execute(self, statement: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        try:
            return self._db.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise OutputError(
                f"the temporary index of rows cannot be written: {error}; make room in /var/tmp, or name another "
                "folder in SQLITE_TMPDIR"
            ) from None
