"""The compiled programs of an engine, to look into."""

from collections.abc import Iterator
from functools import partial

import jax
import numpy as np

from llmjax import LLM
from llmjax.runtime.decode import BURST, decode
from llmjax.runtime.prefill import prefill


def compiled_programs(llm: LLM) -> Iterator[jax.stages.Compiled]:
    """Decode and prefill, for the cache there is."""
    engine, model = llm.engine, llm.engine.model
    static = (model.module, model.numerics, engine.block)
    slot, ids = np.int32(0), np.zeros((1, engine.chunk), np.int32)
    step = (np.full((engine.slots, BURST), -1, np.int32), np.ones(engine.slots, np.bool_), slot, np.False_)
    fill = (ids, slot, slot, slot, slot)
    for program, args in ((partial(decode, *static, None), step), (partial(prefill, *static), fill)):
        jitted = jax.jit(program, donate_argnums=1, compiler_options=model.numerics.compiler_options)
        yield jitted.lower(engine._params, engine._state, *args).compile()
