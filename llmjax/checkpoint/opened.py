"""Checkpoints that are open, for what reads them more than once; one that is to be written in another form is planned,
too, with the adapter that goes into its weights."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from converters.readers.source import Source
from llmjax.checkpoint.graph_source import open_checkpoint
from llmjax.checkpoint.loading import find_model, read_override
from llmjax.checkpoint.parameters import adapter_for
from llmjax.checkpoint.plan import Override, Plan
from llmjax.checkpoint.rescue import proven_plan
from llmjax.lora.adapter import Adapter, AnyLora
from llmjax.lora.merge import Merge
from llmjax.quant.schemes import Recipe, parse


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What is written.

    Attributes:
      source: it, open.
      plan: how it is read.
      recipe: how it is quantized; None where it is not.
      override: keys that win over its configuration.
      adapter: what is merged into the weights, if anything.
    """

    source: Source
    plan: Plan
    recipe: Recipe | None
    override: Override
    adapter: Adapter | None

    def merge(self) -> Merge:
        """The adapter, for one reading of the weights."""
        return Merge.of(self.adapter, "merged", None)


@contextlib.contextmanager
def held(where: str | Path | Source) -> Iterator[Source]:
    """A checkpoint's source, closed in the end; one that is open already stays so.

    Raises:
      CheckpointError: it is damaged.
    """
    if not isinstance(where, str | Path):
        yield where
        return
    with contextlib.closing(open_checkpoint(find_model(where))) as source:
        yield source


@contextlib.contextmanager
def opened(
    source: str | Path,
    quantize: str | Path | Mapping[str, Any] | None,
    config: str | Path | Mapping[str, Any] | None,
    lora: AnyLora | None,
    check: Callable[[Recipe], None] = lambda recipe: None,
) -> Iterator[Checkpoint]:
    """Opens a checkpoint.

    Args:
      source: anything ``llmjax.load`` reads.
      quantize, config: see ``llmjax.load``.
      lora: an adapter to merge.
      check: refuses recipes that the form to be written has no place for.

    Raises:
      CheckpointError: the source is damaged.
      ConfigError: an option or a scheme does not fit.
      LoraError: the adapter is damaged, or does not fit.
    """
    override, recipe = read_override(config), None if quantize is None else parse(quantize)
    if recipe is not None:
        check(recipe)
    found = open_checkpoint(find_model(source))
    try:
        plan = proven_plan(found, recipe, override)
        yield Checkpoint(found, plan, recipe, override, adapter_for(found, plan, lora))
    finally:
        found.close()
