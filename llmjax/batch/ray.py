"""Jobs on a Ray cluster, and Ray Data's datasets: the same rows, with the same bits, by any number of workers.

``run`` is a job with files (``llmjax batch --ray``), which resumes to the row.  It drives Ray's actors itself, not by a
dataset: the order of the output, its journal and what to do about a row that kills its worker are then in one place.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

from llmjax.batch import job
from llmjax.batch.answering import Runner
from llmjax.batch.cluster import Cluster, connected
from llmjax.batch.fleet import Fleet
from llmjax.batch.job import Options, Summary
from llmjax.batch.rows import Generating, Work
from llmjax.llm import LLM
from llmjax.runtime.asking import Params

_OPTIONS, _CLUSTER = Options(), Cluster()


def run(
    load: Callable[[], LLM],
    source: str,
    output: str,
    params: Params = None,
    options: Options = _OPTIONS,
    about: dict[str, Any] | None = None,
    work: type[Work] = Generating,
    cluster: Cluster = _CLUSTER,
) -> Summary:
    """``job.run`` by workers on a cluster; of an output that is a file, the rows are in the order of the input.

    Args:
      load: makes the LLM, in each worker.
      source: see ``job.run``; this process alone reads it.
      output: see ``job.run``; this process alone writes it.
      params: see ``job.run``.
      options: see ``job.run``.
      about: see ``job.run``.
      work: see ``job.run``.
      cluster: where.

    Raises:
      LlmjaxError: see ``job.run``; the cluster cannot be joined, workers cannot begin, differ, or die again and again.
    """

    def start(stack: contextlib.ExitStack) -> Runner:
        return Fleet(stack.enter_context(connected(cluster)), cluster, load, work, params)

    options = dataclasses.replace(options, ordered=options.ordered or output != "-")
    return job.run_by(start, source, output, options, about, work.keys)
