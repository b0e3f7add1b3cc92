"""``llmjax.compare``: what another runtime computed against the reference; a verdict, and where and why they part."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmjax.checkpoint.identity import model_facts
from llmjax.checkpoint.loading import find_model, load
from llmjax.errors import LlmjaxError, RequestError
from llmjax.litert.model import GraphModel
from llmjax.model import Model, check_ids
from llmjax.oracle import padding, pairs
from llmjax.oracle.beneath import WIDE
from llmjax.oracle.clock import Pulse
from llmjax.oracle.comparison import Comparison, of_file
from llmjax.oracle.declared import Allowed, allowed, narrowly_stored
from llmjax.oracle.dump import Dump, in_memory
from llmjax.oracle.dumps.opening import each, opened, refuse_reference
from llmjax.oracle.floors import MARGIN
from llmjax.oracle.measure import MismatchError, Tap, fitted, leaving, measure, row
from llmjax.oracle.metrics import logits_report
from llmjax.oracle.names import named
from llmjax.oracle.patching import PROVEN, SEARCH, SURE, judged
from llmjax.oracle.stages import Stages
from llmjax.oracle.texts import together
from llmjax.oracle.trace import Trace, trace
from llmjax.oracle.two_dumps import two_dumps
from llmjax.oracle.verdict import Explained, caveats, explain, of_few_bits, of_the_cache
from llmjax.outside.paths import checked_path
from llmjax.outside.values import MOST_FLOAT, check, integer, number
from llmjax.runtime.memory import size

# Of logits at a time: the reference's, the candidate's, a trial's, ...; and bytes that are worth a word.
_COPIES, _LARGE = 6, 10**9
_GRAPH = "the reference is a graph's, so there are neither floors nor proofs"

AnyDump = Dump | Trace | str | Path
AnyReference = Model | Dump | Trace | str | Path | None


def compare(
    reference: AnyReference,
    candidate: Model | AnyDump,
    *,
    model: Model | str | Path | None = None,
    names: str | Path | None = None,
    arithmetic: str | None = None,
    token_ids: Sequence[int] | None = None,
    texts: int | None = None,
    search: float = SEARCH,
    progress: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Compares what another runtime computed with the reference.

    Args:
      reference: our model (or a checkpoint's path), which then computes the reference for the candidate's tokens; or a
        dump of one, or a directory of such dumps (``oracle.vectors``).  None with ``model``.
      candidate: a dump, a directory of dumps, a file of llama.cpp's (``oracle.dumps``), or a model.
      model: ours, for the floors and proofs beside a reference that is a dump; by default the one that the dump names,
        if its weights are the same.
      names: a TOML file from the candidate's names to ours (see ``oracle.names``).
      arithmetic: the only class that may explain differences (``oracle.floors.CLASSES``), or several that may together,
        with commas between them.
      token_ids: what two models are compared on; a sentence by default.
      texts: of a candidate of several texts, how many to compare: the first ones; all by default.
      search: for how many seconds causes of a difference are looked for, 0 for until all are tried.  What is left
        untried is told; the verdict does not hang on it, but for mistakes beneath the floor of few bits, or of a class
        that nobody declared.
      progress: is told of each text of several, of memory where logits take much, before causes are looked for, and
        now and then of how far that, or measuring before it, is.

    Raises:
      RequestError: a dump is malformed, ``texts`` is none of 1, 2, ..., or ``search`` is no time.
    """
    check("search", search, number(0, MOST_FLOAT, "seconds, 0 for no end"), RequestError)
    if (
        isinstance(reference, (str, Path))
        and not (checked_path("compare", reference, RequestError) / "manifest.json").exists()
    ):
        if model is None and (Path(reference).exists() or str(reference) == "smollm2") and not _is_dump(reference):
            refuse_reference(reference)
            reference = load(reference)
    if isinstance(reference, Model):
        model, reference = reference, None
    if model is not None and not isinstance(model, Model):
        model = load(model)
    pairs.check_reference(model)
    given = [] if reference is None else _dumps(reference, "reference")
    ours = given[0] if given else None
    if isinstance(model, GraphModel) and isinstance(candidate, Model) and not isinstance(candidate, GraphModel):
        model, candidate = candidate, model  # a graph's steps are measured by those of the model it was made of
    if token_ids is not None and (given or not isinstance(candidate, Model)):
        raise RequestError("token_ids: what two checkpoints are compared on (--prompt, --ids); a dump has its own")
    if isinstance(candidate, Model):
        if len(given) > 1:
            raise RequestError(f"{reference}: {len(given)} texts; a model is compared with one of them")
        if ours is not None:
            ids = ours.token_ids.tolist()
        elif model is not None:
            ids = pairs.text(model, candidate, token_ids)
        else:
            raise RequestError("compare: two models need a reference model")
        candidate = pairs.traced(candidate, ids)
    note = ""
    if model is None and ours is not None:
        model, note = _model_of(ours)
    several = _dumps(candidate, "candidate", model)
    if texts is not None:
        check("texts", texts, integer(1, len(several)), RequestError)
    if len(several) > 1 and len(given) == 1:
        raise RequestError(f"{several[0].path}: {len(several)} texts; a model is compared with them (--model), no dump")
    by_name = {Path(dump.path).name: dump for dump in given}

    def one(theirs: Dump, tried: Sequence[str], prove: bool) -> Comparison:
        before, mine, why = ours, model, note
        if len(given) > 1 and (before := by_name.get(Path(theirs.path).name)) is None:
            raise RequestError(f"{theirs.path}: expected one of the reference's names ({', '.join(by_name)})")
        if isinstance(model, GraphModel):
            before, mine, why = ours or _dumps(pairs.beside(model, theirs), "reference")[0], None, _GRAPH
        try:
            return _compare(before, theirs, mine, why, names, arithmetic, tried, prove, search, len(several), progress)
        except MismatchError as error:
            coverage = {"taps": 0, "of": len(theirs.arrays), "tokens": len(theirs.token_ids), "missing": []}
            subject = _subject(before, theirs, mine)
            return Comparison("not_comparable", None, str(error), coverage | of_file(theirs), subject=subject)

    return together(several, texts, max(len(several), len(given)), one, progress)


def _is_dump(path: str | Path) -> bool:
    folder = Path(path)
    return folder.is_dir() and not (folder / "config.json").exists()


def _dumps(what: AnyDump, role: str, model: Model | None = None) -> Sequence[Dump]:
    """One, or one for each text of a directory of dumps, or of a candidate's file."""
    if isinstance(what, Dump):
        return [what]
    if isinstance(what, Trace):
        return [in_memory(role, what.manifest, what.activations)]
    return opened(what, model) if role == "candidate" else each(what)


def _model_of(reference: Dump) -> tuple[Model | None, str]:
    """The model a dump of ours was made by, or why it cannot be had."""
    path, sha = reference.manifest.get("model"), reference.manifest.get("weights_sha256")
    if not isinstance(path, str) or not isinstance(sha, str):
        return None, "the reference names no model (--model), so there are neither floors nor proofs"
    if reference.manifest.get("interventions"):
        return None, "the reference was traced with interventions, so nothing is proven"
    try:
        model = load(find_model(path))
        found = model_facts(model)["weights_sha256"]
    except (LlmjaxError, OSError) as error:
        return None, f"the reference's model cannot be loaded (--model): {' '.join(str(error).split())}"
    if isinstance(model, GraphModel):
        return None, _GRAPH
    if found != sha:
        return None, f"{path}: its weights are not those the reference was made of (--model), so nothing is proven"
    return model, ""


def _subject(ours: Dump | None, theirs: Dump, model: Model | None) -> dict[str, Any]:
    keys = ("runtime", "runtime_version", "model", "dtype", "numerics", "quantization", "kv_cache", "device", "cpu")
    declared = {key: theirs.manifest[key] for key in keys if theirs.manifest.get(key) is not None}
    return {
        "reference": ours.path if ours else None,
        "model": str(model.path) if model else None,
        "candidate": theirs.path,
        "declared": json.loads(json.dumps(declared, default=str)),
        "token_ids": theirs.token_ids.tolist(),
        "token_ids_sha256": hashlib.sha256(theirs.token_ids.astype("<i4").tobytes()).hexdigest(),
    }


def _compare(
    ours: Dump | None,
    theirs: Dump,
    model: Model | None,
    note: str,
    names: str | Path | None,
    arithmetic: str | None,
    tried: Sequence[str],
    prove: bool,
    search: float,
    of: int,
    progress: Callable[[str], None],
) -> Comparison:
    """One dump ``of`` several, by the classes ``tried`` before all others; faults are searched for if they are to be
    proven."""
    permitted = allowed(theirs.manifest, arithmetic, {array.dtype for array in theirs.arrays.values()})
    subject = _subject(ours, theirs, model)
    if ours is not None:
        _same_ids(ours.token_ids, theirs.token_ids, model)
    if model is None:
        assert ours is not None
        return two_dumps(ours, theirs, permitted, note, names, subject)
    ids, theirs = _fed(theirs, model), narrowly_stored(theirs, permitted)
    stages = Stages(model, ids)
    known = named(theirs, stages.shapes, model, names, stages.twice)
    reference = _reference(ours, theirs, model, stages)
    if (need := _COPIES * 4 * int(np.prod(stages.shapes["logits"]))) > _LARGE and "logits" in known.taps:
        progress(f"memory: up to {size(need)} for logits {stages.shapes['logits']}, beside the weights")
    pulse = Pulse(progress)
    taps: list[Tap] = []
    value: np.ndarray | None = None
    for classes in _batches(permitted, tried, bool(theirs.kind)):
        taps = []
        for both in measure(stages, known, reference, classes, pulse):
            taps.append(both[0])
            value = both[1]
        found = explain(
            taps, dataclasses.replace(permitted, singles=tuple(c for c in permitted.singles if c in classes))
        )
        if not found.beyond:
            break
    if found.beyond and prove:
        most = f", for {search:g} s at most" if search else ""
        progress(f"different: {found.beyond[0].name} is beyond its floor; looking for the cause{most}")
    proven: list[dict[str, Any]] = []
    if prove:
        found, proven = judged(stages, known, taps, found, permitted, search, of, pulse)
        if not _sure(proven):

            def holds(dump: Dump) -> bool:
                rest = _compare(None, dump, model, note, None, arithmetic, tried, False, search, of, progress)
                return rest.explained_by is not None and (permitted.declared or rest.explained_by not in WIDE)

            proven = padding.masked(proven, known, stages, holds)
    identical = all(tap.equal for tap in taps)
    logits: dict[str, Any] | None = None
    positions: Sequence[Mapping[str, Any]] = ()
    if taps[-1].name == "logits" and value is not None:
        noise = taps[-1].floor(found.classes, whole=True)[0] / MARGIN
        shown = fitted(known, "logits", stages.shapes["logits"], value)
        logits, positions = logits_report(value, shown, ids, noise, known.window("logits"))
    missing = [tap for tap in stages.shapes if tap not in known.taps]
    coverage = {
        "taps": len(taps),
        "of": len(stages.shapes),
        "tokens": len(ids),
        "missing": missing,
        "unknown": list(known.unknown),
        "unmatched": list(known.unmatched),
        **of_file(theirs),
    }
    verdict = "identical" if identical else "different" if found.beyond else "equivalent"
    rows = [row(tap, tap.floor(found.classes, whole=True)[0]) for tap in taps]
    first = _first(taps, found)
    return Comparison(
        verdict=verdict,
        explained_by=found.name if verdict == "equivalent" else None,
        reason=_reason(verdict, found, permitted, proven, missing, theirs, model, [*known.taps] == ["logits"]),
        coverage=coverage,
        logits=logits,
        taps=rows,
        first_divergence=None if verdict != "different" else first,
        faults=proven,
        positions=positions,
        subject=subject,
        map={} if theirs.kind else leaving(taps),
    )


def _batches(permitted: Allowed, tried: Sequence[str], known: bool) -> Iterator[tuple[str, ...]]:
    """Which classes to measure: declared ones at once, else float32 alone first, which holds most often, and what held
    of the text before, beside few bits bfloat16 (see ``judged``)."""
    base = permitted.singles if "float32" in permitted.singles else ("float32", *permitted.singles)
    if not permitted.declared or (known and base is permitted.singles):
        yield tuple(n for n in base if n in ("float32", *tried) or (n == "bfloat16" and WIDE & {*tried}))
    yield base


def _fed(theirs: Dump, model: Model) -> np.ndarray:
    try:
        return check_ids(theirs.token_ids.tolist(), model, f"{theirs.path}: token_ids")
    except RequestError as error:
        raise MismatchError(str(error)) from None


def _same_ids(ours: np.ndarray, theirs: np.ndarray, model: Model | None) -> None:
    if np.array_equal(ours, theirs):
        return
    first = int(ours[0])
    bos = model.tokenizer.bos_id if model and model.tokenizer else None
    word = "BOS" if bos == first or bos is None else "the first token"
    if np.array_equal(theirs, ours[1:]):
        raise MismatchError(f"token ids differ: {word} ({first}) is missing in the candidate's")
    if np.array_equal(ours, theirs[1:]):
        doubled = len(theirs) > 1 and theirs[0] == theirs[1]
        what = "is doubled" if doubled else "has one more token before it, a BOS that the reference lacks:"
        raise MismatchError(
            f"token ids differ: {'BOS' if doubled else 'the candidate'} {what} ({int(theirs[0])}) in the candidate's"
        )
    if len(ours) != len(theirs):
        raise MismatchError(f"token ids differ: the reference has {len(ours)} tokens, the candidate {len(theirs)}")
    at = int(np.flatnonzero(ours != theirs)[0])
    raise MismatchError(f"token ids differ: at position {at} the reference has {ours[at]}, the candidate {theirs[at]}")


def _reference(ours: Dump | None, theirs: Dump, model: Model, stages: Stages) -> Callable[[str], np.ndarray | None]:
    """The reference's values: of its dump; for a candidate of our own making what ``llmjax trace`` gives, in every
    bit; else what the stages compute."""
    if ours is not None:
        known = named(ours, stages.shapes, model, None, stages.twice)
        return lambda tap: fitted(known, tap, stages.shapes[tap], None) if tap in known.taps else None
    if theirs.manifest.get("runtime") == "llmjax" and theirs.manifest.get("numerics") == model.numerics.label:
        names = [name for name in theirs.arrays if name in stages.shapes]
        if names and theirs.manifest.get("weights_sha256") == model_facts(model)["weights_sha256"]:
            return trace(model, stages.ids.tolist(), names).activations.get
    return lambda tap: None


def _first(taps: Sequence[Tap], found: Explained) -> dict[str, Any] | None:
    """The first tap above its floor: in the whole run, or in its own step."""
    for tap in taps:
        floor = float(tap.floor(found.classes, whole=True)[0])
        if tap.gap.error > floor:
            return {"tap": tap.name, "token": tap.gap.token, "error": tap.gap.error, "floor": floor}
        if tap in found.beyond:
            assert tap.local is not None
            at = int(np.argmax(tap.local / tap.floor(found.classes)))
            own = float(tap.local[at]), float(tap.floor(found.classes)[at])
            return {"tap": tap.name, "token": tap.gap.token, "error": own[0], "floor": own[1]}
    return None


def _reason(
    verdict: str,
    found: Explained,
    permitted: Allowed,
    proven: Sequence[Mapping[str, Any]],
    missing: Sequence[str],
    theirs: Dump,
    model: Model,
    alone: bool = False,
) -> str:
    """One sentence; of logits ``alone``, whose floor is that of all steps together, with what they do not show."""
    who = "known of the program" if theirs.kind and theirs.manifest.get("numerics") else "declared"
    declared = f" ({who}: {permitted.words})" if permitted.declared else ""
    if verdict == "identical":
        return "every value is the same in every bit"
    bos = _bos_note(theirs, model)
    if verdict == "equivalent":
        lossy = " and the file's own rounding" if any(w.rounding for w in theirs.windows.values()) else ""
        few = "; by logits alone, of which a fault within that floor does not show" if alone else ""
        if len(theirs.token_ids) == 1:
            few += "; of one token, which attends to itself alone: rotation, mask, window and scale do not show"
        if not permitted.declared and found.classes != ("float32",):
            few += "; nothing is declared, so that is the narrowest that is wide enough, not what was run"
        few += of_the_cache(found, permitted) + of_few_bits(found, missing)
        if found.looked[0] < found.looked[1]:
            few += "; {} of {} mistakes beneath that floor were looked for (--search)".format(*found.looked)
        return f"every step is within the floor of {found.name} arithmetic{lossy}{declared}{few}{bos}"
    parts = []
    for module, best in ((fault["module"], fault["causes"][0]) for fault in proven[:3]):
        why = best["cause"] if best["cause"] == "unknown" else f"{best['cause']}: {best['detail']}"
        if 0 < best["explains"] < SURE:
            why += f", which explains {best['explains']:.0%} of it"
        parts.append(f"{module} ({why})")
    more = f" and {len(proven) - 3} more" if len(proven) > 3 else ""
    count, of = (sum(fault["tried"][i] for fault in proven) for i in (0, 1))
    more += f"; in the time given {count} of {of} causes were tried (--search)" if count < of else ""
    advice = f"; {advice}" if (advice := _advice(missing, found)) else ""
    why = f"{caveats(permitted, theirs, bool(proven) and _sure(proven))}{of_few_bits(found, missing)}{advice}{bos}"
    told = any(fault["causes"][0]["cause"] == "padding" for fault in proven)
    note = "" if told else padding.note(theirs.token_ids)
    return f"no allowed arithmetic explains {', '.join(parts)}{more}{declared}{why}{note}"


def _advice(missing: Sequence[str], found: Explained) -> str:
    """What a coarser dump cannot tell, and what to dump next."""
    resids = [tap for tap in missing if tap.endswith(".resid")]
    if resids:
        return f"where it begins cannot be said without layers.*.resid ({len(resids)} are missing): dump them next"
    beyond = found.beyond[0].name
    layer = beyond.rsplit(".resid", 1)[0]
    inside = [tap for tap in missing if tap.startswith(f"{layer}.")]
    return f"dump {layer}.* next to see where in the layer" if beyond.endswith(".resid") and inside else ""


def _sure(proven: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a known mistake explains each of the faults."""
    return all(fault["causes"][0]["explains"] >= PROVEN for fault in proven)


def _bos_note(theirs: Dump, model: Model) -> str:
    ids, tokenizer = theirs.token_ids, model.tokenizer
    if tokenizer is None or tokenizer.bos_id is None:
        return ""
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_id:
        return "; note: BOS is doubled in the candidate's token ids"
    if model.architecture.needs_bos and ids[0] != tokenizer.bos_id:
        return "; note: BOS is missing in the candidate's token ids"
    return ""
