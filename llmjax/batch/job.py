"""Runs a JSONL of prompts through an ``LLM`` and writes the answers in the order of the input."""

import dataclasses
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import IO, Any

from llmjax.batch.progress import Reporter
from llmjax.batch.rows import error_row, output_row, read_rows
from llmjax.llm import LLM
from llmjax.runtime.params import SamplingParams
from llmjax.runtime.row import Request

# Positions of the cache a job begins with: most rows fit, and a longer one makes it grow.
RESERVE = 1024


@dataclasses.dataclass
class Summary:
    """What a job did: rows answered, rows that failed, tokens, seconds."""

    rows: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    compile_seconds: float = 0.0
    seconds: float = 0.0

    def describe(self) -> str:
        """One line."""
        generate = max(self.seconds - self.compile_seconds, 1e-9)
        return (
            f"{self.rows} rows answered, {self.failed} failed; {self.prompt_tokens} prompt and "
            f"{self.completion_tokens} answer tokens ({self.completion_tokens / generate:.0f} tok/s); "
            f"generate {generate:.1f} s, compile {self.compile_seconds:.1f} s"
        )


def run(
    llm: LLM,
    lines: Iterable[str],
    output: IO[str],
    params: SamplingParams,
    *,
    total: int | None = None,
    reporter: Reporter | None = None,
) -> Summary:
    """Runs every row; a row that fails is reported in its own output row and the others go on.

    Args:
      llm: the model.
      lines: of the input.
      output: gets one JSON line a row, in order, as soon as all rows before it are written.
      params: defaults for rows.
      total: number of rows, for the time left.
      reporter: told of progress.
    """
    summary, began = Summary(), time.monotonic()
    compiled = llm.engine.compile_seconds
    order: deque[int] = (
        deque()
    )  # lines of the input not yet written; a finished one waits in `done` for those before it
    done: dict[int, str] = {}
    lines_of: dict[str, int] = {}

    def finish(line: int, row: dict[str, Any]) -> None:
        done[line] = json.dumps(row, ensure_ascii=False) + "\n"
        while order and order[0] in done:
            output.write(done.pop(order.popleft()))
        output.flush()

    def requests() -> Iterator[Request]:
        for row in read_rows(lines, llm, params):
            order.append(row.line)
            if row.request is None:
                summary.failed += 1
                finish(row.line, error_row(row))
            else:
                lines_of[row.request.request_id] = row.line
                yield row.request

    for update in llm.run(requests(), reserve=RESERVE):
        if update.row.finish_reason:
            result = update.row.output(llm.model.numerics.label)
            summary.rows += 1
            summary.prompt_tokens += len(result.prompt_token_ids)
            summary.completion_tokens += len(result.outputs[0].token_ids)
            finish(lines_of.pop(result.request_id), output_row(result))
        if reporter is not None:
            reporter.update(summary.rows + summary.failed, total, llm.engine.progress)
    summary.seconds = time.monotonic() - began
    summary.compile_seconds = llm.engine.compile_seconds - compiled
    if reporter is not None:
        reporter.close()
    return summary
