"""Several samples of one prompt: a request with ``n`` > 1 becomes n rows of the engine, and these one answer again."""

import dataclasses
from collections.abc import Iterable, Iterator

from llmjax.runtime.outputs import RequestOutput
from llmjax.runtime.row import Request, Row
from llmjax.runtime.sampling import sample_seed


class Samples:
    """Splits requests into rows on the way into the engine and puts finished rows together on the way out.

    Holds only requests whose rows are under way.

    Args:
      requests: taken one by one, as the engine asks for rows.
      numerics: name of the profile, for the results.
    """

    def __init__(self, requests: Iterable[Request], numerics: str):
        self._requests = requests
        self._numerics = numerics
        self._open: dict[int, tuple[Request, list[Row]]] = {}  # by the identity of a row's request

    def rows(self) -> Iterator[Request]:
        """A request for each row; the rows of one prompt follow each other."""
        for request in self._requests:
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
            numerics=self._numerics,
            prompt_logprobs=done[0].prompt_logprobs,
            truncated_prompt_tokens=request.truncated,
            error=error,
        )
