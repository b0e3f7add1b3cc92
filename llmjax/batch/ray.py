"""Jobs on a Ray cluster, and Ray Data's datasets: the same rows, with the same bits, by any number of workers.

``build`` makes a step of a dataset's pipeline (``Dataset.map_batches``, by a pool of actors).
``run`` is a job with files (``llmjax batch --ray``), which resumes to the row.  It drives Ray's actors itself, not by a
dataset: the order of the output, its journal and what to do about a row that kills its worker are then in one place.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmjax.batch import job
from llmjax.batch.answering import Runner
from llmjax.batch.cluster import Cluster, connected
from llmjax.batch.datasets import Answers
from llmjax.batch.fleet import Fleet
from llmjax.batch.job import Options, Summary
from llmjax.batch.native import KEYS
from llmjax.batch.rows import Generating, Work
from llmjax.errors import RequestError, shown
from llmjax.llm import LLM
from llmjax.outside.values import check, integer
from llmjax.runtime.asking import Params
from llmjax.runtime.params import SamplingParams
from llmjax.text.dates import Date, settled

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


def build(
    model: str | Path | Callable[[], LLM],
    params: Params = None,
    *,
    columns: Mapping[str, str] = MappingProxyType({}),
    actors: int = 1,
    cpus: float = 1,
    gpus: float = 0,
    rows: int = 1024,
    date: Date | None = None,
    **options: Any,
) -> Callable[[Any], Any]:
    """A step of a pipeline: for a dataset, the same with the answers to its rows in further columns.

        answered = build("path/to/model", {"max_tokens": 64}, columns={"prompt": "question"}, actors=8, gpus=1)(
            ray.data.read_parquet("s3://bucket/questions")
        )
        answered.write_parquet("s3://bucket/answers")

    Columns of a row's keys (``llmjax.batch.native``) are read, all are kept, and there come ``generated_text``,
    ``generated_tokens``, ``finish_reason``, ``error`` and ``row``: the answer as JSON, with everything else about it.
    One of the columns must be the id.  Ray Data runs rows of a dead actor again; to resume is for jobs (``run``).

    Args:
      model: a path that every machine has, or what makes the LLM there.
      params: what rows do not set.
      columns: by key of a row, the column it is in, where that has another name.
      actors: each with a model.
      cpus: that Ray counts for each.
      gpus: for each.
      rows: at a time; the slots of an actor stand empty at the end of so many.
      date: what chat templates take for the present; None for now.
      options: of ``LLM``, such as ``max_batch``, ``seed`` and ``loras``.

    Raises:
      RequestError: a number or the date is none, or there is no such parameter or key of a row.
    """
    for name, value in (("actors", actors), ("rows", rows)):
        check(name, value, integer(1))
    if isinstance(params, Mapping):
        SamplingParams.from_dict(params)  # here, rather than from a cluster's actors
    if unknown := sorted(set(columns) - set(KEYS)):
        raise RequestError(f"columns: a row has no key {shown(unknown[0])}; its keys: {', '.join(KEYS)}")
    load = functools.partial(LLM, model, **options) if isinstance(model, str | Path) else model
    made: dict[str, Any] = {"load": load, "params": params, "columns": dict(columns)}
    made["date"] = settled(date).isoformat(timespec="seconds")

    def step(dataset: Any) -> Any:
        from ray.data import ActorPoolStrategy

        pool = {"compute": ActorPoolStrategy(size=actors), "num_cpus": cpus, "num_gpus": gpus}
        return dataset.map_batches(
            Answers, fn_constructor_kwargs=made, batch_format="pyarrow", batch_size=rows, zero_copy_batch=True, **pool
        )

    return step
