"""The compiled programs of a model, to look into."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from llmjax import LLM
from llmjax.model import Model
from llmjax.runtime.decode import BURST, decode
from llmjax.runtime.prefill import prefill
from llmjax.runtime.state import State
from llmjax.runtime.terms import NARROW, WIDE


def compiled_programs(
    model: Model, params: Any, state: State, table: np.ndarray, chunk: int = 128, block: int = 128
) -> Iterator[jax.stages.Compiled]:
    """Decode and prefill, for slots and cache as the state and the table of its pages have them."""
    static, slots = (model.module, model.numerics, block), len(state.active)
    zero, ids = np.int32(0), np.zeros((1, chunk), np.int32)
    terms = ({n: jax.tree.map(lambda x: x[0], getattr(state, n)) for n in names} for names in (WIDE, NARROW))
    step = (table, np.full((slots, BURST), -1, np.int32), np.ones(slots, np.bool_), np.int32(1), np.False_)
    fill = (*terms, ids, zero, table[0], zero, zero, zero, np.False_)
    for program, args in ((partial(decode, *static, None), step), (partial(prefill, *static), fill)):
        jitted = jax.jit(program, donate_argnums=1, compiler_options=model.compiler_options)
        yield jitted.lower(params, state, *args).compile()


def engine_programs(llm: LLM) -> Iterator[jax.stages.Compiled]:
    """Those of an engine with a cache."""
    engine = llm.engine
    state, table = engine.store.state, engine.store.table
    assert state is not None
    return compiled_programs(engine.model, engine._params, state, table, engine.chunk, engine.block)
