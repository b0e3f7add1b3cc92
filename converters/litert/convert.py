"""``llmjax.convert(..., to="litertlm")``, ``task`` and ``tflite``: files that LiteRT-LM and MediaPipe run."""

import dataclasses
import functools
import logging
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.litert import container, proof, templates, vocabulary
from converters.litert import weights as weights_lib
from converters.litert.export import Export, ExportedGraph, usual_jax
from converters.litert.metadata import llm_metadata, stop_ids, stop_texts
from converters.litert.templates import Carried
from converters.mediapipe import bundle
from converters.readers.source import Source
from llmjax.checkpoint.ends import generation
from llmjax.checkpoint.opened import Checkpoint, opened
from llmjax.checkpoint.parameters import OnParameter
from llmjax.checkpoint.plan import Plan, describe
from llmjax.errors import CheckpointError, ConfigError, OutputError, RequestError, TokenizerError, amount
from llmjax.lora.adapter import AnyLora
from llmjax.models.config import DecoderConfig
from llmjax.outside.paths import checked_path
from llmjax.outside.values import FLAG, POSITIVE, check, plain
from llmjax.outside.whole import expect_new, whole_file
from llmjax.runtime import memory
from llmjax.runtime.params import SamplingParams
from llmjax.text.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)
FORMATS: tuple[str, ...] = ("litertlm", "task", "tflite")
# LiteRT's own exporter has these.
_CONTEXT, _LENGTHS = 1280, (8, 128, 512)
# Float32 weights of models that are verified unless told otherwise.
_VERIFIED = 10**9
NO_TEMPLATE = "none"
# Of memory that a proof takes beside the weights.
_PROGRAMS = 5 * 10**8


@dataclasses.dataclass(frozen=True)
class _Job:
    """What is written, checked."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer | None
    carried: Carried
    verify: bool


@usual_jax()
def convert_source(
    source: str | Path,
    destination: str | Path,
    *,
    to: str,
    quantize: str | Path | Mapping[str, Any] | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    lora: AnyLora | None = None,
    report: OnParameter = lambda done, total: None,
    activations: str = "dynamic-int8",
    context: int | None = None,
    prefill_lengths: Sequence[int] | None = None,
    chat_template: str | Path | None = None,
    vocab: str | Path | None = None,
    verify: bool | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> None:
    """Writes a checkpoint as a ``.litertlm`` or ``.task`` bundle, or its graph alone as ``.tflite``.

    Args:
      source: anything ``llmjax.load`` reads.
      destination: a new file with the format's ending.  It appears under its name when it is whole, and proven.
      to: ``litertlm``, ``task`` or ``tflite``.
      quantize: see ``converters.litert.export.export_graph``; and ``activations``.
      config: see ``llmjax.load``; ``eos_token_id`` among its keys says what ends a text.
      lora: an adapter to merge into the weights.
      report: called after each parameter.
      activations: ``dynamic-int8`` or ``float``.
      context: tokens that the caches hold; None for 1280, or as many as the model has.
      prefill_lengths: tokens that the prefill signatures take; None for those of 8, 128 and 512 that are below it.
      chat_template: a Jinja file instead of the checkpoint's own template; ``none`` leaves it out.
      vocab: for ``task``: a SentencePiece model, or a directory with ``tokenizer.json``, instead of the checkpoint's.
      verify: run the file against the checkpoint before it gets its name; None for models whose weights take less than
        1 GB as float32.
      announce: told what is written before it begins, and what was shown.

    Raises:
      CheckpointError: the source is damaged, the destination exists or cannot be written, or the file does not
        compute what the checkpoint does.
      OutputError: the disk lacks the room.
      ConfigError: an option does not fit the model or the format.
      LoraError: the adapter is damaged, or does not fit.
      TokenizerError: there is no tokenizer, it does not fit the model, or its chat template cannot be carried over.
    """
    path = _destination(destination, to)
    if verify is not None:
        check("verify", verify := plain(verify), FLAG, ConfigError)
    _check_options(to, {"chat_template": chat_template, "vocab": vocab})
    with opened(source, quantize, config, lora, weights_lib.check) as checkpoint:
        job = _prepared(checkpoint, to, chat_template, verify)
        context, lengths = _lengths(checkpoint.plan.config, context, prefill_lengths)
        if to == "task":
            spelled = vocabulary.sentencepiece(checkpoint.source, _required(job.tokenizer), job.carried, vocab)
        parts = _sections(job, context) if to == "litertlm" else []
        export = Export(checkpoint, activations, context, lengths)
        announce(_plan_text(job, export.graph, path))
        _check_room(export.graph, path, 2 if to == "task" else 1)
        write = functools.partial(export.write, report=report)
        with whole_file(path, new=True) as place:
            graph_file = place.with_name(f"{place.name}.graph") if to == "task" else place
            with open(graph_file, "xb") as file:
                if to == "litertlm":
                    notes = {"model_type": "tf_lite_prefill_decode"}
                    graph_section = container.Section("TFLiteModel", write, notes, export.graph.size)
                    container.write(file, [*parts, graph_section], {"Authors": "llmjax"})
                else:
                    write(file)
            if to == "task":
                bundle.write(place, _bundle_config(job, graph_file, *spelled), spelled[0])
                graph_file.unlink()
            if job.verify:
                try:
                    found = proof.prove(place, checkpoint, export.forms, job.tokenizer)
                except RequestError as error:  # logits that are no numbers
                    raise CheckpointError(f"{path}: cannot be run against the checkpoint: {error}") from None
                announce(found.to_text())
                proof.refuse(found, path)


def _prepared(checkpoint: Checkpoint, to: str, chat_template: str | Path | None, verify: bool | None) -> _Job:
    source, plan = checkpoint.source, checkpoint.plan
    tokenizer, carried = None, Carried()
    if to != "tflite":
        tokenizer = vocabulary.tokenizer_of(source, checkpoint.override, plan.config.vocab_size)
        tokenizer = _with_stops(_with_template(tokenizer, chat_template), source)
        carried = templates.around_turns(tokenizer) if to == "task" else templates.carry(tokenizer)
        _tell(tokenizer, carried)
    floats = 4 * sum(math.prod(assignment.shape) for assignment in plan.assignments)
    wanted = floats < _VERIFIED if verify is None else verify
    if wanted:
        _check_memory(plan)
    return _Job(checkpoint, tokenizer, carried, wanted)


def _destination(destination: str | Path, to: str) -> Path:
    path = checked_path("destination", destination, CheckpointError)
    if path.suffix != f".{to}":
        raise ConfigError(f"{path}: expected a name that ends in .{to}, by which LiteRT-LM and MediaPipe know the file")
    expect_new(path)
    return path


def _check_options(to: str, options: Mapping[str, Any]) -> None:
    places = {"chat_template": ("litertlm", "task"), "vocab": ("task",)}
    for name, value in options.items():
        if value is not None and to not in places[name]:
            raise ConfigError(f"{name}: only for {' and '.join(places[name])} files, not for {to}")


def _lengths(config: DecoderConfig, context: Any, lengths: Any) -> tuple[Any, Any]:
    """What is not given."""
    if context is not None:
        check("context", plain(context), POSITIVE, ConfigError)
    else:
        most = config.max_position_embeddings
        context = min(_CONTEXT, most if config.renewal is None else min(most, int(config.renewal)))
    if lengths is None:
        lengths = tuple(n for n in _LENGTHS if n < context) or (context,)
    return context, lengths


def _check_memory(plan: Plan) -> None:
    sizes: dict[str, int] = Counter()
    for assignment in plan.assignments:
        layer = re.match(r"layers\.\d+\.", assignment.parameter)
        sizes[layer[0] if layer else assignment.parameter] += 4 * math.prod(assignment.shape)
    # A layer or a table as floats, what it is made of, and the programs.
    needed, free = max(sizes.values()) * 3 // 2 + _PROGRAMS, memory.available()
    if needed > free:
        raise CheckpointError(
            f"verify: running the file against the checkpoint takes about {needed / 1e9:.1f} GB of memory, of which "
            f"{free / 1e9:.1f} GB are free; leave it out (verify=False, --no-verify), or use a larger machine"
        )


def _check_room(graph: ExportedGraph, path: Path, copies: int) -> None:
    folder = next(p for p in path.absolute().parents if p.exists())
    needed, free = copies * graph.size, shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"{path}: writing it takes {needed / 1e6:,.0f} MB of {folder}, which has {free / 1e6:,.0f} MB left; make "
            "room, or write to another disk"
        )


def _plan_text(job: _Job, graph: ExportedGraph, path: Path) -> str:
    plan = job.checkpoint.plan
    kind, layers, rows = plan.architecture.model_type, plan.config.num_hidden_layers, plan.config.vocab_size
    caches = 4 * sum(math.prod(shape) for shape in graph.caches.values())
    lines = [
        f"{path}: {kind}, {amount(layers, 'layer')}, {rows:,} tokens; {', '.join(graph.signatures)}; "
        f"about {graph.size / 1e6:,.1f} MB",
        f"it takes {(graph.weight_bytes + caches) / 1e6:,.1f} MB to run: weights {graph.weight_bytes / 1e6:,.1f} MB, "
        f"caches of {graph.context:,} tokens {caches / 1e6:,.1f} MB",
    ]
    if not job.verify:
        lines.append("it is not run against the checkpoint (verify=True, --verify)")
    return "\n".join(lines)


def _required(tokenizer: Tokenizer | None) -> Tokenizer:
    assert tokenizer is not None
    return tokenizer


def _with_template(tokenizer: Tokenizer, given: str | Path | None) -> Tokenizer:
    if given is None:
        return tokenizer
    if str(given) == NO_TEMPLATE:
        return tokenizer.with_template(None, tokenizer.where)
    path = checked_path("chat_template", given, TokenizerError)
    try:
        template = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "expected UTF-8 text"
        raise TokenizerError(f"chat_template: {path}: cannot read it: {reason}") from None
    return tokenizer.with_template(template, str(path))


def _with_stops(tokenizer: Tokenizer, source: Source) -> Tokenizer:
    """Ends texts where the checkpoint's own ``stop_strings`` end them, too."""
    said, file = generation(source)
    try:
        found = SamplingParams(stop=said.get("stop_strings") or ())
    except RequestError as error:
        raise ConfigError(f"{source.directory / file}: stop_strings: {error}") from None
    return dataclasses.replace(tokenizer, stop=(*tokenizer.stop, *found.stop))


def _tell(tokenizer: Tokenizer, carried: Carried) -> None:
    """What a user would not expect of the bundle."""
    if not (carried.source or carried.affixes):
        more = ": a .task file holds what stands around each turn, and this one does more"
        _LOG.warning(f"{tokenizer.where}: no chat template goes along{more if tokenizer.chat_template else ''}")
    elif not carried.opens_bos:
        _LOG.warning(
            f"{tokenizer.where}: LiteRT-LM puts {tokenizer.piece(tokenizer.prefix_ids[0])!r} before every text, which "
            "the tokenizer does with plain texts and the chat template does not"
        )
    if tokenizer.tools_template is not None:
        _LOG.warning(
            f"{tokenizer.where}: the template for conversations with tools (tool_use) stays behind: there is one place"
        )
    if carried.changes_texts:
        _LOG.warning(
            f"{tokenizer.where}: the chat template trims or changes texts, which a .task file takes as they are"
        )
    if tokenizer.suffix_ids:
        _LOG.warning(f"{tokenizer.where}: the tokenizer puts tokens behind a text, which LiteRT-LM does not")


def _sections(job: _Job, context: int) -> list[container.Section]:
    """All but the graph."""
    tokenizer, source, plan = _required(job.tokenizer), job.checkpoint.source, job.checkpoint.plan
    facts = describe(source, job.checkpoint.override)[0]
    model_type, rows = str(facts.get("model_type", plan.architecture.model_type)), plan.config.vocab_size
    metadata = llm_metadata(tokenizer, job.carried, model_type, context, rows, *generation(source))
    return [
        container.Section("LlmMetadataProto", metadata.SerializeToString(deterministic=True)),
        vocabulary.section(source, tokenizer, rows),
    ]


def _bundle_config(job: _Job, graph: Path, model: bytes, spelled: bool, where: str) -> bundle.BundleConfig:
    """MediaPipe's options for a ``.task`` file, whose metadata has texts for tokens."""
    tokenizer, carried = _required(job.tokenizer), job.carried
    around = {
        f"prompt_{part}_{role}": text
        for role, texts in carried.affixes.items()
        for part, text in zip(("prefix", "suffix"), texts, strict=True)
    }
    stop = [tokenizer.piece(i) for i in stop_ids(tokenizer, carried, job.checkpoint.plan.config.vocab_size)]
    texts = stop_texts(tokenizer)
    return bundle.BundleConfig(
        tflite_model=str(graph),
        tokenizer_model=where,
        start_token=tokenizer.piece(tokenizer.prefix_ids[0]) if tokenizer.prefix_ids else "",
        stop_tokens=[*stop, *texts],
        output_filename="",
        enable_bytes_to_unicode_mapping=spelled,
        strict=not texts,
        **around,
    )
