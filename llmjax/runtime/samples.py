"""Several samples of one prompt: a request with ``n`` > 1 becomes n rows of the engine, and these one answer again."""

import dataclasses
from collections.abc import Iterator

from llmjax.model import Model
from llmjax.runtime.outputs import RequestOutput
from llmjax.runtime.row import Request, Requests, Row
from llmjax.runtime.sampling import sample_seed
from llmjax.text.tokenizer import token_text


class Samples:
    """Splits requests into rows on the way into the engine and puts finished rows together on the way out.

    Holds only requests whose rows are under way.

    Args:
      requests: taken one by one, as the engine asks for rows.
      model: what answers them.
    """

    def __init__(self, requests: Requests, model: Model):
        self._requests, self._model = requests, model
        self._open: dict[int, tuple[Request, list[Row]]] = {}  # by the identity of a row's request

    def rows(self) -> Iterator[Request | None]:
        """A request for each row; the rows of one prompt follow each other."""
        for request in self._requests:
            if request is None:
                yield None
                continue
            done: list[Row] = []
            for index in range(request.params.n):
                row = dataclasses.replace(request, index=index, seed=sample_seed(request.seed, index))
                self._open[id(row)] = request, done
                yield row

    def add(self, row: Row) -> RequestOutput | None:
        """Takes a finished row; returns its request's answer if it was the last of the request's rows."""
        request, done = self._open.pop(id(row.request))
        done.append(row)
        if len(done) < request.params.n:
            return None
        done.sort(key=lambda r: r.request.index)
        error = next((r.error for r in done if r.error is not None), None)
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.ids,
            outputs=[] if error else [r.completion() for r in done],
            params=request.params,
            seed=request.seed,
            numerics=self._model.numerics.label,
            prompt_logprobs=done[0].prompt_logprobs,
            model=self._model.path.name,
            token_texts=self._texts(done),
            truncated_prompt_tokens=request.truncated,
            error=error,
        )

    def _texts(self, rows: list[Row]) -> dict[int, str] | None:
        """Of the tokens whose log-probabilities were asked for; None where none were."""
        steps = [step for row in rows for step in (*(row.alternatives or ()), *(row.prompt_logprobs or ()))]
        if not any(row.alternatives is not None or row.prompt_logprobs is not None for row in rows):
            return None
        found = sorted({token for step in steps if step is not None for token in step})
        return {token: token_text(token, self._model.tokenizer) for token in found}
