"""What a job's answers depend on beside its rows: compared before a job goes on."""

import json
from typing import Any

from llmjax.batch.rows import WHOLE, Shard
from llmjax.checkpoint.identity import model_facts, runtime_facts
from llmjax.llm import LLM
from llmjax.runtime.params import SamplingParams


def identity(llm: LLM, params: SamplingParams, shard: Shard = WHOLE, date: str = "") -> dict[str, Any]:
    """Everything that fixes a job's answers, by name, as JSON would hold it.

    The model's path does not, nor does the processor where another device computes.
    """
    model, runtime = model_facts(llm.model), runtime_facts()
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
        "shard": str(shard),
        "date": date,
        **runtime,
    }
