"""``llmjax compare``: metrics, dumps and their faults, names, verdicts, what patching proves, causes, the command."""

import dataclasses
import fnmatch
import json
import re
import time
import types
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import llmjax
from llmjax.cli.main import main
from llmjax.errors import RequestError
from llmjax.models import delta
from llmjax.models.scalings import Yarn, plain_frequencies
from llmjax.numerics import Numerics
from llmjax.oracle import clock, floors, padding, patching
from llmjax.oracle import dump as dumps
from llmjax.oracle.beneath import held, worth
from llmjax.oracle.causes import base, blocks, catalogue, rotation, weights
from llmjax.oracle.compare import _reason
from llmjax.oracle.comparison import Comparison
from llmjax.oracle.declared import Allowed, allowed
from llmjax.oracle.floors import CLASSES, floor
from llmjax.oracle.measure import Tap, _is_factor, measure
from llmjax.oracle.metrics import gap, logits_report, narrowed
from llmjax.oracle.names import layouts, named
from llmjax.oracle.stages import Edit, Stages
from llmjax.oracle.steps import segment
from llmjax.oracle.trials import Place
from llmjax.oracle.verdict import Explained, caveats, explain
from tests import tiny

QWEN35 = {"model_type": "qwen3_5_text", "vocab_size": 96, "hidden_size": 16, "intermediate_size": 24,
          "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
          "layer_types": ["linear_attention"], "linear_num_key_heads": 1, "linear_num_value_heads": 2,
          "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 2,
          "max_position_embeddings": 128, "rms_norm_eps": 1e-6}  # fmt: skip
IDS = np.random.default_rng(3).integers(0, 96, 12).tolist()


@pytest.fixture(scope="module")
def model() -> llmjax.Model:
    return tiny.random_model(vocab_size=96, hidden_size=24, intermediate_size=40, num_attention_heads=4)


@pytest.fixture(scope="module")
def traced(model):
    return llmjax.trace(model, IDS)


def broken(model: llmjax.Model, edits: dict) -> llmjax.Model:
    """The model with other leaves: ``layers_1/attn/q/weight`` to a function of the old one."""
    params = jax.tree.map(lambda x: x, model.params)
    for path, change in edits.items():
        *parents, last = path.split("/")
        node = params
        for key in parents:
            node = node[key]
        node[last] = jnp.asarray(change(node[last]))
    return dataclasses.replace(model, params=params)


def with_arrays(trace: llmjax.Trace, keep=lambda name: True, **manifest) -> llmjax.Trace:
    arrays = {name: x for name, x in trace.activations.items() if keep(name)}
    return llmjax.Trace(arrays, {**trace.manifest, **manifest})


def edited(stages: Stages, edit: Edit, keep: str) -> dict[str, np.ndarray]:
    """What the stages of a model compute in another way."""
    flow, arrays = None, {}
    for stage in range(-1, stages.layers + 1):
        flow, values = stages.run(stage, flow, {}, edit)
        arrays |= {tap: x for tap, x in values.items() if fnmatch.fnmatch(tap, keep)}
    return arrays


def told(report: llmjax.Comparison) -> list[tuple[str, str]]:
    return [(fault["module"], fault["causes"][0]["cause"]) for fault in report.faults]


# Metrics.


def test_error_of_a_pair():
    x = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    y = np.array([[3.0, 0.0], [0.0, 0.0]], np.float32)
    found = gap(x, y)
    assert found.error == pytest.approx((16 / (25 + 9)) ** 0.5)
    assert (found.token, found.channel, found.largest) == (0, 1, 4.0)
    assert gap(x, x).error == 0 and gap(x, 1.1 * x).error == pytest.approx(0.1 / (1 + 1.21) ** 0.5, rel=1e-5)


def test_error_narrowed_sees_no_more_than_the_narrower_dtype():
    x = np.float32([[1.0, 2.0]])
    assert narrowed(x * np.float32(1 + 2**-10), x.astype(ml_dtypes.bfloat16)) == 0
    assert narrowed(x * np.float32(1 + 2**-5), x.astype(ml_dtypes.bfloat16)) > 0.01


def test_a_tiny_token_counts_beside_the_others():
    x = np.ones((5, 4), np.float32)
    x[2] *= 1e-4
    y = x.copy()
    y[2] *= 1.01
    assert gap(x, y).worst == pytest.approx(2e-6 / 8e-4**0.5, rel=1e-3)  # of itself it would be 0.007
    x[2] *= 1e3
    assert gap(x, 1.01 * x).by_token == pytest.approx(np.full(5, gap(x, 1.01 * x).error), rel=1e-4)


def test_what_a_mistake_changes_is_in_an_error_once_or_not():
    rng = np.random.default_rng(0)
    change, noise = rng.normal(size=(2, 20, 30))
    found = held(change + noise, change)
    assert found.times == pytest.approx(1, abs=0.1) and found.cosine == pytest.approx(0.5**0.5, abs=0.05)
    assert found.proves(0.1) and not found.proves(0.3) and not held(noise, change).proves(0)
    assert not held(0.5 * change + noise, change).proves(0)  # a part of it is something else
    loud = np.where(np.arange(20)[:, None] == 3, 1e4, 1) * noise
    assert held(change + loud, change).proves(0.1)  # one token drowns no other
    assert held(noise, 0 * change) == held(0 * noise, change)


def test_a_flip_within_the_drift_is_a_tie():
    ours = np.array([[1.0, 0.99, -3.0], [5.0, 1.0, 0.0]], np.float32)
    theirs = np.array([[0.99, 1.0, -3.0], [1.0, 5.0, 0.0]], np.float32)
    report, worst = logits_report(ours, theirs, np.array([0, 1]), noise=2e-3)
    assert (report["flips"], report["flips_beyond_margin"], report["argmax_agreement"]) == (2, 1, 0.0)
    assert worst[0]["position"] == 1 and worst[0]["ours"][0][0] == 0 and worst[0]["theirs"][0][0] == 1
    p, q = (np.exp(z[1]) / np.exp(z[1]).sum() for z in (ours.astype(float), theirs.astype(float)))
    assert report["kl_max"] == pytest.approx((p * np.log(p / q)).sum())
    assert report["nll"][0] == pytest.approx(-np.log(np.exp(0.99) / np.exp(ours[0].astype(float)).sum()), rel=1e-6)


# Dumps.


def write(folder: Path, arrays: dict, manifest: object = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(arrays, folder / "a.safetensors")
    (folder / "manifest.json").write_text(json.dumps({"token_ids": [1, 2]} if manifest is None else manifest))
    return folder


GOOD = {"logits": np.zeros((2, 3), np.float32)}


def object_array(folder: Path) -> None:
    np.save(folder / "x.npy", np.array([{}, None], object), allow_pickle=True)


def twice(folder: Path) -> None:
    np.save(folder / "logits.npy", np.zeros((2, 3), np.float32))


def damaged(folder: Path) -> None:
    """An archive whose index is right and whose compressed bytes are not."""
    (folder / "a.safetensors").unlink()
    np.savez_compressed(folder / "b.npz", logits=np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32))
    data = bytearray((folder / "b.npz").read_bytes())
    start = data.index(b"logits.npy") + 30
    data[start + 2 : start + 12] = b"\xff" * 10
    (folder / "b.npz").write_bytes(data)


def archive(change) -> Callable[[Path], None]:
    """An archive of two arrays, and what becomes of its bytes."""

    def harm(folder: Path) -> None:
        (folder / "a.safetensors").unlink()
        np.savez(folder / "b.npz", embed=np.zeros((2, 3), np.float32), **GOOD)
        (folder / "b.npz").write_bytes(change((folder / "b.npz").read_bytes()))

    return harm


def hidden(data: bytes) -> bytes:
    """The first entry's comment is as long as the second entry, which is in none of its bytes then."""
    first, second, end = data.index(b"PK\1\2"), data.rindex(b"PK\1\2"), data.index(b"PK\5\6")
    return data[: first + 32] + (end - second).to_bytes(2, "little") + data[first + 34 :]


MALFORMED = {
    "an archive that hides an array": (archive(hidden), "b.npz: not a readable array file: its directory shows 1 of 2"),
    "an archive of what is no array": (
        archive(lambda data: data.replace(b"embed.npy", b"embed.npz")),
        "b.npz: not a readable array file: 'embed.npz' is no array",
    ),
    "an archive called an array": (
        lambda f: (np.savez(f / "b.npz", **GOOD), (f / "b.npz").rename(f / "embed.npy")),
        "embed.npy: not a readable array file: it is an archive",
    ),
    "damaged npz": (damaged, "b.npz"),
    "a map to a group that is not there": (
        lambda f: (f / "manifest.json").write_text('{"token_ids": [1, 2], "names": {"(logits)": "\\\\2"}}'),
        "names: ",
    ),
    "beyond float32": (
        lambda f: ((f / "a.safetensors").unlink(), np.save(f / "logits.npy", np.full((2, 3), 1e300))),
        "logits: beyond float32",
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
    "no ids": (lambda f: (f / "manifest.json").write_text("{}"), "token_ids is missing"),
    "a key nearly": (
        lambda f: (f / "manifest.json").write_text('{"token_ids": [1, 2], "quantisation": "int4"}'),
        "'quantisation' is not read; quantization would be",
    ),
    "ids of text": (lambda f: (f / "manifest.json").write_text('{"token_ids": ["a"]}'), "expected a list of token ids"),
    "no JSON": (lambda f: (f / "manifest.json").write_text("{"), "not valid JSON"),
    "truncated": (
        lambda f: (f / "a.safetensors").write_bytes((f / "a.safetensors").read_bytes()[:-4]),
        "a.safetensors",
    ),
    "truncated npz": (lambda f: (f / "b.npz").write_bytes(b"PK\3\4"), "b.npz"),
    "a link to nothing": (
        lambda f: (f / "b.npz").symlink_to(f / "nowhere.npz"),
        "b.npz: not a readable array file: No such file",
    ),
    "no arrays": (lambda f: (f / "a.safetensors").unlink(), "no arrays"),
    "integers": (lambda f: np.save(f / "embed.npy", np.zeros((2, 3), np.int64)), "expected floats"),
    "objects": (object_array, "x.npy"),
    "twice": (twice, "logits is there 2 times"),
    "dtype a list": (lambda f: (f / "manifest.json").write_text('{"token_ids": [1], "dtype": []}'), "dtype: expected"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_dumps_are_one_line(kind, tmp_path, capsys):
    harm, words = MALFORMED[kind]
    folder = write(tmp_path / "d", GOOD)
    harm(folder)
    good = write(tmp_path / "good", GOOD)
    assert main(["compare", str(good), str(folder), "--json", "--no-compile-cache"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays, facts: arrays.update(embed=arrays["embed"] + 0j), "candidate: embed: expected .*complex64"),
        (lambda arrays, facts: arrays.update(embed=arrays["embed"].astype(object)), "embed: expected floats .*object"),
        (lambda arrays, facts: arrays.update(embed=[[1.0], [2.0, 3.0]]), "candidate: 'embed': expected an array"),
        (lambda arrays, facts: arrays.update(logits=arrays["logits"][:0]), "candidate: logits: holds no values"),
        (lambda arrays, facts: arrays.clear(), "candidate: no arrays"),
        (lambda arrays, facts: arrays.update({3: arrays["embed"]}), "candidate: activations: expected a mapping"),
        (lambda arrays, facts: facts.pop("token_ids"), "candidate: manifest: token_ids is missing"),
        (lambda arrays, facts: facts.update(token_ids=[i + 0.5 for i in IDS]), "token_ids: expected a list of token"),
        (lambda arrays, facts: facts.update(dtype=16), "candidate: manifest: dtype: expected a text, found 16"),
        (lambda arrays, facts: facts.update(KVcache="q8_0"), "candidate: manifest: 'KVcache' is not read; kv_cache"),
    ],
)  # fmt: skip
def test_a_dump_in_memory_is_checked_as_one_on_disk(model, traced, change, message):
    """Imaginary parts and halves of ids were cut off without a word, the others tracebacks."""
    arrays, facts = dict(traced.activations), dict(traced.manifest)
    change(arrays, facts)
    with pytest.raises(RequestError, match=message):
        llmjax.compare(model, llmjax.Trace(arrays, facts))


def test_arrays_of_others_in_memory_are_taken(model, traced):
    arrays = {
        "embed": jnp.asarray(traced.activations["embed"]),
        "layers.0.resid": traced.activations["layers.0.resid"].astype(">f4"),
        "logits": traced.activations["logits"].tolist(),
    }
    facts = traced.manifest | {"token_ids": np.array(IDS)}
    assert llmjax.compare(model, llmjax.Trace(arrays, facts)).verdict == "identical"


def test_logits_of_one_token_say_how_they_are_read(model, traced):
    for rows in (traced.activations["logits"][-1], traced.activations["logits"][-1:]):
        report = llmjax.compare(model, llmjax.Trace({"logits": rows}, traced.manifest))
        assert report.verdict == "not_comparable" and "X.bin beside X-tokens.bin" in report.reason


def test_what_does_not_show_is_told_of_logits_alone_and_of_one_token(model):
    one = llmjax.trace(model, IDS[:1])
    logits = {"logits": np.nextafter(one.activations["logits"], np.float32(9))}
    report = llmjax.compare(model, llmjax.Trace(logits, one.manifest))
    assert report.verdict == "equivalent" and "by logits alone" in report.reason and "of one token" in report.reason
    assert "alone" not in llmjax.compare(model, with_arrays(llmjax.trace(model, IDS), runtime="x")).reason


def test_a_cause_of_a_part_is_not_what_to_do_next():
    """What explains a third of an error leaves where it begins open."""
    fault = {"module": "logits", "tap": "logits", "proof": "", "also": (), "tried": [1, 1]}
    causes = [{"cause": "residual", "detail": "twice", "explains": 0.95}]
    report = Comparison(
        "different", None, "", {"taps": 1, "of": 2, "tokens": 3, "missing": ["layers.0.resid"]},
        faults=[fault | {"causes": causes}],
    )  # fmt: skip
    assert report.to_text().endswith("next: look at logits (residual: twice), and compare again without it")
    causes[0]["explains"] = 0.37
    assert "next: dump layers.*.resid of the same token ids" in report.to_text()


def test_every_class_stands_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert set(CLASSES) <= set(re.findall(r"[a-z0-9_]+", capsys.readouterr().out))


def test_nan_is_told_by_name(tmp_path):
    folder = write(tmp_path / "d", {"logits": np.float32([[0, np.nan, 0], [0, 0, 0]])})
    with pytest.raises(RequestError, match=r"logits: NaN or infinity at \[0, 1\]"):
        llmjax.compare(write(tmp_path / "good", GOOD), folder)


def test_arrays_of_sixteen_bits_are_taken_as_they_are(tmp_path):
    x = np.array([[1.5, 2.5, -3], [0, 1, 2]], np.float32)
    folder = write(tmp_path / "d", {"embed": x.astype(ml_dtypes.bfloat16)})
    np.savez(folder / "n.npz", **{"layers.0.resid": x.astype(np.float16), "final_norm": x.astype(ml_dtypes.bfloat16)})
    np.save(folder / "logits.npy", x.astype(">f4"))
    found = dumps.open_dump(folder)
    kinds = {name: stored.dtype for name, stored in found.arrays.items()}
    assert kinds == {
        "embed": "bfloat16", "logits": "float32", "layers.0.resid": "float16", "final_norm": "bfloat16",
    }  # fmt: skip
    assert found.read("logits").dtype.isnative
    for name in kinds:
        assert np.array_equal(found.read(name).astype(np.float32), x), name


# Names.


def test_hugging_face_names_and_fused_tensors_find_their_taps():
    from tests.parity import golden

    model = golden.load("phi3")
    stages = Stages(model, np.arange(5, dtype=np.int32))
    q, kv, f = 4 * 16, 2 * 16, 104
    fused = np.arange(5 * (q + 2 * kv), dtype=np.float32).reshape(1, 5, -1)
    arrays = {"model.layers.1.self_attn.qkv_proj": fused, "model.layers.0.mlp": np.ones((1, 5, 64), np.float32),
              "model.layers.2": np.ones((5, 64), np.float32), "model.norm": np.ones((5, 64), np.float32),
              "model.layers.0.mlp.gate_up_proj": np.ones((5, 2 * f), np.float32),
              "model.rotary_emb": fused}  # fmt: skip
    found = named(dumps.from_arrays("d", {}, np.arange(5), arrays), stages.shapes, model)
    assert list(found.taps) == [
        "layers.0.mlp.gate", "layers.0.mlp.up", "layers.0.mlp.down", "layers.1.attn.q", "layers.1.attn.k",
        "layers.1.attn.v", "layers.2.resid", "final_norm",
    ]  # fmt: skip
    assert found.unknown == ("model.rotary_emb",)
    assert np.array_equal(found.read("layers.1.attn.k"), fused[0][:, q : q + kv])


def test_a_table_before_its_multiplier_is_the_embedding_behind_it():
    model = tiny.random_model(model_type="granite", hidden_size=16, intermediate_size=24, num_attention_heads=4,
                              num_hidden_layers=1, vocab_size=96, embedding_multiplier=12.0)  # fmt: skip
    x = np.ones((3, 16), np.float32)
    found = named(dumps.from_arrays("d", {}, np.arange(3), {"model.embed_tokens": x}), {"embed": x.shape}, model)
    assert np.array_equal(found.read("embed"), 12 * x)


def test_calls_of_one_module_are_told_apart():
    from tests.unit.test_shared_keys import CONFIGS

    model, tap = tiny.random_model(**CONFIGS["gemma3n"]), "layers.1.altup.router"
    streams = np.arange(2 * 3 * 16, dtype=np.float32).reshape(2, 1, 3, 16)
    arrays = {"model.layers.1.altup.modality_router": np.zeros((1, 3, 2), np.float32), "model.layers.1": streams,
              "model.layers.1.altup.modality_router#2": np.ones((1, 3, 2), np.float32)}  # fmt: skip
    shapes = {tap: (3, 2), "layers.0.streams": (3, 2, 16), "layers.1.streams": (3, 2, 16)}
    found = named(dumps.from_arrays("d", {}, np.arange(3), arrays), shapes, model, None, {tap})
    assert found.read(tap).all() and found.unknown == ("model.layers.1.altup.modality_router",)
    assert np.array_equal(found.read("layers.1.streams")[2, 1], streams[1, 0, 2])


def test_a_class_that_calls_its_parents_is_called_and_hooked_once():
    model = tiny.random_model(model_type="olmo2", hidden_size=16, intermediate_size=24, num_attention_heads=4,
                              num_key_value_heads=2, num_hidden_layers=1, vocab_size=96)  # fmt: skip
    stages, calls = Stages(model, np.arange(3, dtype=np.int32)), list[str]()

    def hook(module, run, x):
        calls.append(module.name)
        return run(module, x)

    stages.run(0, stages.run(-1, None, {})[0], {}, Edit({"attn.q_norm": hook}))
    arrays = {"model.layers.0.self_attn.q_norm": np.ones((1, 3, 16), np.float32)}
    found = named(dumps.from_arrays("d", {}, np.arange(3), arrays), stages.shapes, model, None, stages.twice)
    assert list(found.taps) == ["layers.0.attn.q_norm"] and calls == ["q_norm"]


def test_a_map_reshapes_transposes_and_splits(tmp_path, model):
    stages = Stages(model, np.array(IDS, np.int32))
    names = tmp_path / "names.toml"
    names.write_text(
        "[\"blk\\\\.(\\\\d+)\\\\.qkv\"]\nto = ['layers.\\1.attn.q', 'layers.\\1.attn.k']\nreshape = [8, 6]\n"
        "transpose = [0, 1, 2]\nsizes = [4, 4]\naxis = 1\n"
        "\"out\" = 'layers.0.resid'\n".replace('"out" =', "[out]\nto =")
        + "['Blk(.*)']\nto = 'layers.\\1.resid'\n"
    )
    arrays = {"blk.1.qkv": np.arange(12 * 48, dtype=np.float32).reshape(12, 48), "out": np.ones((12, 24), np.float32)}
    found = named(
        dumps.from_arrays("d", {}, np.array(IDS), arrays), {**stages.shapes, "layers.1.attn.k": (12, 24)}, model, names
    )
    assert found.unmatched == ("Blk(.*)",)
    assert np.array_equal(found.read("layers.1.attn.q").reshape(12, -1), arrays["blk.1.qkv"][:, :24])
    with pytest.raises(RequestError, match="no activation of the model"):
        named(dumps.from_arrays("d", {"names": {"out": "layers.7.resid"}}, np.array(IDS), arrays), stages.shapes, model)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({r"(?:a{1,5000}){1,5000}[^a]{5}": "b"}, "takes too long to match names"),
        ({r"(\w|.)*(\w|\.)*(.|\w)*[^a-z0-9._]\d?": "b"}, "takes too long to match names"),
        ({"(" * 200: "b"}, "names: '.*: expected a regular expression"),
        ({"a" * 20_000: "b"}, "names: '.*: expected a regular expression"),
        ({"(a+)": r"\2"}, r"names: '\(a\+\)': .*: "),
        ({"a+": r"\g<x"}, r"names: 'a\+': .*: "),
        ({"a+": {"to": "b", "sizes": 5}}, "sizes: expected a list, each an integer from 1 to"),
        ({"a+": {"to": ["b"], "sizes": [-4]}}, "sizes: expected a list, each an integer from 1 to"),
        ({"a+": {"to": ["b"], "sizes": [2**40]}}, "sizes: expected at most 3 together, found 1099511627776"),
        ({"a+": {"to": ["b"], "sizes": [1], "axis": "x"}}, "axis: expected an integer from"),
        ({"a+": {"to": ["b"], "sizes": [1], "axis": 7}}, "names: b: shape"),
        ({"a+": {"to": "b", "reshape": [2**70]}}, "reshape: expected a list, each an integer from"),
        ({"a+": {"to": "b", "reshape": [2**40, 2**40]}}, "names: b: shape"),
        ({"a+": {"to": "b", "transpose": [7, 8]}}, "names: b: shape"),
    ],
)
def test_a_hostile_map(names, message):
    """It lies in a dump, which anyone may have made."""
    arrays = {"a" * 2000: np.ones((2, 3), np.float32)}
    began = time.process_time()
    with pytest.raises(RequestError, match=message):
        found = named(dumps.from_arrays("d", {"names": names}, np.arange(2), arrays), {}, None)
        found.read(next(iter(found.taps)))
    assert time.process_time() - began < 3


@pytest.mark.parametrize(
    ("shape", "hint"),
    [
        ((1, 17, 24), "17 tokens for 12 of token_ids: give one text, all ids as they were fed, no padding"),
        ((1, 1, 24), "1 token for 12 of token_ids"),
        ((24, 12), "its axes are in another order, which a map tells (--names: transpose)"),
        ((12, 23), None),
    ],
)
def test_what_does_not_fit_says_why_it_may_not(model, shape, hint):
    given = llmjax.Trace({"layers.0.resid": np.ones(shape, np.float32)}, {"token_ids": IDS})
    report = llmjax.compare(model, given)
    assert report.verdict == "not_comparable" and report.exit_code == 2
    assert report.reason.endswith("for layers.0.resid" + (f"; {hint}" if hint else "")) or hint in report.reason


def test_ids_that_end_alike_may_be_padding():
    assert "note: token_ids begin with 3 times 0: if that" in padding.note(np.array([0, 0, 0, 5, 7]))
    assert "end with 2 times 9" in padding.note(np.array([1, 5, 9, 9]))
    assert not padding.note(np.array([1, 5, 9])) + padding.note(np.array([4, 4, 4])) + padding.note(np.array([4]))


@pytest.mark.parametrize("side", ["begin", "end"])
def test_masked_padding_is_told_where_the_rest_is_right(model, traced, side, monkeypatch):
    """Rows of padding hold anything; what is wrong without them is told as before."""
    monkeypatch.setattr(patching, "catalogue", lambda scene, steps: iter(()))
    rng, cut = np.random.default_rng(0), (3, 0) if side == "begin" else (0, 3)

    def padded(x, fill):
        return np.concatenate([fill(cut[0], *x.shape[1:]), x, fill(cut[1], *x.shape[1:])])

    ids = padded(np.array(IDS), lambda n: np.full(n, 5)).tolist()
    keep = ("layers.0.resid", "layers.1.resid", "logits")
    arrays = {n: padded(traced.activations[n], lambda *s: rng.standard_normal(s, np.float32)) for n in keep}
    report = llmjax.compare(model, llmjax.Trace(arrays, {"token_ids": ids, "dtype": "float32"}))
    assert report.verdict == "different" and [cause for _, cause in told(report)] == ["padding"], report.reason
    assert (
        f"token_ids {side} with 3 times 5: without them nothing differs" in report.reason
        and "note" not in report.reason
    )
    wrong = arrays | {"layers.1.resid": arrays["layers.1.resid"] + rng.standard_normal((15, 24), np.float32)}
    report = llmjax.compare(model, llmjax.Trace(wrong, {"token_ids": ids, "dtype": "float32"}))
    assert "unknown" in [cause for _, cause in told(report)] and "if that is padding" in report.reason


def test_a_word_that_ends_a_text_twice_is_no_padding(model, traced, monkeypatch):
    """What a tokenizer knows of its tokens tells padding from the last tokens' own fault."""
    monkeypatch.setattr(patching, "catalogue", lambda scene, steps: iter(()))
    tokenizer = types.SimpleNamespace(bos_id=1, eos_ids=(2,), token_bytes=lambda token: b"" if token == 7 else b"word")
    knowing = dataclasses.replace(model, tokenizer=tokenizer)
    for token, cause in ((7, "padding"), (2, "padding"), (5, "unknown")):
        ids = [*IDS[:-2], token, token]
        arrays = dict(llmjax.trace(model, ids, ["layers.0.resid", "logits"]).activations)
        arrays["logits"] = np.concatenate([arrays["logits"][:-2], 1.5 * arrays["logits"][-2:]])
        report = llmjax.compare(knowing, llmjax.Trace(arrays, {"token_ids": ids, "dtype": "float32"}))
        assert report.verdict == "different" and [found for _, found in told(report)] == [cause], report.reason


@pytest.mark.parametrize("tap", ["layers.0.attn.probs", "layers.0.resid", "logits"])
def test_one_array_that_is_stored_narrowly_among_others_is_rounded_and_no_more(model, traced, tap):
    """Nothing is computed from it, so that the steps behind it are as near as they were."""
    some = ("layers.0.attn.probs", "layers.0.resid", "layers.0.mlp.act", "layers.1.resid", "logits")
    arrays = {name: traced.activations[name] for name in some}
    for kind in ("float16", "bfloat16"):
        facts = {"token_ids": IDS, "dtype": "float32"}
        stored = arrays | {tap: arrays[tap].astype(kind)}
        report = llmjax.compare(model, llmjax.Trace(stored, facts))
        assert (report.verdict, report.explained_by) == ("equivalent", "float32"), report.reason
        assert "and the file's own rounding" in report.reason
        wrong = arrays | {tap: (1.02 * arrays[tap]).astype(kind)}
        assert llmjax.compare(model, llmjax.Trace(wrong, facts), search=0.01).verdict == "different"
    behind = stored | {"layers.1.resid": np.float32(1.0001) * arrays["layers.1.resid"]}
    report = llmjax.compare(model, llmjax.Trace(behind, facts), search=0.01)
    assert report.verdict == "different" and report.first_divergence["tap"] == "layers.1.resid"
    names = [("bfloat16" if i % 2 else "float16", name) for i, name in enumerate(some)]
    mixed = {name: arrays[name].astype(kind) for kind, name in names}
    assert llmjax.compare(model, llmjax.Trace(mixed, facts)).verdict == "equivalent"
    assert llmjax.compare(model, llmjax.Trace(mixed | {tap: 1.02 * arrays[tap]}, facts), search=0.01).exit_code == 1


def test_an_output_beside_its_last_step_that_is_stored_narrowly(model, traced):
    """They are the same but for that rounding."""
    arrays = {"layers.0.attn": traced.activations["layers.0.attn.o"], "logits": traced.activations["logits"]}
    facts = {"token_ids": IDS, "dtype": "float32"}
    for off, verdict in ((1, "equivalent"), (1.02, "different")):
        inner = {"layers.0.attn.o": (off * arrays["layers.0.attn"]).astype("float16")}
        assert llmjax.compare(model, llmjax.Trace(arrays | inner, facts), search=0.01).verdict == verdict


def test_what_is_stored_narrowly_and_declares_nothing_may_be_computed_from(model, monkeypatch):
    """Where residuals were rounded and no more, a weight of the last layer 1.2 times too large was dynamic_int8."""
    monkeypatch.setattr(patching, "catalogue", lambda scene, steps: iter(()))
    names = ("layers.0.resid", "layers.1.resid", "layers.0.attn.probs", "layers.0.mlp.act", "logits")
    for factor, verdict in ((1.0, "equivalent"), (1.2, "different")):
        other = broken(model, {"layers_1/mlp/down/weight": lambda w, factor=factor: factor * w})
        run = edited(Stages(other, np.array(IDS)), CLASSES["bfloat16"]()[0], "*")
        arrays = {name: run[name].astype("bfloat16" if "resid" in name else "float32") for name in names}
        assert llmjax.compare(model, llmjax.Trace(arrays, {"token_ids": IDS}), search=0.01).verdict == verdict


def test_layouts():
    x = np.arange(24.0).reshape(2, 3, 4)
    assert np.array_equal(layouts(x, (3, 2, 4))[0], x.swapaxes(0, 1))
    assert np.array_equal(layouts(x, (3, 8))[0], x.swapaxes(0, 1).reshape(3, 8))
    assert np.array_equal(layouts(x[None], (2, 12))[0], x.reshape(2, 12))
    assert layouts(x, (2, 5)) == []


def test_heads_that_a_dump_repeats_are_taken_once():
    x = np.arange(30.0).reshape(5, 2, 3)  # [T, K, H]
    repeated, tiled = np.repeat(x, 2, 1), np.concatenate([x, x], 1)
    for wide in (repeated, tiled, repeated.swapaxes(0, 1)[None]):
        assert np.array_equal(layouts(wide, (5, 2, 3))[0], x)
    repeated[0, 1] += 1
    assert layouts(repeated, (5, 2, 3)) == []


# Classes, and what lies between dumped taps.


def test_what_a_dump_declares_limits_the_classes():
    assert allowed({"dtype": "float32"}, None).singles == ("float32",)
    assert allowed({"dtype": "bfloat16", "quantization": "int4-g32"}, None).singles == ("float32", "bfloat16", "int4")
    assert allowed({"dtype": "float32", "quantization": {"attention": "int8"}}, None).singles == ("float32", "int8")
    assert allowed({"dtype": "float16"}, "int8").singles == ("int8",)
    assert not allowed({}, None).declared and len(allowed({}, None).singles) == 8
    with pytest.raises(RequestError, match="unknown 'fp8'"):
        allowed({}, "fp8")
    for said in ("fp8", "FP8 dynamic", "torch.float8_e4m3fn", "mxfp8", {"fmt": "e5m2"}):
        assert allowed({"dtype": "float32", "quantization": said}, None).singles == ("float32", "float8"), said
    for said in ("Q6_K", "MXFP4", "nvfp4", "dynamic_wi4_afp32", "awq", "hqq", "6-bit"):
        assert "int4" in allowed({"quantization": said}, None).singles, said
    assert "int8" in allowed({"quantization": "weight_only_wi8_afp32"}, None).singles
    for said in ("mixed-8-4-8", "mixed-8-4g32-8"):  # recipes of ours
        assert {"int8", "int4"} <= set(allowed({"quantization": said}, None).singles), said
    assert "int4" not in allowed({"quantization": "16-bit"}, None).singles
    for bits in (8, {"bits": 8, "group_size": 32}):
        assert allowed({"dtype": "float32", "quantization": bits}, None).singles == ("float32", "int8"), bits
    assert allowed({"dtype": "float32", "quantization": "8da4w"}, None).singles == ("float32", "dynamic_int8", "int4")
    assert allowed({"dtype": "float32", "quantization": "16a4w"}, None).singles == ("float32", "static_int16", "int4")
    for said in ("static int8", "8a8w", "w8a8, static"):
        assert allowed({"dtype": "float16", "quantization": said}, None).singles == (
            "float32", "float16", "static_int8", "int8",
        ), said  # fmt: skip
    cached = {
        "q8_0": "cache_int8",
        8: "cache_int8",
        "fp8_e4m3": "cache_float8",
        "q4_0": "cache_int4",
        "bf16": "cache16",
    }
    for said, kind in cached.items():
        assert allowed({"dtype": "float32", "kv_cache": said}, None).singles == ("float32", kind), said
    assert allowed({"dtype": "float32", "kv_cache": "turbo"}, None).unread == "the kv_cache 'turbo'"
    # A cache goes with whatever else was rounded, and of llama.cpp's files stands in the place of the usual one.
    both = allowed({"dtype": "bfloat16", "quantization": "int4", "kv_cache": "q8_0"}, None)
    assert ("bfloat16", "int4", "cache_int8") in both.together and both.together[0] == ("float32",)
    assert allowed({}, "int4,cache_int8").together == [("int4",), ("cache_int8",), ("int4", "cache_int8")]
    llama = {"dtype": "float32", "numerics": "llama.cpp: gelu16, cache_float16, float16, block_int8"}
    assert allowed(llama, "cache_int8").singles == ("float32", "gelu16", "float16", "cache_int8", "block_int8")
    assert allowed(llama, "int4").singles == ("int4",)
    half = dumps.from_arrays("d", {}, np.arange(2), {"embed": np.ones((2, 3), np.float16)})
    said = caveats(allowed({"quantization": "bitnet", "dtype": "float32"}, None), half)
    assert "'bitnet' is no class" in said and "stored as float16" in said
    assert caveats(allowed({"dtype": "float16"}, None), half) == ""
    assert "the dtype 'posit16' is no class" in caveats(allowed({"dtype": "posit16"}, None), half)
    assert not allowed({"dtype": "torch.float32"}, None).unread
    assert allowed({"quantization": "bitnet"}, None).unread and not allowed({"quantization": "none"}, None).unread


@pytest.mark.parametrize(
    "classes, spellings",
    [
        (("int8",), ("8", "i8", "u8", "8.0bpw", "LLM.int8()", "load_in_8bit")),
        (("int4",), ("4", "i4", "u4", "4.0bpw", "exl2 4.65 bpw", "q4f16_1", "IQ4_XS", "Q5_K_M", "awq g128")),
        (("int3",), ("iq3_m", "Q3_K_S", "3-bit", "3.5bpw", {"bits": 3, "group_size": 128}, 3)),
        (("int2",), ("q2_k", "q2", "int2", "IQ2_XXS", "2bit", "2.4bpw", "w2a16", "u2", {"nbits": 2, "group_size": 64})),
        (("int4",), ({"quant_method": "awq", "w_bit": 4, "q_group_size": 128},)),
        ((), ("none", "q0f32", {"load_in_8bit": False}, False)),
    ],
)
def test_spellings_of_a_quantization(classes, spellings):
    for said in spellings:
        found = allowed({"dtype": "float32", "quantization": said}, None)
        assert (found.singles, found.unread) == (("float32", *classes), None), said


def test_what_a_quantization_does_not_say_is_told():
    """A library alone, and ternary weights, which are neither of 8 bits nor of 2."""
    for said in ("bitsandbytes", {"quant_method": "bitsandbytes"}, "1.58bit", "1.58-bit", "ternary", "tq1_0", "TQ2_0"):
        found = allowed({"dtype": "float32", "quantization": said}, None)
        assert found.singles == ("float32",) and found.unread.startswith("the quantization "), said
    knobs = {"llm_int8_threshold": 6.0, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "float32"}
    for bits, other in ((8, 4), (4, 8)):  # as transformers writes its configuration, whichever it is
        said = {"quant_method": "bitsandbytes", f"_load_in_{bits}bit": True, f"_load_in_{other}bit": False, **knobs}
        assert allowed({"dtype": "float32", "quantization": said}, None).singles == ("float32", f"int{bits}")
    few = allowed({"dtype": "float32", "kv_cache": "2-bit"}, None)
    assert few.singles == ("float32",) and few.unread == "the kv_cache '2-bit'"


def test_spellings_of_a_dtype_and_what_says_nothing_of_precision():
    dtypes = {"mixed_bfloat16": "bfloat16", "bf16-mixed": "bfloat16", "mixed_float16": "float16", "TF32": "tf32"}
    for said, name in dtypes.items():
        found = allowed({"dtype": said}, None)
        assert (found.singles, found.unread) == (("float32", name), None), said
    assert allowed({"dtype": "float"}, None).unread is None
    for said in ("auto", "dynamic", "static", "offloaded_static", True):
        assert allowed({"kv_cache": said}, None) == allowed({}, None), said
        assert allowed({"dtype": "bfloat16", "kv_cache": said}, None) == allowed({"dtype": "bfloat16"}, None), said
    assert allowed({"dtype": "auto"}, None) == allowed({}, None)


def test_what_is_not_read_is_told_without_a_model_too():
    logits = np.random.default_rng(0).normal(size=(12, 96)).astype(np.float32)
    facts = {"token_ids": IDS, "dtype": "float32"}
    theirs = llmjax.Trace({"logits": 1.01 * logits}, facts | {"quantization": "ternary"})
    report = llmjax.compare(llmjax.Trace({"logits": logits}, facts), theirs)
    assert report.verdict == "different" and "the quantization 'ternary' is no class" in report.reason


@pytest.mark.slow
def test_two_bits_are_a_class_of_their_own(model):
    """Four levels from the least to the largest of each row; int4's sixteen do not explain them."""

    def change(weight):
        edges = np.linspace(weight.min(-1), weight.max(-1), 4, axis=-1)
        nearest = np.abs(np.asarray(weight)[..., None] - edges[:, None]).argmin(-1)
        return np.take_along_axis(edges, nearest, -1).astype(np.float32)

    paths = [f"layers_{i}/{m}/weight" for i in range(2) for m in ("attn/q", "attn/o", "mlp/up", "mlp/down")]
    coarse = llmjax.trace(broken(model, dict.fromkeys(paths, change)), IDS)
    for said, found in (("q2_k", ("equivalent", "int2")), ("int4", ("different", None))):
        theirs = with_arrays(coarse, runtime="theirs", dtype="float32", numerics=None, quantization=said)
        report = llmjax.compare(model, theirs, search=0.1)
        assert (report.verdict, report.explained_by) == found, report.reason


@pytest.mark.slow
def test_inputs_of_ten_bits_are_tf32(model):
    """As products in float16 are, which have as many; what tf32 explains, float32 does not."""
    half = Numerics("hf", jnp.dtype(jnp.float32), jnp.dtype(jnp.float16))
    narrow = jax.tree.map(lambda x: x.astype(jnp.float16).astype(x.dtype) if x.ndim > 1 else x, model.params)
    theirs = llmjax.trace(dataclasses.replace(model, numerics=half, params=narrow), IDS)
    for said, found in (("tf32", ("equivalent", "tf32")), ("float32", ("different", None))):
        report = llmjax.compare(model, with_arrays(theirs, runtime="theirs", dtype=said, numerics=None), search=0.1)
        assert (report.verdict, report.explained_by) == found, report.reason


def test_inputs_that_are_cut_off_are_tf32_too(model):
    """What a tensor core does with float32 that nobody rounded before."""
    x = np.float32([1 + 2**-10 + 2**-11, -1 - 2**-11 - 2**-12, 3.0])
    np.testing.assert_array_equal(floors._cut(x), np.float32([1 + 2**-10, -1, 3]))
    nearest, cut = CLASSES["tf32"]()
    stages, classes = Stages(model, np.array(IDS)), ("float32", "tf32")
    for way in (nearest, cut):
        found, taps = explained(stages, edited(stages, way, "*resid"), classes, declared=True)
        assert found.name == "tf32" and not found.beyond and taps[0].excess(("float32",)) > 1


def test_products_of_fewer_bits_are_told_where_float32_is_declared(model):
    """As a flag of the program's has them, of which its dump knows nothing."""
    stages = Stages(model, np.array(IDS))
    made = {c.detail: c for c in catalogue._products()}
    flow = stages.run(-1, None, {})[0]
    ours, theirs = (stages.run(0, flow, {}, edit)[1] for edit in (Edit(), CLASSES["tf32"]()[1]))
    scene = base.Scene(stages, 0, "attn.q", ours["layers.0.attn.q"], theirs["layers.0.attn.q"], lambda edit: None)
    causes = {c.detail: c for c in catalogue.catalogue(scene, ["attn.q"])}
    assert set(made) < set(causes)
    cut = causes["products take their inputs in tf32, cut off"]
    again = stages.run(0, flow, {}, cut.edit)[1]["layers.0.attn.q"]
    assert gap(again, scene.theirs).error < 1e-7 < 1e-4 < gap(scene.ours, scene.theirs).error
    assert catalogue.everywhere(cut) and not catalogue.everywhere(causes["the weight is rounded to float16"])


def explained(stages: Stages, arrays: dict, classes: tuple[str, ...], declared: bool) -> tuple[Explained, list[Tap]]:
    dump = named(dumps.in_memory("x", {"token_ids": IDS}, arrays), stages.shapes, stages.model, None, stages.twice)
    taps = [tap for tap, _ in measure(stages, dump, lambda tap: None, classes, clock.Pulse(lambda line: None))]
    return explain(taps, Allowed(classes, declared)), taps


def test_a_small_cache_is_a_class_without_a_model_too():
    logits = np.random.default_rng(0).normal(size=(12, 96)).astype(np.float32)
    ours, theirs = ({"logits": x} for x in (logits, logits + np.float32(0.02) * logits[::-1]))
    for said, verdict in (({}, "different"), ({"kv_cache": "q8_0"}, "equivalent")):
        facts = {"token_ids": IDS, "dtype": "float32"}
        report = llmjax.compare(llmjax.Trace(ours, facts), llmjax.Trace(theirs, facts | said))
        assert report.verdict == verdict, report.reason
    assert report.explained_by == "cache_int8"
    for few in (logits[:, :50], logits[:, 0]):  # ids that have none; no vocabulary
        one = llmjax.Trace({"logits": few}, facts)
        assert "expected [tokens, vocabulary] with token id" in llmjax.compare(one, one).reason


def test_what_is_unrelated_passes_under_no_class():
    """However far rounding goes: logits of zeros are 1 off, and one array alone shows no weights of few bits."""
    assert floor(np.array([0.3, 0.5]), np.zeros(2))[0] < 0.8 and floor(np.ones(2), np.zeros(2))[0] < 1.001
    ways = {"float32": [(np.zeros(2), np.zeros(2))], "int4": [(np.full(2, 0.1), np.full(2, 0.1))]}
    apart = gap(np.ones((2, 3)), np.full((2, 3), 1.3))
    taps = [Tap(name, apart, 0.0, False, np.full(2, 0.13), ways) for name in ("head", "logits")]
    assert explain(taps, allowed({}, None)).name == "int4" and not explain(taps, allowed({}, None)).beyond
    assert explain(taps[1:], allowed({}, None)).beyond
    assert not explain(taps[1:], allowed({"quantization": {"bits": 4}}, None)).beyond


def test_weights_of_eight_bits_and_a_fault_are_not_weights_of_four():
    """Where most steps are moved as little as 8 bits move them, one that is 20 times further off is none of 4 bits'."""
    none, eight, four = np.zeros(2), np.full(2, 0.006), np.full(2, 0.1)
    ways = {"float32": [(none, none)], "int8": [(eight, eight)], "int4": [(four, four)]}
    apart = gap(np.ones((2, 3)), np.full((2, 3), 1.3))

    def told(*errors: float):
        taps = [Tap(f"layers.{i}.resid", apart, 0.0, False, np.full(2, e), ways) for i, e in enumerate(errors)]
        return explain(taps, allowed({}, None))

    assert told(0.007, 0.006, 0.007).name == "int8" and told(0.025, 0.03, 0.12).name == "int4"  # 6 bits are few bits
    assert told(0.007, 0.006, 0.1, 0.006, 0.007, 0.12).name == "int4"  # 8 and 4 are mixed
    found = told(0.007, 0.006, 0.17, 0.007, 0.005)
    assert found.name == "int8" and [tap.name for tap in found.beyond] == ["layers.2.resid"]
    # Where half of the steps are right in float32, no bits are few: layer 0 is wrong as well.
    found = told(0.2, 0.5, 1e-7, 1e-7)
    assert found.name == "float32" and [tap.name for tap in found.beyond] == ["layers.0.resid", "layers.1.resid"]
    found = told(0.1, 0.5, 0.11, 0.1, 1e-7)
    assert found.name == "int4" and [tap.name for tap in found.beyond] == ["layers.1.resid"]


def test_what_is_right_at_many_tokens_is_no_rounding():
    """A slot that is stale in all layers was equivalent, explained by int4: what comes before it is right."""
    none, four, off = np.zeros(2), np.full(2, 0.1), np.full(2, 0.08)
    ways = {"float32": [(none, none)], "int4": [(four, four)]}
    apart = gap(np.ones((2, 3)), np.full((2, 3), 1.3))

    def told(own: np.ndarray) -> Explained:
        taps = [Tap(f"layers.{i}.resid", apart, 0.0, False, off, ways, own=own) for i in range(3)]
        return explain(taps, allowed({}, None))

    assert told(np.full(40, 0.08)).name == "int4" and not told(np.full(40, 0.08)).beyond
    found = told(np.where(np.arange(40) < 20, 1e-7, 0.08))
    assert found.name == "float32" and len(found.beyond) == 3


@pytest.mark.parametrize(
    ("move", "detail"),
    [
        (lambda p: p + (p >= 5), "from token 5 on positions are one too high"),
        (lambda p: p - 5 * (p >= 5), "from token 5 on positions begin again at 0"),
    ],
)
def test_positions_behind_a_prompt_are_told(model, move, detail):
    """They were unknown: all positions one too high are no mistake of a rotation, those of what is drawn are."""
    edit = Edit({"attn": base.field(rope=lambda r: rotation._Apart(r, (move, move)))})
    arrays = edited(Stages(model, np.array(IDS)), edit, "layers.0.attn.[qk]*")
    report = llmjax.compare(model, llmjax.Trace(arrays, {"token_ids": IDS, "dtype": "float32"}), search=0)
    fault, cause = report.faults[0], report.faults[0]["causes"][0]
    assert (fault["tap"], cause["cause"], cause["detail"]) == ("layers.0.attn.q_rot", "rope_positions", detail)
    assert cause["explains"] == 1


def test_weights_of_other_layers_are_tried_last():
    """Of a model of thirty layers hundreds of them stood before a rotation's base and the order of layers."""
    words = ("weight_swapped", "norm_eps", "quantization", "layer_order", "rope_theta")
    trials = [patching._Trial(i, base.Cause(word, "", ()), Place(0, 0, 0)) for i, word in enumerate(words)]
    found = [trial.cause.cause for trial in sorted(trials, key=patching._cost)]
    assert found == ["norm_eps", "layer_order", "rope_theta", "weight_swapped", "quantization"]


@pytest.mark.parametrize(("keep", "times", "name"), [tiny.slow("logits", 1.003, "float16"), ("*resid", 2.0, "int4")])
def test_what_spares_the_first_token_is_no_rounding(model, keep, times, name):
    """Scores that are too large were equivalent in float32, explained by whatever is as wide: a token that attends to
    itself alone has them right, which no rounding leaves it."""
    classes, stages = ("float32", name), Stages(model, np.array(IDS))

    def of(edit: Edit) -> Explained:
        return explained(stages, edited(stages, edit, keep), classes, declared=False)[0]

    found = of(Edit({"attn": base.field(scores=lambda s: dataclasses.replace(s, scale=times * s.scale))}))
    assert found.name == "float32" and found.beyond
    found = of(CLASSES[name]()[0])
    assert found.name == name and not found.beyond


def test_one_factor_is_no_rounding():
    """Of weights of few bits each value is off in its own way."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 24))
    assert _is_factor(x, 1.1 * x) and not _is_factor(x, 1.005 * x) and not _is_factor(x, x)
    assert not _is_factor(x, 1.1 * x + 0.01 * rng.normal(size=x.shape)) and not _is_factor(x[:1, :4], 1.1 * x[:1, :4])
    ways = {"float32": [(np.full(2, 1e-7),) * 2], "int4": [(np.full(2, 0.1),) * 2]}
    tap = Tap("embed", gap(x, 1.1 * x), 0, False, np.full(2, 0.05), ways)
    assert tap.excess(("int4",)) < 1 and dataclasses.replace(tap, scaled=True).excess(("int4",)) > 1


def test_a_step_is_held_against_the_same_of_the_other_layers():
    """Within 4 bits' floor, but three times as far off as in the other layers: a zero point that is one off, say."""
    none, half, four = np.zeros(2), np.full(2, 0.002), np.full(2, 0.1)
    ways = {"float32": [(none, none)], "float16": [(half / 8, half / 8)], "bfloat16": [(half, half)],
            "int4": [(2 * four, 2 * four), (four, four)]}  # fmt: skip
    apart = gap(np.ones((2, 3)), np.full((2, 3), 1.3))
    theirs = dumps.from_arrays("d", {}, np.arange(2), {})

    def told(*errors: float, **manifest):
        taps = [Tap(f"layers.{i}.mlp.down", apart, 0.0, False, np.full(2, e), ways) for i, e in enumerate(errors)]
        return explain(taps, allowed(manifest, None))

    found = told(0.1, 0.09, 0.29, 0.1, 0.11)
    assert found.name == "int4" and [tap.name for tap in found.beyond] == ["layers.2.mlp.down"]
    faults = [{"module": "layers.2.mlp.down", "tried": [1, 1], "causes": [{"cause": "unknown", "explains": 0.0}]}]
    reason = _reason("different", found, allowed({}, None), faults, [], theirs, types.SimpleNamespace(tokenizer=None))
    assert "layers.2.mlp.down is 2.6 times as far off as the same step of most layers" in reason
    assert "--quantize" in reason
    assert told(0.1, 0.09, 0.3, quantization="int4").beyond and not told(0.1, 0.3, quantization="int4").beyond
    assert not told(0.21, 0.2, 0.2, 0.22, 0.1).beyond  # 3 bits are of few bits, all of them
    assert not told(0.025, 0.1, 0.025, 0.11, 0.025, 0.025, 0.12, 0.025).beyond  # and 4 beside 6
    # float16 with a mistake is no bfloat16, and bfloat16 with one no more than that.
    assert told(0.0002, 0.00025, 0.003, 0.0002).beyond and told(0.002, 0.0022, 0.0062, 0.0021).beyond
    assert told(0.002, 0.0022, 0.0028, 0.0021).name == "bfloat16"
    assert not told(0.002, 0.0022, 0.0028, 0.0021).beyond and told(0.0002, 0.00025, 0.0003).name == "float16"


def test_segments(traced):
    taps = list(traced.activations)
    assert segment("layers.1.attn.o", taps, {"layers.1.attn.q_rot", "layers.1.attn.k_rot", "layers.1.attn.v"}, 2) == [
        "layers.1.attn.probs", "layers.1.attn.out", "layers.1.attn.o",
    ]  # fmt: skip
    assert segment("layers.1.resid", taps, set(taps), 2) == ["layers.1.resid"]
    between = segment("layers.1.resid", taps, {"layers.0.resid"}, 2)
    assert between == [tap for tap in taps if tap.startswith("layers.1.")]


# Verdicts.


def test_ids_are_two_models_alone(model, traced):
    """A dump is made of ids; others beside it would be left out in silence."""
    for reference, candidate in ((model, traced), (traced, traced), (traced, model)):
        with pytest.raises(RequestError, match="token_ids: what two checkpoints are compared on"):
            llmjax.compare(reference, candidate, token_ids=IDS)


def test_the_same_is_identical_and_float32_rounding_is_equivalent(model, traced):
    assert llmjax.compare(model, traced).verdict == "identical"
    logits = traced.activations["logits"] * np.float32(1 + 2**-21)
    report = llmjax.compare(
        model, with_arrays(dataclasses.replace(traced, activations={"logits": logits}), dtype="float32")
    )
    assert (report.verdict, report.explained_by, report.faults) == ("equivalent", "float32", [])


def test_faults_are_all_found_and_named(model, traced, monkeypatch):
    monkeypatch.setattr(clock, "_SILENT", -1)
    scales, lines = np.linspace(0.5, 2, 24, dtype=np.float32), []

    def int8(w):
        scale = np.abs(w).max(1, keepdims=True) / 127
        return np.round(np.asarray(w) / scale) * scale

    bad = broken(
        model,
        {
            "layers_0/attn/q/weight": lambda w: 1.1 * w,
            **{f"layers_1/attn/{name}/weight": lambda w: w / scales for name in "qkv"},
            "layers_1/attn_norm/weight": lambda w: w * scales,
            "layers_1/mlp/up/weight": lambda w: w.at[:2].set(w[1::-1]),
            "layers_1/mlp/down/weight": int8,
        },
    )
    report = llmjax.compare(model, llmjax.trace(bad, IDS), progress=lines.append)
    assert report.verdict == "different" and report.exit_code == 1
    assert told(report) == [
        ("layers.0.attn.q", "weight"), ("layers.1.attn_norm", "weight"),  ("layers.1.mlp.up", "weight_swapped"),
        ("layers.1.mlp.down", "quantization"),
    ]  # fmt: skip
    assert "scaled back in attn.q, attn.k, attn.v" in report.faults[1]["causes"][0]["detail"]
    assert report.faults[1]["also"] == [f"layers.1.attn.{name}" for name in "qkv"]
    assert "measuring: layer 1 of 2, way 2 of 2 to compute it" in lines
    assert any(re.fullmatch(r"layers.0.attn.q: \d+ of \d+ causes tried; 7 taps .*; \d+ s are left", x) for x in lines)
    assert all(fault["causes"][0]["explains"] > 0.95 for fault in report.faults)
    assert report.first_divergence["tap"] == "layers.0.attn.q"
    assert "1.1" in report.faults[0]["causes"][0]["detail"] and "int8" in report.faults[3]["causes"][0]["detail"]
    last = "next: look at layers.0.attn.q (weight: the weight is scaled by 1.1), and compare again without it"
    assert report.to_text().endswith(last)
    page = report.to_html()
    assert "layers.1.mlp.down" in page and "http" not in page and "<script" not in page
    assert 'failures="5"' in report.to_junit()
    taps = [row["name"] for row in report.taps]
    assert taps == list(traced.activations)


@pytest.mark.slow
def test_residuals_alone_find_the_layer_and_the_cause(model):
    own = model.params["layers_0"]["attn"]
    bad = broken(
        model,
        {
            "layers_0/attn/k/weight": lambda w: own["v"]["weight"],
            "layers_0/attn/v/weight": lambda w: own["k"]["weight"],
            "layers_1/mlp/gate/weight": lambda w: model.params["layers_1"]["mlp"]["up"]["weight"],
        },
    )
    dump = with_arrays(llmjax.trace(bad, IDS), lambda name: name.endswith("resid"))
    report = llmjax.compare(model, dump)
    assert told(report) == [("layers.0.attn", "weight_swapped"), ("layers.1.mlp.gate", "weight_swapped")]
    assert report.coverage["taps"] == 2 and "embed" in report.coverage["missing"]
    silent = broken(model, {"layers_1/attn/o/weight": jnp.zeros_like})
    report = llmjax.compare(model, with_arrays(llmjax.trace(silent, IDS), lambda name: name.endswith("resid")))
    assert told(report) == [("layers.1.resid_attn", "residual")]
    windows = dataclasses.replace(model, config=dataclasses.replace(model.config, windows=(None, 7)))
    report = llmjax.compare(model, with_arrays(llmjax.trace(windows, IDS), lambda name: name.endswith("resid")))
    assert told(report) == [("layers.1.attn.probs", "window")] and "7 tokens" in report.reason


def test_a_cause_of_a_part_is_told_as_one(model):
    theirs, tap = (
        dumps.from_arrays("d", {}, np.arange(2), {}),
        Tap("mlp", gap(np.ones((2, 3)), np.zeros((2, 3))), 0, False),
    )
    shares = (0.99, ""), (0.97, ", which explains 97% of it"), (0.3, ", which explains 30% of it")
    for share, told in ((share, f"m (mask: all{more})") for share, more in shares):
        causes = [{"cause": "mask", "detail": "all", "explains": share}]
        faults = [{"module": "m", "tried": [1, 1], "causes": causes}]
        beyond = Explained(("float32",), (tap,))
        assert told in _reason("different", beyond, allowed({}, None), faults, [], theirs, model)


def test_another_first_token_is_tried(model):
    """Where the embedding was not dumped: BOS, or another one, as llama.cpp may feed it."""
    stages = Stages(model, np.array([7, *IDS], np.int32))
    scene = base.Scene(stages, -1, "", np.zeros(1), np.zeros(1), lambda edit: None)
    causes = {c.detail: c for c in weights.embedding(scene) if c.cause == "token_ids"}
    assert list(causes) == [f"another first token was fed: {i} for 7" for i in (0, 1, 2)]
    (_, found) = stages.run(-1, None, {}, causes["another first token was fed: 2 for 7"].edit)
    assert np.array_equal(found["embed"], model.params["embed"]["weight"][np.array([2, *IDS])])


def causes_of_a_norm(model, bad, *words) -> list[str]:
    """Those of some words that make the first norm of ours theirs, where nothing behind it was dumped, in order."""
    ours, theirs = (Stages(m, np.array(IDS, np.int32)) for m in (model, bad))
    tap, flow = "layers.0.attn_norm", ours.run(-1, None, {})[0]

    def under(edit):
        return ours.run(0, flow, {}, edit, [tap])[1].get(tap, np.zeros(1))

    scene = base.Scene(ours, 0, "attn_norm", under(Edit()), theirs.run(0, flow, {}, Edit(), [tap])[1][tap], under)
    causes = (c for c in catalogue.catalogue(scene, ["attn_norm"]) if c.post is None and c.cause in words)
    return [c.detail for c in causes if np.allclose(under(c.edit), scene.theirs, 1e-4, 1e-5)]


def test_a_norm_that_was_rounded_or_scaled_is_not_told_as_scales_that_moved(model):
    """Where products behind it were not dumped, or their class is wide, that would explain as much."""
    for change, detail in (
        (lambda w: w.astype(jnp.float16).astype(w.dtype), "the norm's weight is rounded to float16"),
        (lambda w: w.at[3:5].multiply(1.2), "2 of 24 channels are scaled"),
    ):
        bad = broken(model, {"layers_0/attn_norm/weight": change})
        found = causes_of_a_norm(model, bad, "precision", "weight")
        assert found[0] == detail and "scaled back" in found[-1], found


@pytest.mark.parametrize("eps", [0.0203, 3e-4])
def test_an_epsilon_that_nobody_else_has_is_found(model, eps):
    config = dataclasses.replace(model.config, rms_norm_eps=eps)
    found = causes_of_a_norm(model, dataclasses.replace(model, config=config), "norm_eps")
    assert f"epsilon is {eps:g}" in found


@pytest.mark.parametrize(
    ("word", "detail", "edit"),
    [
        tiny.slow(
            "norm_eps", "epsilon is 3.1e-05 in all norms", Edit(dict.fromkeys(base.NORMS, base.field(eps=3.1e-5)))
        ),
        (
            "attention_scale",
            "scores are 1.005 times too large",
            Edit({"attn": base.field(scores=lambda s: dataclasses.replace(s, scale=s.scale * 1.005))}),
        ),
        (
            "rope_theta",
            "the base is 10100",
            Edit({"attn": base.field(rope=lambda r: dataclasses.replace(r, theta=r.theta * 1.01))}),
        ),
    ],
)
def test_a_number_that_is_a_little_off_is_fitted_where_its_step_was_not_dumped(model, word, detail, edit):
    """Of a rounding's error no number is told; one that was found once is tried again elsewhere."""
    stages = Stages(model, np.array(IDS))
    flow = stages.run(-1, None, {})[0]

    def run(edit: Edit) -> np.ndarray:
        return stages.run(0, flow, {}, edit, ["layers.0.resid"])[1]["layers.0.resid"]

    steps = ["attn_norm", "mlp_norm", "attn.q_rot", "attn.k_rot", "attn.probs"]

    def fitted(theirs: np.ndarray, fits: dict | None) -> list:
        scene = base.Scene(stages, 0, "resid", run(Edit()), theirs, run, fits)
        return [c for c in catalogue.catalogue(scene, steps) if c.cause == word]

    theirs, fits = run(edit), {}
    [cause] = [c for c in fitted(theirs, fits) if c.detail == detail]
    assert gap(run(cause.edit), theirs).error < 0.05 * gap(run(Edit()), theirs).error
    assert detail not in [c.detail for c in fitted(theirs, None)]
    rounded = run(CLASSES["bfloat16"]()[0])
    assert [c.detail for c in fitted(rounded, fits)] == [c.detail for c in fitted(theirs, fits)]
    assert len(fitted(rounded, {})) == len(fitted(theirs, None))


def test_a_search_that_ends_is_told_where_a_verdict_hangs_on_it(model):
    """Beneath a class that nobody declared mistakes were looked for without end, whatever --search said."""
    stages, classes = Stages(model, np.array(IDS)), ("float32", "float16")
    arrays = edited(stages, CLASSES["float16"]()[0], "*resid")
    found, taps = explained(stages, arrays, classes, declared=False)
    assert found.classes == ("float16",) and not found.beyond
    dump = dumps.in_memory("x", {"token_ids": IDS}, arrays)
    known, permitted = named(dump, stages.shapes, model, None, stages.twice), Allowed(classes, False)
    began = time.monotonic()
    found, proven = patching.judged(stages, known, taps, found, permitted, 1e-9, 1, clock.Pulse())
    assert time.monotonic() - began < 60 and not proven and not found.beyond
    assert found.looked[0] == 0 < found.looked[1]
    reason = _reason("equivalent", found, permitted, [], [], dump, model)
    assert f"0 of {found.looked[1]} mistakes beneath that floor were looked for (--search)" in reason


def test_log_probabilities_for_logits_are_tried_first(traced):
    logits = traced.activations["logits"]
    scene = base.Scene(None, 2, "logits", logits, logits, lambda edit: None)
    causes = catalogue.catalogue(scene, ["logits"])
    for theirs, cause in zip((jax.nn.log_softmax, jax.nn.softmax), causes, strict=False):
        assert "probabilities, no logits" in cause.detail
        np.testing.assert_allclose(cause.post(logits), theirs(logits), rtol=1e-4, atol=1e-6)


def test_a_result_that_saturates_is_told():
    ours = np.linspace(-3, 3, 60, dtype=np.float32).reshape(6, 10)
    scene = base.Scene(None, 0, "mlp.act", ours, np.clip(ours, -2, 3), lambda edit: None)
    [cause] = catalogue._saturated(scene)
    assert cause.cause == "precision" and "saturates at -2 and 3" in cause.detail
    np.testing.assert_array_equal(cause.post(ours), scene.theirs)
    assert not list(catalogue._saturated(dataclasses.replace(scene, theirs=2 * ours)))


def test_a_window_shows_by_the_first_token_that_differs():
    """Where probabilities were not dumped; beneath it only another rounding."""
    x = np.random.default_rng(0).normal(size=(30, 8))
    y = x * (1 + 2e-3 * np.random.default_rng(1).normal(size=x.shape))
    assert blocks._since(x, y) == set() and blocks._since(x[:3], y[:3]) == set()
    y[17:] += 0.1
    assert 17 in blocks._since(x, y)


@pytest.mark.slow
def test_logits_alone_say_what_to_dump_next(model):
    # Without its norms this model overflows, which explains nothing.
    small, large = (lambda w: w * np.float32(1e-25)), (lambda w: w * np.float32(1e25))
    mlp = {"layers_0/mlp/gate/weight": large, "layers_0/mlp/up/weight": large}
    model = broken(model, {"layers_0/mlp_norm/weight": small, **mlp})
    bad = broken(model, {"layers_0/attn/v/weight": lambda w: w[::-1]})
    logits = with_arrays(llmjax.trace(bad, IDS), lambda name: name == "logits")
    report = llmjax.compare(model, logits)
    assert report.verdict == "different" and "layers.*.resid" in report.reason
    assert told(report) == [("logits", "unknown")]
    count, of = report.faults[0]["tried"]
    assert count == of > 100 and "tried" not in report.to_text()
    assert report.to_text().endswith("next: dump layers.*.resid of the same token ids, and compare again")
    report = llmjax.compare(model, logits, search=1e-9)
    assert report.faults[0]["tried"] == [0, of] and told(report) == [("logits", "unknown")]
    assert f"0 of {of} causes were tried" in report.reason and f"0 of {of} causes tried" in report.to_text()
    assert "unknown: no time was left to try known mistakes" in report.to_text()
    normed = llmjax.Trace({"logits": np.array(jax.nn.log_softmax(logits.activations["logits"]))}, logits.manifest)
    assert told(llmjax.compare(bad, normed)) == [("logits", "head")]


@pytest.mark.slow
def test_few_bits_are_equivalent_unless_float32_is_declared(model):
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32) if x.ndim == 2 else x, model.params)
    trace = llmjax.trace(dataclasses.replace(model, params=rounded), IDS)
    nothing = {"dtype": None, "numerics": None, "quantization": None}
    assert llmjax.compare(model, with_arrays(trace, **nothing)).explained_by == "bfloat16"
    assert llmjax.compare(model, with_arrays(trace, dtype="bfloat16")).explained_by == "bfloat16"
    assert llmjax.compare(model, with_arrays(trace, dtype="float32")).verdict == "different"
    assert llmjax.compare(model, with_arrays(trace, dtype="float32"), arithmetic="bfloat16").verdict == "equivalent"
    eight = jax.tree.map(lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32) if x.ndim == 2 else x, model.params)
    trace = with_arrays(llmjax.trace(dataclasses.replace(model, params=eight), IDS), dtype="float32", numerics=None)
    assert llmjax.compare(model, with_arrays(trace, quantization="fp8")).explained_by == "float8"
    assert llmjax.compare(model, with_arrays(trace, quantization="bitnet"), search=1e-9).verdict == "different"
    # A mistake in all layers that takes the whole error away is likelier than 16 bits.
    other = dataclasses.replace(model, config=dataclasses.replace(model.config, rms_norm_eps=1e-3))
    layers = with_arrays(llmjax.trace(other, IDS), lambda name: name.endswith("resid"), **nothing)
    report = llmjax.compare(model, layers)
    assert report.verdict == "different" and {cause for _, cause in told(report)} == {"norm_eps"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float32_that_was_stored_in_sixteen_bits_is_no_mistake(model, traced, dtype):
    """Where all arrays are: one of several would widen the floors of those that are not rounded."""
    layers = {n: x.astype(dtype) for n, x in traced.activations.items() if n.endswith(".resid") or n == "logits"}
    report = llmjax.compare(model, llmjax.Trace(layers, {"token_ids": IDS, "dtype": "float32"}))
    assert (report.verdict, report.explained_by) == ("equivalent", dtype)
    assert f"declared: float32, {dtype}, as its arrays are" in report.reason
    assert allowed({"dtype": "float32"}, None, {dtype, "float32"}).singles == ("float32",)
    assert allowed({"dtype": "float32"}, "float32", {dtype}).singles == ("float32",)
    wrong = layers | {"layers.1.resid": layers["layers.1.resid"][:, ::-1]}
    report = llmjax.compare(model, llmjax.Trace(wrong, {"token_ids": IDS, "dtype": "float32"}), search=1e-9)
    assert report.verdict == "different"


def test_a_mistake_beneath_the_floor_of_few_bits_is_found_in_the_error(model, monkeypatch):
    """Residuals alone of weights of 4 bits, a row's scale each: swapped weights of one layer are within their floor."""
    monkeypatch.setattr(patching, "worth", lambda cause: worth(cause) and cause.cause in ("weight_swapped", "mask"))

    def rounded(w):
        scale = jnp.abs(w).max(-1, keepdims=True) / 7
        return jnp.round(w / scale) * scale

    four = jax.tree.map(lambda x: rounded(x) if x.ndim == 2 else x, model.params)
    right = dataclasses.replace(model, params=four)
    gate, up = (four["layers_1"]["mlp"][name]["weight"] for name in ("gate", "up"))
    swapped = broken(right, {"layers_1/mlp/gate/weight": lambda _: up, "layers_1/mlp/up/weight": lambda _: gate})
    for one, verdict, causes in (
        (right, "equivalent", []),
        (swapped, "different", [("layers.1.mlp", "weight_swapped")]),
    ):
        facts = {"dtype": "float32", "quantization": "int4", "numerics": None}
        resids = with_arrays(llmjax.trace(one, IDS), lambda name: name.endswith("resid"), **facts)
        report = llmjax.compare(model, resids)
        assert (report.verdict, told(report)) == (verdict, causes), report.reason
    # Logits alone are behind all of the rounded layers: there nothing is looked for, nor is that said.
    logits = with_arrays(llmjax.trace(swapped, IDS), lambda name: name == "logits", **facts)
    for dump, said in ((resids, True), (logits, False)):
        assert ("mistakes beneath that floor" in llmjax.compare(model, dump, search=1e-9).reason) == said


def test_other_tokens_are_told_in_words(model, traced):
    for ids, words in ((IDS[1:], "is missing"), ([IDS[0], *IDS], "is doubled"), ([*IDS[:-1], 5], "at position 11")):
        other = with_arrays(traced, token_ids=ids)
        report = llmjax.compare(traced, other, model=model)
        assert report.verdict == "not_comparable" and report.exit_code == 2 and words in report.reason, report.reason


def test_a_model_without_a_token_is_named(model):
    few = dataclasses.replace(model, config=dataclasses.replace(model.config, vocab_size=3), path=Path("few"))
    with pytest.raises(RequestError, match="few: token_ids: token id 5 is outside the vocabulary"):
        llmjax.compare(model, few, token_ids=[1, 5])


def test_the_command(model, traced, tmp_path, capsys):
    traced.save(tmp_path / "ref")
    bad = dataclasses.replace(traced, activations={**traced.activations, "logits": traced.activations["logits"][::-1]})
    bad.save(tmp_path / "bad")
    assert np.array_equal(
        dumps.open_dump(tmp_path / "bad").read("logits"), bad.activations["logits"]
    )  # a view, saved as it reads
    args = ["--json", "--no-compile-cache", "--junit", str(tmp_path / "j.xml"), "--html", str(tmp_path / "h.html")]
    assert main(["compare", str(tmp_path / "ref"), str(tmp_path / "ref"), *args]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "identical" and found["schema"] == 1 and found["logits"]["kl_max"] == 0
    assert "Tokens and layers" not in (tmp_path / "h.html").read_text()  # a picture of nothing
    assert main(["compare", str(tmp_path / "ref"), str(tmp_path / "bad"), *args]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "different" and found["faults"] == [] and "--model" in found["coverage"]["note"]
    assert found["first_divergence"]["tap"] == "logits"
    page = (tmp_path / "h.html").read_text()
    assert page.startswith("<!doctype html>") and (tmp_path / "j.xml").exists()
    one = llmjax.Trace({"embed": np.ones((1, 24), np.float32)}, {"token_ids": [3]})  # a token, and a batch of it
    assert (
        llmjax.compare(one, llmjax.Trace({"embed": one.activations["embed"][None]}, one.manifest)).verdict
        == "identical"
    )
    assert f"<pre>llmjax compare {tmp_path / 'ref'} {tmp_path / 'bad'} --json --no-compile-cache" in page
    assert main(["compare", str(tmp_path / "ref"), "--no-compile-cache"]) == 2


@pytest.mark.slow
def test_a_fault_behind_several_streams_is_found_where_it_is():
    """Gemma 3n: its streams, its layers' own inputs and the keys that layers share go on as the candidate has them."""
    config = {
        "model_type": "gemma3n_text", "vocab_size": 96, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5, "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 8, "num_hidden_layers": 2, "num_kv_shared_layers": 1, "laurel_rank": 3,
        "layer_types": ["full_attention"] * 2, "altup_num_inputs": 2, "activation_sparsity_pattern": [0, 0],
    }  # fmt: skip
    model = tiny.random_model(**config)
    bad = broken(model, {"layers_0/altup/prediction/weight": lambda w: 1.1 * w})
    report = llmjax.compare(model, llmjax.trace(bad, IDS))
    assert told(report) == [("layers.0.altup.prediction", "weight")]
    assert report.coverage["missing"] == [] and report.first_divergence["tap"] == "layers.0.altup.prediction"


@pytest.mark.slow
def test_experts_that_tie_in_sixteen_bits_are_no_fault():
    """Either may be chosen; with float32 declared the other choice is a difference."""
    model = tiny.random_model(
        model_type="qwen3_moe", vocab_size=96, hidden_size=16, intermediate_size=24, moe_intermediate_size=8,
        head_dim=8, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1, num_experts=4,
        num_experts_per_tok=1, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    router = model.params["layers_0"]["router"]["weight"]
    model = broken(model, {"layers_0/router/weight": lambda w: w.at[1].set(router[0])})
    experts = model.params["layers_0"]["experts"]
    other = {f"layers_0/experts/{name}/weight": lambda w: w[jnp.array([1, 0, 2, 3])] for name in experts}
    trace = llmjax.trace(broken(model, other), IDS, ["layers.0.mlp_norm", "layers.0.router", "layers.0.experts"])
    for dtype, verdict in (("bfloat16", "equivalent"), ("float32", "different")):
        said = llmjax.Trace(trace.activations, {"token_ids": IDS, "dtype": dtype})
        assert llmjax.compare(model, said).verdict == verdict


MIXTURE = dict(
    model_type="qwen3_moe", vocab_size=96, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, head_dim=8,
    num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=1, num_experts=6, num_experts_per_tok=3,
    norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
)  # fmt: skip


@pytest.fixture(scope="module")
def mixture() -> llmjax.Model:
    return tiny.random_model(**MIXTURE)


@pytest.mark.parametrize(
    ("detail", "changes"),
    [
        ("do not add up to 1", {"normalised": False}),
        pytest.param("one expert fewer", {"experts_used": 2}, marks=pytest.mark.slow),
        pytest.param("one expert more", {"experts_used": 4}, marks=pytest.mark.slow),
    ],
)
def test_a_mistake_of_a_router_is_found_in_float32_and_beneath_sixteen_bits(mixture, detail, changes, monkeypatch):
    def router(scene, steps):
        return (cause for cause in catalogue.catalogue(scene, steps) if cause.cause in ("router", "activation"))

    monkeypatch.setattr(patching, "catalogue", router)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32) if x.ndim > 1 else x, mixture.params)
    wrong = dataclasses.replace(mixture.config, **changes)
    for params, dtype in ((mixture.params, "float32"), (rounded, None)):
        one = dataclasses.replace(mixture, params=params, config=wrong)
        resids = llmjax.trace(one, IDS, ["embed", "*.resid_attn", "*.resid"]).activations
        report = llmjax.compare(mixture, llmjax.Trace(resids, {"token_ids": IDS, "dtype": dtype}))
        assert told(report) == [("layers.0.experts", "router")], report.reason
        assert detail in report.reason
    right = llmjax.trace(dataclasses.replace(mixture, params=rounded), IDS, ["embed", "*.resid_attn", "*.resid"])
    report = llmjax.compare(mixture, llmjax.Trace(right.activations, {"token_ids": IDS}))
    assert (report.verdict, report.explained_by) == ("equivalent", "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize(("there", "used"), [(3, 1), (2, 2)])
def test_no_expert_is_none_and_there_are_no_more_than_all(there, used, monkeypatch):
    """Where a token gets one expert, or all."""
    config = {"num_experts": there, "num_experts_per_tok": used}
    model = tiny.random_model(**MIXTURE | config)
    monkeypatch.setattr(patching, "catalogue", lambda *of: (c for c in catalogue.catalogue(*of) if c.cause == "router"))
    arrays = llmjax.trace(model, IDS, ["layers.0.mlp_norm", "layers.0.router", "layers.0.experts"]).activations
    arrays["layers.0.experts"] = arrays["layers.0.experts"] + np.float32(0.1)
    report = llmjax.compare(model, llmjax.Trace(arrays, {"token_ids": IDS, "dtype": "float32"}))
    assert told(report) == [("layers.0.experts", "unknown")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modules", "where"),
    [(("mlp",), " in mlp alone"), (("experts",), " in experts alone"), (("mlp", "experts"), "")],
)
def test_an_mlp_beside_experts_has_an_activation_of_its_own(modules, where, monkeypatch):
    only = ("activation", "residual")
    monkeypatch.setattr(patching, "catalogue", lambda *of: (c for c in catalogue.catalogue(*of) if c.cause in only))
    model = llmjax.load(Path(__file__).parents[1] / "data" / "cases" / "gemma4_moe")
    edit = Edit(dict.fromkeys(modules, base.field(activation=base.always(jax.nn.relu))))
    arrays = edited(Stages(model, np.array(IDS)), edit, "*resid*")
    report = llmjax.compare(model, llmjax.Trace(arrays, {"token_ids": IDS, "dtype": "float32"}))
    found = {(cause["cause"], cause["detail"]) for fault in report.faults for cause in fault["causes"][:1]}
    assert found == {("activation", f"the activation is relu{where}")}


@pytest.mark.slow
def test_an_activation_is_another_behind_a_cutoff_and_in_a_layers_own_input():
    """What is cut off before it stays so, and is a mistake of its own."""
    from tests.unit.test_shared_keys import CONFIGS

    model = tiny.random_model(**CONFIGS["gemma3n"])
    stages = Stages(model, np.array(IDS))
    flow = stages.run(-1, None, {})[0]
    tap = "layers.0.streams"

    def under(edit: Edit, **changes) -> np.ndarray:
        other = dataclasses.replace(model, config=dataclasses.replace(model.config, **changes))
        return (Stages(other, np.array(IDS)) if changes else stages).run(0, flow, {}, edit, [tap])[1][tap]

    ours = under(Edit())
    causes = {c.detail: c for c in blocks.activation(base.Scene(stages, 0, "streams", ours, ours, lambda edit: None))}
    everywhere = under(causes["the activation is relu"].edit)
    np.testing.assert_array_equal(everywhere, under(Edit(), hidden_activation="relu"))
    dense = under(causes["no neuron is cut off (activation_sparsity_pattern)"].edit)
    np.testing.assert_array_equal(dense, under(Edit(), sparsity=(0.0,) * 4))
    alone = [under(causes[f"the activation is relu in {module} alone"].edit) for module in ("mlp", "per_layer")]
    assert len({x.tobytes() for x in (ours, everywhere, dense, *alone)}) == 5


@pytest.mark.parametrize(
    ("kind", "tap", "detail", "path"),
    [
        ("gemma3n", "streams", "what the layer's own input gives is not added", "per_layer/project/weight"),
        ("gemma4", "resid", "what the layer's own input gives is not added", "per_layer/project/weight"),
        ("gemma4", "resid", "the layer's output is not scaled (layer_scalar)", "scale"),
    ],
)
def test_what_a_layer_adds_beside_its_branches_may_be_missing(kind, tap, detail, path):
    from tests.unit.test_shared_keys import CONFIGS

    model = broken(tiny.random_model(**CONFIGS[kind]), {"layers_0/scale": lambda s: 0.7 * s} if path == "scale" else {})
    wrong = broken(model, {f"layers_0/{path}": jnp.ones_like if path == "scale" else jnp.zeros_like})
    stages, other = Stages(model, np.array(IDS)), Stages(wrong, np.array(IDS))
    flow = stages.run(-1, None, {})[0]
    ours, theirs = (s.run(0, flow, {})[1][f"layers.0.{tap}"] for s in (stages, other))
    scene = base.Scene(stages, 0, tap, ours, theirs, lambda edit: None)
    [cause] = [c for c in catalogue.catalogue(scene, [tap]) if c.detail == detail]
    found = stages.run(0, flow, {}, cause.edit)[1][f"layers.0.{tap}"]
    assert cause.cause == "residual" and gap(ours, theirs).error > 1e-2
    stages.run(-1, None, {}, cause.edit)  # as of a mistake that is made everywhere
    np.testing.assert_array_equal(found, theirs)


def test_a_cache_that_is_a_slot_late_is_a_cause(model):
    stages = Stages(model, np.array(IDS))
    flow = stages.run(-1, None, {})[0]
    ours = {name.removeprefix("layers.0."): x for name, x in stages.run(0, flow, {})[1].items()}
    scene = base.Scene(stages, 0, "resid", ours["resid"], ours["resid"], lambda edit: None)
    causes = {c.detail: c for c in blocks.heads(scene) if c.cause == "mask"}
    shape = (len(IDS), model.config.num_key_value_heads, -1)
    late = np.concatenate([ours["attn.v"][:1], ours["attn.v"][:-1]]).reshape(shape)
    expected = np.einsum("nts,snh->tnh", ours["attn.probs"], np.repeat(late, 4 // late.shape[1], 1))
    detail = "{} are those of the token before, a slot late in the cache"
    all_of = ("values", "keys", "keys and values")
    under = {what: stages.run(0, flow, {}, causes[detail.format(what)].edit)[1] for what in all_of}
    out, probs = "layers.0.attn.out", "layers.0.attn.probs"
    np.testing.assert_allclose(under["values"][out].reshape(expected.shape), expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(under["keys"][probs], under["keys and values"][probs])
    assert gap(under["keys"][probs], ours["attn.probs"], 1).error > 1e-2
    assert gap(under["keys"][out], under["keys and values"][out]).error > 1e-2


@pytest.mark.slow
def test_a_class_that_nobody_declared_moves_most_tokens(model):
    """Of a bfloat16 run a few tokens that are as far off as few bits make all are no weights of few bits."""
    classes, stages = ("float32", "bfloat16", "int4"), Stages(model, np.array(IDS))
    narrow, few = (edited(stages, CLASSES[name]()[0], "*resid") for name in ("bfloat16", "int4"))
    found, _ = explained(stages, few, classes, declared=False)
    assert found.name == "int4" and not found.beyond
    mixed = {name: np.concatenate([x[:-3], few[name][-3:]]) for name, x in narrow.items()}
    found, _ = explained(stages, mixed, classes, declared=False)
    assert found.beyond
    found, _ = explained(stages, mixed, classes, declared=True)
    assert not found.beyond


@pytest.mark.slow
def test_a_mistake_in_bfloat16_is_likelier_than_few_bits_that_nobody_declared(mixture, monkeypatch):
    """A factor of what is routed in a bfloat16 run was int4."""
    monkeypatch.setattr(patching, "catalogue", lambda *of: (c for c in catalogue.catalogue(*of) if c.cause == "router"))
    narrow = CLASSES["bfloat16"]()[0]
    times = {"*choice": lambda module, run, x: tuple(f * y for f, y in zip((1.4, 1), run(module, x), strict=True))}
    stages, facts = Stages(mixture, np.array(IDS)), {"token_ids": IDS}
    for name in ("int4", "bfloat16"):
        right = edited(stages, CLASSES[name]()[0], "*resid*")
        report = llmjax.compare(mixture, llmjax.Trace(right, facts))
        assert (report.verdict, report.explained_by) == ("equivalent", name), report.reason
    wrong = edited(stages, dataclasses.replace(narrow, hooks=times), "*resid*")
    report = llmjax.compare(mixture, llmjax.Trace(wrong, facts))
    assert told(report) == [("layers.0.experts", "router")] and "times too large" in report.reason, report.reason


@pytest.mark.slow
def test_what_experts_compute_has_its_causes(mixture):
    """Each changes the experts' sum alone, and what is told is what was changed."""
    config, gate, up = mixture.config, "layers_0/experts/gate/weight", "layers_0/experts/up/weight"
    weights_ = {name: mixture.params["layers_0"]["experts"][name]["weight"] for name in ("gate", "up")}
    cases = {
        ("weight_swapped", "gate and up are swapped"): broken(
            mixture, {gate: lambda _: weights_["up"], up: lambda _: weights_["gate"]}
        ),
        ("activation", "the activation is relu"): dataclasses.replace(
            mixture, config=dataclasses.replace(config, hidden_act="relu")
        ),
    }
    for (word, detail), wrong in cases.items():
        steps = ["*.mlp_norm", "*.router", "*.experts"]
        found = llmjax.trace(wrong, IDS, steps).activations
        report = llmjax.compare(mixture, llmjax.Trace(found, {"token_ids": IDS, "dtype": "float32"}))
        assert told(report) == [("layers.0.experts", word)] and detail in report.reason


@pytest.mark.slow
def test_a_layer_that_is_left_out_where_layers_share_keys():
    from tests.unit.test_shared_keys import CONFIGS

    model = tiny.random_model(**CONFIGS["gemma4"])
    found = llmjax.trace(model, IDS, "*.resid").activations
    found = {"layers.0.resid": found["layers.0.resid"], "layers.1.resid": found["layers.0.resid"]}
    report = llmjax.compare(model, llmjax.Trace(found, {"token_ids": IDS, "dtype": "float32"}))
    assert told(report) == [("layers.1", "layer_order")]


@pytest.mark.slow
def test_yarn_of_which_half_is_there(monkeypatch):
    """Another base comes near to plain frequencies, and is not what is wrong."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    model = tiny.random_model(vocab_size=96, rope_scaling=scaling, num_hidden_layers=1)
    rope = model.config.rope
    factor = rope.scaling.attention_factor
    monkeypatch.setattr(Yarn, "frequencies", lambda self, theta, dims: plain_frequencies(theta, dims))
    trace = llmjax.trace(dataclasses.replace(model), IDS)
    monkeypatch.undo()
    cause = llmjax.compare(model, trace).faults[0]["causes"][0]
    assert (
        cause["cause"] == "rope_scaling"
        and cause["explains"] > 0.99
        and f"factor of cosines and sines, {factor:.4g}" in cause["detail"]
    )


def test_a_norm_of_all_heads_that_is_left_out(monkeypatch):
    model = tiny.random_model(model_type="olmo2", hidden_size=16, intermediate_size=24, num_attention_heads=4,
                              num_key_value_heads=2, num_hidden_layers=1, vocab_size=96)  # fmt: skip
    q = llmjax.trace(model, IDS, "layers.0.attn.q").activations["layers.0.attn.q"]
    wrong = llmjax.trace(model.intervened({"layers.0.attn.q_norm": q}), IDS, "layers.0.attn.q*")
    report = llmjax.compare(model, dataclasses.replace(wrong, manifest={"token_ids": IDS, "dtype": "float32"}))
    assert told(report) == [("layers.0.attn.q_norm", "qk_norm")]


def test_a_norm_of_each_head_has_one_bias(monkeypatch):
    x, bias = np.random.default_rng(0).normal(size=(5, 2, 3)), np.arange(3.0)
    monkeypatch.setattr(base, "weight_of", lambda *_: bias)
    scene = types.SimpleNamespace(ours=x + bias, theirs=2 * x + bias)
    assert base.scale_of(scene, "attn.q_norm") == pytest.approx(2)


@pytest.mark.slow
def test_decays_as_differences_of_running_sums_are_float32(monkeypatch):
    """What transformers makes of them: exact where sums are small, and far off where they are large."""
    model = tiny.random_model(**QWEN35)
    own = model.params["layers_0"]["delta"]
    own |= {"dt_bias": jnp.zeros(2), "a_log": jnp.ones(2), "decay": {"weight": 20 * own["decay"]["weight"]}}
    right, ids = delta.delta_rule, np.random.default_rng(2).integers(0, 96, 40).tolist()

    def rounded(state, q, k, v, decay, beta, kept=True):
        sums = jnp.cumsum(decay, 1)
        return right(state, q, k, v, jnp.diff(sums, axis=1, prepend=0), beta, kept=kept)

    monkeypatch.setattr(delta, "delta_rule", rounded)
    trace = llmjax.trace(dataclasses.replace(model), ids)
    monkeypatch.undo()
    report = llmjax.compare(
        dataclasses.replace(model), llmjax.Trace(trace.activations, {"token_ids": ids, "dtype": "float32"})
    )
    assert (report.verdict, report.explained_by) == ("equivalent", "float32"), report.reason


@pytest.mark.parametrize("case", [tiny.slow("qwen3_moe"), "qwen3_5_cond"])
def test_a_stage_that_is_computed_again_compiles_nothing(case, caplog):
    """Hundreds of causes are tried; each program stays in memory."""
    model = llmjax.load(Path(__file__).parents[1] / "data" / "cases" / case)
    stages = Stages(model, np.arange(5, dtype=np.int32))
    flow, _ = stages.run(-1, None, {}, wanted=())
    for _ in range(2):
        caplog.clear()
        with jax.log_compiles():
            stages.run(0, flow, {})
    assert not [record for record in caplog.records if record.getMessage().startswith("Compiling")]


@pytest.mark.parametrize(
    ("case", "step", "given", "detail"),
    [
        ("lfm2", "resid_attn", "conv.leave", "the layer's input is not added to the attention's output"),
        tiny.slow("qwen3_5_cond", "resid_attn", "delta.o", "the layer's input is not added to the attention's output"),
        tiny.slow("qwen3_moe", "resid", "resid_attn", "the MLP's output is not added"),
    ],
)
def test_a_residual_around_what_is_no_attention_or_no_mlp(case, step, given, detail):
    model = llmjax.load(Path(__file__).parents[1] / "data" / "cases" / case)
    right = llmjax.trace(model, IDS, f"layers.0.{given}").activations[f"layers.0.{given}"]
    wrong = llmjax.trace(model.intervened({f"layers.0.{step}": right}), IDS, "layers.0.*")
    report = llmjax.compare(model, dataclasses.replace(wrong, manifest={"token_ids": IDS, "dtype": "float32"}))
    assert told(report) == [(f"layers.0.{step}", "residual")]
    assert report.faults[0]["causes"][0]["detail"] == detail


def test_a_model_in_place_of_a_dump_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RequestError, match="manifest.json is missing; .*; a model is compared by --candidate-model"):
        dumps.open_dump(tmp_path)


def test_help_names_all_classes(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"may explain differences: {', '.join(CLASSES)} (default" in text
