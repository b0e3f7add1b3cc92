"""From a ``.tflite``, ``.task`` or ``.litertlm`` file to a model that runs its graph."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.readers.digest import Stamp
from converters.readers.litert import tflite
from converters.readers.litert.tflite import TfliteFile
from converters.readers.mapped import MappedFile
from converters.readers.mediapipe import package
from converters.readers.mediapipe.package import Package, Part
from converters.readers.mediapipe.parameters import GREEDY, TOP_K, TOP_P
from llmjax.errors import CheckpointError, TokenizerError
from llmjax.litert import ports
from llmjax.litert.graph import Graph, numerics_for
from llmjax.litert.model import ARCHITECTURE, GraphConfig, GraphModel
from llmjax.litert.module import EMBEDDER, MAIN, PER_LAYER, GraphModule
from llmjax.litert.ports import Ports
from llmjax.model import Origin
from llmjax.text import bundle
from llmjax.text.bundle import Ends
from llmjax.text.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)
# A part by its name in a .task, or by the model_type of a section, in small letters.
_PARTS = {package.MODEL.lower(): MAIN, "tf_lite_embedder": EMBEDDER, "tf_lite_per_layer_embedder": PER_LAYER}


def open_graph(path: str | Path, *, numerics: str | None = None) -> Graph:
    """The graph of a ``.tflite`` file with whatever signatures, to run by their names.

    Raises:
      CheckpointError: it cannot be read, or has an operator that llmjax lacks.
      ConfigError: a profile that says nothing about graphs.
    """
    return Graph(tflite.read_file(Path(path)), numerics_for(numerics))


def load_graph(path: Path, numerics: str | None = None) -> GraphModel:
    """A language model; see ``llmjax.load``.

    Raises:
      CheckpointError: the file is damaged, no language model's, or of a kind that llmjax does not run.
      ConfigError: a profile that says nothing about graphs.
      TokenizerError: its tokenizer is damaged, or lacks the tokens that the file names.
    """
    numerics_for(numerics)  # a wrong name fails before the reading
    files, found, stamp = graphs_of(path)
    model = model_of(files, path, numerics)
    model.origin = Origin(model.params, (stamp,))
    model.tokenizer = None if found is None else read_tokenizer(found, model.config.vocab_size)
    model.eos_ids = model.tokenizer.eos_ids if model.tokenizer else ()
    facts = None if found is None or found.format == "task" else _facts(found)
    if facts is not None:
        model.generation_config, model.generation_file = _generation(facts), "LlmMetadata"
    if not model.config.rewinds:
        model.module.padding = _padding(model, found, facts)
    return model


def _generation(metadata: Any) -> dict[str, Any]:
    """How ``LlmMetadata`` would have texts sampled, as ``generation_config.json`` says it."""
    sampler = metadata.sampler_params
    top_p, temperature = (float(str(np.float32(x))) for x in (sampler.p, sampler.temperature))  # as people write them
    likeliest = {"do_sample": False}
    among = {"top_k": sampler.k, "top_p": top_p, "temperature": temperature}
    found: dict[str, Any] = {
        GREEDY: likeliest,
        TOP_K: {"top_k": sampler.k, "temperature": temperature},
        TOP_P: among if top_p and temperature else likeliest,
    }.get(sampler.type, {})
    barred = list(metadata.suppress_tokens.ids)
    return found | ({"suppress_tokens": barred} if barred else {})


def _padding(model: GraphModel, found: Package | None, metadata: Any) -> int:
    """The token that fills up prefill signatures, which a graph that carries something along must tell from text: what
    ``LlmMetadata`` names, or else 0, as LiteRT-LM has it; in a file without a bundle the one the graph looks for.

    Raises:
      TokenizerError: the bundle names none of the model's.
    """
    known = ports.padding(model.module.graphs[MAIN].file, [p.name for p in model.module.prefills])
    if found is None:
        return 0 if known is None else known
    token = 0
    if metadata is not None and metadata.HasField("pad_token"):
        ids, text = list(metadata.pad_token.token_ids.ids), metadata.pad_token.token_str
        if text and (tokenizer := model.tokenizer) is not None:
            one = tokenizer.backend.token_to_id(text)
            ids = tokenizer.encode(text, add_bos=False)[:1] if one is None else [one]
        if len(ids) != 1 or not 0 <= ids[0] < model.config.vocab_size:
            rows = model.config.vocab_size
            raise TokenizerError(f"{found.path}: pad_token: expected one token below {rows}, found {text or ids!r}")
        token = ids[0]
    if known not in (None, token):
        _LOG.warning(
            f"{found.path}: prompts are filled up with token {token}, as its pad_token has it, where the graph takes "
            f"{known} for padding: what it computes is then wrong, in LiteRT-LM, too"
        )
    return token


def graphs_of(path: Path) -> tuple[dict[str, TfliteFile], Package | None, Stamp]:
    """The graphs of a file by part, the bundle they lie in, and the file as it was when it was opened.

    Raises:
      CheckpointError: the file is damaged.
    """
    if package.kind_of(path) is None:
        mapped = MappedFile(path)
        return {MAIN: tflite.read(mapped.bytes.data, str(path))}, None, mapped.stamp
    found = Package(path)
    return _files(found), found, found.stamp


def model_of(files: Mapping[str, TfliteFile], path: Path, numerics: str | None = None) -> GraphModel:
    """A language model of graphs that are read, without its tokenizer: see ``load_graph``.

    Args:
      files: by part, see ``llmjax.litert.module``.
      path: where they are from, for messages.
      numerics: see ``numerics_for``.

    Raises:
      CheckpointError: none of them steps from token to token.
    """
    main, profile = files[MAIN], numerics_for(numerics)
    if problem := ports.cache_lengths(main):
        raise CheckpointError(f"{path}: {problem}")
    if not ports.is_language_model(main):
        known = ", ".join(map(repr, main.signatures))
        raise CheckpointError(
            f"{path}: no signature decode, so this is no language model's graph; it has {known}: run them with "
            "llmjax.litert.loading.open_graph"
        )
    prefills, decode = ports.read(main)
    graphs = {MAIN: Graph(main, profile, ports.wanted(main))}
    for part, name in embedders(files, decode, path).items():
        graphs[part] = Graph(files[part], graphs[MAIN].numerics, [name])
    return GraphModel(
        architecture=ARCHITECTURE,
        config=GraphConfig.of(prefills, decode),
        params={part: graph.weights for part, graph in graphs.items()},
        numerics=graphs[MAIN].numerics,
        tokenizer=None,
        eos_ids=(),
        path=path,
        signatures=GraphModule(graphs, prefills, decode),
    )


def kind_of_part(found: Package, part: Part) -> str | None:
    """What a graph of a bundle is for; None for what text does not need: vision, audio, drafts."""
    return _PARTS.get(part.name.lower() if found.format == "task" else _model_type(part))


def _model_type(part: Part) -> str:
    """Of a section; one that does not say is the model's."""
    said = (value for key, value in part.notes.items() if key.lower() == "model_type")
    return str(next(said, package.MODEL)).lower()


def tokenizers_of(found: Package) -> list[Part]:
    """The model's vocabularies; those of other models, such as an encoder of texts, left out."""
    kinds = package.SENTENCEPIECE, package.HUGGINGFACE
    return [part for part in found.parts if part.kind in kinds and _PARTS.get(_model_type(part)) == MAIN]


def described(part: Part) -> str:
    """A part's name, with what it is for where a section says so."""
    said = _model_type(part)
    return part.name if said == package.MODEL.lower() else f"{part.name} ({said})"


def _files(found: Package) -> dict[str, TfliteFile]:
    """The graphs of a bundle by what they are for."""
    files: dict[str, TfliteFile] = {}
    for part in found.parts:
        kind = kind_of_part(found, part) if part.kind == package.GRAPH else None
        if kind is None:
            continue
        if kind in files:
            raise CheckpointError(f"{found.path}: two graphs for {kind}")
        found.check(part)
        files[kind] = tflite.read(found.view(part), f"{found.path}: {part.name}")
    if MAIN not in files:
        names = ", ".join(map(described, found.parts)) or "nothing"
        raise CheckpointError(f"{found.path}: a .{found.format} bundle without a model's graph; it holds {names}")
    return files


def embedders(files: Mapping[str, TfliteFile], decode: Ports, where: Path | str) -> dict[str, str]:
    """The parts that give what ``decode`` takes in place of tokens, and the signature of each: the first, as LiteRT-LM
    has it.

    Args:
      files: by part.
      decode: the model's signature.
      where: for messages.

    Raises:
      CheckpointError: one is missing, or does not give what one token of the model takes.
    """
    found: dict[str, str] = {}
    for port, part in ((decode.embeddings, EMBEDDER), (decode.per_layer, PER_LAYER)):
        if port is None:
            continue
        if part not in files:
            raise CheckpointError(f"{where}: its graph takes {port}, and there is no {part} to make them")
        file, shape = files[part], decode.tensors[port].shape
        found[part], signature = next(iter(file.signatures.items()))
        tensors = file.subgraphs[signature.subgraph].tensors
        given = [tensors[i] for i in signature.outputs.values()]
        taken = [tensors[i] for i in signature.inputs.values()]
        what = f"{file.where}: {found[part]}"
        if len(given) != 1 or len(taken) != 1 or taken[0].type != "INT32" or set(taken[0].shape) - {1}:
            raise CheckpointError(f"{what}: expected one token id to its embedding")
        if given[0].type != "FLOAT32" or [d for d in given[0].shape if d > 1] != [d for d in shape if d > 1]:
            raise CheckpointError(
                f"{what}: gives {given[0].type} {list(given[0].shape)}, the model takes FLOAT32 {list(shape)}"
            )
    return found


def read_tokenizer(found: Package, rows: int | None = None) -> Tokenizer | None:
    """A bundle's tokenizer, with the tokens that start and stop a text; None where there is none.

    Args:
      found: the bundle.
      rows: V, that tokens beyond are told.

    Raises:
      CheckpointError: the bundle says twice what its tokens are, or damaged.
      TokenizerError: it is damaged, or lacks these tokens.
    """
    parts, facts = tokenizers_of(found), _facts(found)
    if not parts:
        return None
    if len(parts) > 1:
        raise TokenizerError(f"{found.path}: expected one tokenizer, found {len(parts)}")
    read = _ends_of_task if found.format == "task" else _ends
    ends, bytes_to_unicode = read(found, facts) if facts else (Ends(), False)
    tokenizer = _tokenizer(found, parts[0], ends, bytes_to_unicode)
    if rows is not None and tokenizer.vocab_size > rows:
        _LOG.warning(
            f"{tokenizer.where}: {tokenizer.vocab_size} tokens, and the graph knows {rows}: texts with the others are "
            "refused; is the tokenizer the model's?"
        )
    if lost := [i for i in tokenizer.eos_ids if rows is not None and i >= rows]:
        _LOG.warning(f"{tokenizer.where}: the stop token {lost[0]} is beyond the graph's {rows}, and ends nothing")
    return tokenizer


def _facts(found: Package) -> Any:
    """What a bundle says of its model; None where nothing does.

    Raises:
      CheckpointError: it says so twice, or the section is damaged.
    """
    parts = [part for part in found.parts if part.kind == package.FACTS]
    if len(parts) > 1:
        raise CheckpointError(f"{found.path}: expected one {parts[0].name}, found {len(parts)}")
    return found.metadata(parts[0]) if parts else None


def _tokenizer(found: Package, part: Part, ends: Ends, bytes_to_unicode: bool) -> Tokenizer:
    where = f"{found.path}: {part.name}"
    if part.kind == package.SENTENCEPIECE:
        return bundle.from_sentencepiece(found.read(part), where, ends, bytes_to_unicode=bytes_to_unicode)
    return bundle.from_huggingface(found.unpacked(part), where, ends)


def _ends(found: Package, metadata: Any) -> tuple[Ends, bool]:
    """Of ``LlmMetadata``."""

    def token(union: Any) -> Any:
        return tuple(union.token_ids.ids) if union.HasField("token_ids") else union.token_str

    if metadata.kv_cache_init_value:
        raise CheckpointError(f"{found.path}: kv_cache_init_value: expected 0, found {metadata.kv_cache_init_value}")
    template = metadata.jinja_prompt_template or None
    if template is None and metadata.HasField("prompt_templates"):
        said = metadata.prompt_templates
        roles = {role: getattr(said, role) for role in ("user", "model", "system")}
        template = bundle.spliced_template({role: (a.prefix, a.suffix) for role, a in roles.items()})
    start = token(metadata.start_token) if metadata.HasField("start_token") else ()
    return Ends(start, tuple(map(token, metadata.stop_tokens)), template), False


def _ends_of_task(found: Package, metadata: Any) -> tuple[Ends, bool]:
    """Of ``LlmParameters``."""
    kind = metadata.WhichOneof("start_token_union")
    start = () if kind is None else (metadata.start_token_id,) if kind == "start_token_id" else metadata.start_token
    one, several = metadata.prompt_template, metadata.prompt_templates
    if metadata.HasField("prompt_templates"):
        roles = {role: getattr(several, f"{role}_template") for role in ("user", "model", "system")}
        template = bundle.affixes_template({role: (a.prompt_prefix, a.prompt_suffix) for role, a in roles.items()})
    else:
        affixes = {"user": (one.prompt_prefix, one.prompt_suffix), "model": ("", "")}
        template = bundle.affixes_template(affixes, one.session_prefix)
    stop = (*metadata.stop_tokens, *((i,) for i in metadata.stop_token_ids))
    return Ends(start, stop, template), 1 in metadata.input_output_normalizations
