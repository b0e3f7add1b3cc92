"""LoRA on a tiny model, against its definition: the same checkpoint with ``W + scale * B . A`` written into it."""

import json
import shutil
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llmjax
from llmjax import LLM, LoraError, RequestError, SamplingParams
from llmjax.cli.main import main
from llmjax.lora import adapter as lora_adapter
from llmjax.lora.adapter import Delta, LoraSource, read_adapter
from llmjax.lora.apply import together
from llmjax.models.context import Context
from llmjax.models.tree import get_at, path_of
from llmjax.numerics import resolve
from llmjax.quant.qtensor import dequantize
from tests.tiny import CONFIG, checkpoint, random_ids

RNG = np.random.default_rng(5)
IDS = random_ids(RNG, 30)
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
PROJECTIONS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("lora") / "base")


def weights(base):
    return load_file(base / "model.safetensors")


def write_adapter(base, folder, seed=0, rank=3, alpha=5.0, projections=PROJECTIONS, change=None, dora=False, **config):
    """A PEFT directory; ``change(tensors)`` damages it."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    tensors = {}
    for name, w in weights(base).items():
        if any(p in name for p in projections):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = rng.normal(size=(rank, w.shape[1])).astype(np.float32) * 0.3
            tensors[f"{stem}.lora_B.weight"] = rng.normal(size=(w.shape[0], rank)).astype(np.float32) * 0.3
            if dora:
                m = np.linalg.norm(w, axis=1) * rng.uniform(0.5, 2, len(w)) * (-1) ** (np.arange(len(w)) == 2)
                tensors[f"{stem}.lora_magnitude_vector"] = m.astype(np.float32)
    if change:
        change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": [*projections], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": dora} | config))
    return folder


def test_factors_of_any_floats(base, tmp_path):
    """NumPy's own are of 64 bits, and PEFT takes them."""

    def widened(tensors):
        tensors.update({name: x.astype(np.float64) for name, x in tensors.items()})

    loads = (
        llmjax.load(base, lora=write_adapter(base, tmp_path / n, change=c)) for n, c in (("a", None), ("b", widened))
    )
    found, expected = (model.params["layers_0"]["attn"]["q"]["weight"] for model in loads)
    np.testing.assert_array_equal(found, expected)


def by_hand(base, adapter, folder, scale):
    """The checkpoint the adapter stands for."""
    shutil.copytree(base, folder)
    tensors, factors = weights(base), load_file(adapter / "adapter_model.safetensors")
    for name in list(factors):
        if name.endswith("lora_A.weight"):
            a, b = factors[name], factors[name.replace("lora_A", "lora_B")]
            target = name.removeprefix("base_model.model.").replace(".lora_A", "")
            whole = tensors[target].astype(np.float64) + scale * (b.astype(np.float64) @ a)
            if (m := factors.get(name.replace("lora_A.weight", "lora_magnitude_vector"))) is not None:
                whole *= (m / np.linalg.norm(whole, axis=1))[:, None]
            tensors[target] = whole.astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def adapter(base):
    return write_adapter(base, base.parent / "adapter")


@pytest.fixture(scope="module")
def expected(base, adapter):
    return llmjax.load(by_hand(base, adapter, base.parent / "by_hand", 5.0 / 3)).logits([IDS])[0]


def close(found, expected):
    return np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("mode", ["merged", "unmerged"])
def test_an_adapter_is_what_it_says(base, adapter, expected, mode):
    assert close(llmjax.load(base, lora=adapter, lora_mode=mode).logits([IDS])[0], expected)
    assert not close(llmjax.load(base).logits([IDS])[0], expected)


def test_magnitudes(base, tmp_path):
    """DoRA, beside floats and merged into them; beside packed weights, whose own lengths count, and rounded again."""
    dora = write_adapter(base, tmp_path / "dora", dora=True)
    hand = llmjax.load(by_hand(base, dora, tmp_path / "by_hand", 5.0 / 3))
    unmerged = llmjax.load(base, lora=dora, lora_mode="unmerged")
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        assert close(unmerged.logits([IDS])[0], hand.logits([IDS])[0])
    merged = llmjax.load(base, lora=dora)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), merged.params, hand.params)

    packed = llmjax.convert(base, tmp_path / "packed", quantize="int8")
    beside = llmjax.load(packed, lora=dora).params["layers_1"]["mlp"]["down"]
    lora = beside["lora"]
    whole = dequantize(beside["weight"]) + float(lora.scale) * np.asarray(lora.b) @ np.asarray(lora.a)
    np.testing.assert_allclose(lora.norm, np.linalg.norm(whole, axis=1), rtol=1e-6)
    with pytest.warns(UserWarning, match="rounded again"):
        rounded = llmjax.load(packed, lora=dora, lora_mode="merged").params["layers_1"]["mlp"]["down"]["weight"]
    wanted = np.asarray(whole) * np.asarray(lora.magnitude / lora.norm)[:, None]
    assert np.all(np.abs(dequantize(rounded) - wanted) <= 0.501 * np.asarray(rounded.scales))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [None, 10 / 3])
def test_compare_names_what_is_wrong_with_magnitudes(base, tmp_path, scale):
    """Another runtime that leaves them out; and one with another scale, by which the lengths are others, too."""
    dora = write_adapter(base, tmp_path / "dora", dora=True)
    factors = load_file(dora / "adapter_model.safetensors")
    if scale is None:
        factors = {name: leaf for name, leaf in factors.items() if "magnitude" not in name}
    (tmp_path / "theirs").mkdir()
    save_file(factors, tmp_path / "theirs" / "adapter_model.safetensors")
    theirs = llmjax.load(by_hand(base, tmp_path / "theirs", tmp_path / "other", scale or 5.0 / 3))
    trace = llmjax.trace(theirs, IDS, ["*.0.attn_norm", "*.0.attn.q"])
    trace = llmjax.Trace(trace.activations, {"token_ids": trace.manifest["token_ids"], "dtype": "float32"})
    (fault,) = llmjax.compare(llmjax.load(base, lora=dora, lora_mode="unmerged"), trace).faults
    detail = "the adapter's magnitudes are not applied" if scale is None else "the adapter's scale is 3.333"
    assert fault["causes"][0] == {"cause": "lora_scale", "detail": detail, "explains": 1.0}


def test_magnitudes_of_some_rows(base):
    """Stacked, none changes no bit, and a plain adapter computes the bits that it computes among plain ones."""
    a, b, w = (RNG.normal(size=shape).astype(np.float32) for shape in ((2, 8), (6, 2), (6, 8)))
    deltas = [Delta(a, b, 0.7), Delta(a[:1], b[:, 1:], 1.5, np.arange(-1, 5, dtype=np.float32)), None]
    x = RNG.normal(size=(4, 3, 8)).astype(np.float32)
    ctx = Context(jnp.zeros((4, 3), jnp.int32), resolve("reference", jnp.dtype("float32")), adapter=jnp.arange(4))
    call = jax.jit(lambda lora, w: lora(jnp.asarray(x), jnp.asarray(x @ w.T), w, ctx))
    found, plain = (np.asarray(call(together([deltas[0], d, None], w, "w"), w)) for d in (deltas[1], None))
    assert not found[0].any() and not found[3].any()
    np.testing.assert_array_equal(found[1], plain[1])
    changed = w + deltas[1].rows(slice(0, 6), w, "w")
    np.testing.assert_allclose(found[2] + x[2] @ w.T, x[2] @ changed.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(changed, axis=1), np.abs(deltas[1].magnitude), rtol=1e-5, atol=1e-6)


def test_every_row_its_own(base, adapter, expected):
    """Among strangers and alone: the same bits."""
    other = write_adapter(base, base.parent / "other", seed=1, rank=5, projections=("q_proj", "gate_proj"), dora=True)
    llm = LLM(base, numerics="reference", max_batch=3, chunk=16, block=16, loras={"one": adapter, "two": other})
    names = ["one", None, "two", "one", "two"]
    outputs = [o.outputs[0] for o in llm.generate([IDS] * 5, GREEDY, lora=names)]
    for output, name in zip(outputs, names, strict=True):
        alone = llm.generate(IDS, GREEDY, lora=name)[0].outputs[0]
        assert (alone.token_ids, alone.token_logprobs) == (output.token_ids, output.token_logprobs)
    assert len({tuple(o.token_ids) for o in outputs[:3]}) == 3
    assert llm.engine.traces["decode"] == 1
    with pytest.raises(RequestError, match="no adapter named 'three'; resident are one, two"):
        llm.generate(IDS, GREEDY, lora="three")


@pytest.mark.slow
def test_a_row_beside_is_the_model_merged(base, adapter, tmp_path):
    other = write_adapter(base, tmp_path / "other", seed=1, rank=5, projections=("q_proj", "gate_proj"), dora=True)
    llm = LLM(base, numerics="reference", max_batch=3, chunk=16, block=16, loras={"one": adapter, "two": other})
    names = ["one", None, "two"]
    outputs = [o.outputs[0] for o in llm.generate([IDS] * 3, GREEDY, lora=names)]
    for name, lora in (("one", adapter), (None, None), ("two", other)):
        merged = LLM(base, numerics="reference", lora=lora, max_batch=3, chunk=16, block=16)
        found, wanted = outputs[names.index(name)], merged.generate(IDS, GREEDY)[0].outputs[0]
        assert found.token_ids == wanted.token_ids
        np.testing.assert_allclose(found.token_logprobs, wanted.token_logprobs, atol=1e-4 if name else 0)
        np.testing.assert_allclose(
            llm.score([IDS], lora=name)[0].scored, merged.score([IDS])[0].scored, rtol=1e-4, atol=1e-4
        )


def test_quantized_weights_keep_it_apart(base, adapter, expected):
    """Merging on request rounds again and says what is left."""
    plain, apart = llmjax.load(base, quantize="int8"), llmjax.load(base, quantize="int8", lora=adapter)
    exact = llmjax.load(base, lora=adapter).logits([IDS])[0]
    off = np.abs(apart.logits([IDS])[0] - exact).max()
    assert off < 0.3 * np.abs(plain.logits([IDS])[0] - exact).max()
    packed = llmjax.convert(base, base.parent / "packed", quantize="int8")
    with pytest.warns(UserWarning, match=r"rounded again: [\d,]+ of [\d,]+ values changed, \d+% of the delta"):
        llmjax.load(packed, lora=adapter, lora_mode="merged")


def test_merged_weights_are_kept_as_the_products_need_them(base, adapter, tmp_path):
    """Beside an embedding of float32 the fast profile multiplies in float32: in bfloat16, as the others are stored, a
    part of the delta would be lost.  With all in bfloat16 there is one rounding, that of the sum."""
    where, name, tensor = tmp_path / "mixed", "layers.0.attn.q.weight", "model.layers.0.self_attn.q_proj.weight"
    shutil.copytree(base, where)
    for embedding, kept in ((np.float32, np.float32), (ml_dtypes.bfloat16, ml_dtypes.bfloat16)):
        kinds = {n: embedding if "embed" in n else ml_dtypes.bfloat16 for n in weights(base)}
        save_file({n: w.astype(kinds[n]) for n, w in weights(base).items()}, where / "model.safetensors")
        model = llmjax.load(where, numerics="fast", lora=adapter)
        factors = load_file(adapter / "adapter_model.safetensors")
        a, b = (factors[f"base_model.model.{tensor}".replace("weight", f"lora_{x}.weight")] for x in "AB")
        exact = weights(where)[tensor].astype(np.float64) + 5 / 3 * (b.astype(np.float64) @ a)
        found = np.asarray(get_at(model.params, path_of(name)))
        assert found.dtype == model.numerics.products == kept
        np.testing.assert_allclose(
            found.astype(np.float64), exact, rtol=float(ml_dtypes.finfo(kept).eps) / 1.9, atol=1e-6
        )


def test_scales(base, adapter):
    """rslora, and patterns for some modules."""
    one = ("self_attn.q_proj",)
    lora = write_adapter(
        base, base.parent / "rs", projections=one, use_rslora=True, alpha_pattern={"0.self_attn.q_proj": 9}
    )
    model = llmjax.load(base, lora=lora, lora_mode="unmerged")
    found = [float(model.params[f"layers_{i}"]["attn"]["q"]["lora"].scale) for i in range(2)]
    np.testing.assert_allclose(found, [9 / 3**0.5, 5 / 3**0.5], rtol=1e-6)


def drop(tensors):
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]


def wide(tensors):
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    tensors[name] = np.zeros((3, 50), np.float32)


def rename(old, new):
    def change(tensors):
        for name in [n for n in tensors if old in n]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def magnitude(change):
    """Another magnitude of one module."""

    def damage(tensors):
        name = "base_model.model.model.layers.1.mlp.down_proj.lora_magnitude_vector"
        tensors[name] = change(tensors[name])

    return damage


def extra(name):
    return lambda tensors: tensors.update({name: np.ones((2, 2), np.float32)})


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (drop, {}, "layers.0.self_attn.q_proj: lora_B is missing"),
        (wide, {}, r"layers.1.self_attn.v_proj: lora_A: expected shape \[3, 48\] at rank 3, found \[3, 50\]"),
        (None, {"r": 4}, r"expected shape \[4, 48\] at rank 4, found \[3, 48\]"),
        (rename("layers.1.", "layers.7."), {}, "the model has layers 0 to 1"),
        (rename("q_proj", "w_proj"), {}, "is no projection of this model; expected down_proj"),
        (None, {"target_modules": ["q_proj"]}, "target_modules does not name it"),
        (None, {"target_modules": [*PROJECTIONS, "up_proj"]}, "but the file has no factors of it"),
        (None, {"use_dora": True}, r"layers.0.mlp.down_proj: lora_magnitude_vector is missing \(use_dora\)"),
        (None, {"dora": True, "use_dora": False}, "the file has a magnitude of it .DoRA., but use_dora is false"),
        (magnitude(lambda m: m[None]), {"dora": True}, r"vector: expected shape \[48\] at rank 3, found \[1, 48\]"),
        (magnitude(lambda m: m * np.nan), {"dora": True}, "down_proj: lora_magnitude_vector: NaN or infinite values"),
        (None, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (None, {"bias": "all"}, "bias"),
        (None, {"peft_type": "LOHA"}, "peft_type"),
        (None, {"novelty": 3}, "novelty"),
        (extra("base_model.model.lm_head.weight"), {}, "a whole weight"),
        (extra("base_model.model.lm_head.base_layer.weight"), {}, "of the base, beside which there are no factors"),
        (
            extra("base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector.b.weight"),
            {},
            "several adapters",
        ),
    ],
)
def test_refused_by_name(base, tmp_path, change, config, message):
    lora = write_adapter(base, tmp_path / "a", change=change, **config)
    with pytest.raises(LoraError, match=message):
        llmjax.load(base, lora=lora)


@pytest.mark.parametrize("mode", [None, pytest.param("unmerged", marks=pytest.mark.slow)])
def test_compare_names_another_scale(base, adapter, tmp_path, mode):
    """Merged into the weights or beside them."""
    theirs = llmjax.load(by_hand(base, adapter, tmp_path / "other", 2.3))
    trace = llmjax.trace(theirs, IDS, ["*.0.attn_norm", "*.0.attn.q"])
    trace = llmjax.Trace(trace.activations, {"token_ids": trace.manifest["token_ids"], "dtype": "float32"})
    (fault,) = llmjax.compare(llmjax.load(base, lora=adapter, lora_mode=mode), trace).faults
    assert fault["module"] == "layers.0.attn.q"
    assert fault["causes"][0] == {"cause": "lora_scale", "detail": "the adapter's scale is 2.3", "explains": 1.0}


@pytest.mark.parametrize("name", ["lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight"])
def test_names_of_magnitudes(base, tmp_path, name):
    """As other versions of peft, and state dicts, have them; and weights of which no file says that they are DoRA's."""
    lora = write_adapter(base, tmp_path / "a", change=rename("lora_magnitude_vector", name), dora=True)
    model, file = llmjax.load(base), tmp_path / "w.safetensors"
    shutil.copy(lora / "adapter_model.safetensors", file)
    found, bare = (read_adapter(each, model.architecture, model.config) for each in (lora, LoraSource(file, alpha=5.0)))
    for parameter, delta in found.deltas.items():
        np.testing.assert_array_equal(delta.magnitude, bare.deltas[parameter].magnitude)
        assert delta.magnitude[2] < 0 < delta.magnitude[3]


def test_a_row_without_a_direction(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    name = "model.layers.1.self_attn.v_proj"
    tensors = weights(base)
    tensors[f"{name}.weight"][5] = 0
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    lora = write_adapter(base, tmp_path / "a", dora=True)
    factors = load_file(lora / "adapter_model.safetensors")
    factors[f"base_model.model.{name}.lora_B.weight"][5] = 0
    save_file(factors, lora / "adapter_model.safetensors")
    for mode in ("merged", "unmerged"):
        with pytest.raises(
            LoraError, match="layers.1.attn.v.weight: row 5 .* has the length 0, so there is no direction"
        ):
            llmjax.load(tmp_path / "base", lora=lora, lora_mode=mode)


def test_an_untrained_adapter_warns(base, tmp_path):
    def untrained(tensors):
        for name in tensors:
            if "lora_B" in name:
                tensors[name] *= 0

    lora = write_adapter(base, tmp_path / "a", change=untrained)
    with pytest.warns(UserWarning, match="all deltas are zero and change nothing"):
        llmjax.load(base, lora=lora)


def test_weights_without_a_configuration(base, adapter, expected, tmp_path):
    file = tmp_path / "w.safetensors"
    shutil.copy(adapter / "adapter_model.safetensors", file)
    assert close(llmjax.load(base, lora=LoraSource(file, alpha=5.0, rank=3)).logits([IDS])[0], expected)
    with pytest.raises(LoraError, match="give alpha"):
        llmjax.load(base, lora=file)
    with pytest.raises(LoraError, match="at rank 4"):
        llmjax.load(base, lora=LoraSource(file, alpha=5.0, rank=4))


def test_merge_and_check(base, adapter, expected, tmp_path, capsys, monkeypatch):
    """A normal checkpoint of the base's kind comes out."""
    merged = tmp_path / "merged"
    assert main(["lora", "merge", "--model", str(base), "--lora", str(adapter), "--output", str(merged)]) == 0
    assert close(llmjax.load(merged).logits([IDS])[0], expected)
    assert {n: w.dtype for n, w in weights(merged).items()} == {n: w.dtype for n, w in weights(base).items()}
    capsys.readouterr()
    opened, read = [], lora_adapter.open_adapter
    monkeypatch.setattr(lora_adapter, "open_adapter", lambda path: (opened.append(path), read(path))[1])
    assert main(["lora", "check", "--model", str(base), "--lora", str(adapter), "--json"]) == 0
    assert opened == [adapter]  # what is told of it is told once
    report = json.loads(capsys.readouterr().out)
    assert len(report["modules"]) == 4 * CONFIG["num_hidden_layers"] and not any(m["dora"] for m in report["modules"])
    assert report["difference"] < 1e-4 * report["size"] < report["effect"]
    assert main(["lora", "check", "--model", str(base), "--lora", str(tmp_path)]) == 2
    assert "no adapter here" in capsys.readouterr().err


@pytest.mark.slow
def test_rows_of_a_job_name_theirs(base, adapter, tmp_path):
    lines = [{"id": "a", "prompt_token_ids": IDS, "lora": "one"}, {"id": "b", "prompt_token_ids": IDS}]
    lines += [{"id": "c", "prompt_token_ids": IDS, "lora": "two"}]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    args = ["batch", "--model", str(base), "--input", str(source), "--output", str(target), "--max-tokens", "4"]
    with warnings.catch_warnings():
        assert main([*args, "--temperature", "0", "--lora-modules", f"one={adapter}", "--no-compile-cache"]) == 1
    rows = {r["id"]: r for r in map(json.loads, target.read_text().splitlines()) if "id" in r}
    assert rows["a"]["lora"] == "one" and "lora" not in rows["b"]
    assert rows["a"]["token_ids"] != rows["b"]["token_ids"]
    assert "no adapter named 'two'; resident are one" in rows["c"]["error"]
