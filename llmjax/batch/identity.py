"""What a job's answers depend on beside its rows: compared before a job goes on."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from llmjax.checkpoint.identity import model_facts, runtime_facts
from llmjax.llm import LLM
from llmjax.runtime.params import SamplingParams


def chat_options(llm: LLM) -> dict[str, Any]:
    """What conversations are rendered with that do not say otherwise, a template as its SHA-256."""
    template = llm.chat_options.get("chat_template")
    sha = {} if template is None else {"chat_template": hashlib.sha256(template.encode()).hexdigest()}
    return json.loads(json.dumps({**llm.chat_options, **sha}, default=str))


def without_path(job: Mapping[str, Any]) -> dict[str, Any]:
    """An identity, of any job, without what changes no answer: the model's path."""
    return {name: value for name, value in job.items() if name != "model" or not isinstance(value, str)}


def identity(llm: LLM, params: SamplingParams, shard: str = "1/1", date: str = "") -> dict[str, Any]:
    """Everything that fixes a job's answers, by name, as JSON would hold it.

    The model's path does not, nor does the processor where another device computes.
    """
    model, runtime = model_facts(llm.model), runtime_facts(llm.model.params)
    del model["model"]
    if runtime["platform"] != "cpu":
        del runtime["cpu"]
    return {
        "model": model,
        "loras": list(llm.loras),
        "slots": llm.engine.slots,
        "chunk": llm.engine.chunk,
        "block": llm.engine.block,
        "seed": llm.seed,
        "params": json.loads(json.dumps(params.to_dict())),
        "shard": shard,
        "date": date,
        **({"chat": chat_options(llm)} if llm.chat_options else {}),
        **llm.engine.processor(),
        **runtime,
    }
