"""``llmjax score``: a JSONL of texts in, their log-probabilities out; a job like any other."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Generator, Iterable
from types import ModuleType
from typing import Any

from llmjax.batch import texts
from llmjax.batch.rows import WHOLE, Shard
from llmjax.batch.texts import Text
from llmjax.checkpoint.identity import model_facts, runtime_facts
from llmjax.errors import amount
from llmjax.llm import LLM
from llmjax.runtime.asking import Params
from llmjax.runtime.outputs import Pooled, ScoreOutput
from llmjax.runtime.row import Request, Requests
from llmjax.text.dates import Date


def identity(llm: LLM, shard: Shard = WHOLE) -> dict[str, Any]:
    """Everything that fixes a text's scores, by name; ``sha256`` is over all of it but the model's path and which part
    of the rows is done, and what every row names."""
    engine = llm.engine
    facts = {"slots": engine.slots, "chunk": engine.chunk, "block": engine.block}
    facts |= {**model_facts(llm.model), **runtime_facts(llm.model.params)}
    text = json.dumps({**facts, "model": None}, sort_keys=True)
    part = {} if shard == WHOLE else {"shard": str(shard)}
    return {"sha256": hashlib.sha256(text.encode()).hexdigest(), **facts, **part}


class Scoring:
    """Texts are scored: see ``llmjax.batch.rows.Work``.

    Args:
      llm: the model.
      params: there are none to texts.
    """

    in_order = True
    keys: tuple[str, ...] = texts.KEYS

    def __init__(self, llm: LLM, params: Params = None):
        self.llm = llm
        self._sha256 = ""

    def identity(self, shard: Shard, date: str) -> dict[str, Any]:
        """See ``Work``."""
        facts = identity(self.llm, shard)
        self._sha256 = facts["sha256"]
        return facts

    @staticmethod
    def form(row: dict[str, Any]) -> ModuleType:
        """See ``Work``."""
        return texts

    def request(self, question: Text, row_id: str, date: Date | None) -> Request:
        """See ``Work``."""
        return self.llm.score_request(question.prompt, request_id=row_id)

    def outputs(self, requests: Requests) -> Generator[ScoreOutput, None, None]:
        """See ``Work``."""
        for output in self.llm.scores(requests):
            yield dataclasses.replace(output, identity=self._sha256)

    @staticmethod
    def summary(rows: Iterable[bytes]) -> dict[str, Any]:
        """See ``Work``."""
        pooled, scored, failed = Pooled(), 0, 0
        for row in map(json.loads, rows):
            if "error" in row:
                failed += 1
            else:
                scored += 1
                pooled.add([p for p in row["logprobs"] if p is not None])
        return {"rows": scored, "failed": failed, **pooled.to_dict()}


def describe(summary: dict[str, Any]) -> str:
    """One line: NLL and perplexity of all tokens together, with standard errors.

    Args:
      summary: what ``Scoring.summary`` returned.
    """
    if not summary["tokens"]:
        return "no token has another before it"
    number = {name: math.nan if value is None else value for name, value in summary.items()}
    return (
        f"{amount(summary['tokens'], 'token')}, NLL {number['nll']:.5f} ± {number['nll_standard_error']:.5f}, "
        f"perplexity {number['perplexity']:.4f} ± {number['perplexity_standard_error']:.4f}"
    )
