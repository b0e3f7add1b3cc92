"""What takes the place of an activation does so everywhere the model runs, and nowhere else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval

import llmjax
from llmjax import LLM, RequestError, SamplingParams
from llmjax.batch.identity import identity
from llmjax.checkpoint.identity import differences, model_facts
from llmjax.models.context import Context
from llmjax.models.interventions import Place, tap_places
from llmjax.runtime.cache import make_cache
from tests.parity.test_cases import NAMES, loaded
from tests.parity.variants import VARIANTS
from tests.tiny import checkpoint, random_model, slow, some
from tests.unit.test_stack import packed_model

MODEL = random_model()
IDS = [5, 9, 2, 77, 31, 8]
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=2)
PROMPTS = [[5, 9, 2], list(range(1, 20))]
STEER = np.linspace(-2, 2, 48, dtype=np.float32)
# A variant of each architecture that has some; the others have cases.
ONE_EACH = {config["model_type"]: name for name, config in reversed(VARIANTS.items())}.values()
QUICK = {"falcon_rw", "lfm2"}


def same(value):
    return value


def steered(value):
    return value + STEER


def after_the_second(value, at):
    return jnp.where((at.positions >= 2)[..., None], value + STEER, value)


@pytest.mark.parametrize("name", some(QUICK, [*ONE_EACH, *NAMES]))
def test_every_tap_of_every_architecture_is_what_the_model_goes_on_with(name):
    """The logits hang on what is added at each of them."""
    model = loaded(name)[0] if name in NAMES else random_model(**VARIANTS[name])
    names = list(tap_places(model.config))

    def logits(added):
        add = {name: lambda x, d=d: x + d.astype(x.dtype) for name, d in zip(names, added, strict=True)}
        return model.apply(model.params, jnp.arange(1, 7)[None], interventions=add)

    jaxpr = jax.make_jaxpr(logits)([jnp.float32(0)] * len(names)).jaxpr
    _, used = partial_eval.dce_jaxpr(jaxpr, [True])
    assert [n for n, is_used in zip(names, used, strict=True) if not is_used] == []
    assert len(names) > 10 * model.config.num_hidden_layers


@pytest.mark.parametrize("name", some(QUICK, [*ONE_EACH, *NAMES]))
def test_every_tap_of_every_architecture_is_there_with_a_cache(name):
    """In a chunk of a prompt and in a step: one that were not would be refused."""
    model = loaded(name)[0] if name in NAMES else random_model(**VARIANTS[name])
    everywhere = model.intervened(dict.fromkeys(tap_places(model.config), same)).module
    cache = make_cache(model.config, model.numerics, 1, 256)
    table, active = jnp.zeros((1, 1), jnp.int32), jnp.array([True])
    for count, slots in ((4, {"last": jnp.array([3])}), (1, {"active": active})):
        ids = jnp.zeros((1, count), jnp.int32)
        ctx = Context(jnp.arange(count)[None], model.numerics, table=table, slot=jnp.int32(0), **slots)
        variables = {"params": model.params, "cache": cache}
        jax.eval_shape(lambda v, ids=ids, ctx=ctx: everywhere.apply(v, ids, ctx, mutable=["cache"]), variables)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A model of four layers, by transformers and by us."""
    transformers = pytest.importorskip("transformers", reason="parity extra not installed")
    folder = checkpoint(tmp_path_factory.mktemp("hooked"), num_hidden_layers=4)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"), llmjax.load(folder)


def close(found, expected, tolerance=1e-5):
    found, expected = np.asarray(found), np.asarray(expected)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_steering_is_a_hook_of_transformers(theirs):
    torch = pytest.importorskip("torch")
    model, ours = theirs
    handle = model.model.layers[3].register_forward_hook(lambda module, args, out: out + torch.tensor(STEER))
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].numpy()
        handle.remove()
        plain = model(torch.tensor([IDS])).logits[0].numpy()
    name = "layers.3.resid"
    assert np.abs(expected - plain).max() > 0.05 * np.abs(expected).max()
    close(ours.logits([IDS], interventions={name: steered})[0], expected)
    close(ours.logits([IDS])[0], plain)
    program = jax.jit(lambda params, ids: ours.apply(params, ids, interventions={name: steered}))
    close(program(ours.params, jnp.array([IDS]))[0], expected)
    trace = llmjax.trace(ours, IDS, ["logits", name], interventions={name: steered})
    close(trace.activations["logits"], expected)
    close(trace.activations[name], llmjax.trace(ours, IDS, name).activations[name] + STEER)
    assert list(trace.manifest["interventions"]) == [name]


def test_a_derivative_by_a_tap_is_torchs(theirs):
    torch = pytest.importorskip("torch")
    model, ours = theirs
    kept = {}

    def keep(module, args, out):
        out.retain_grad()
        kept["resid"] = out

    handle = model.model.layers[1].register_forward_hook(keep)
    torch.log_softmax(model(torch.tensor([IDS])).logits[0, -1], -1)[7].backward()
    handle.remove()

    def loss(added):
        logits = ours.apply(ours.params, jnp.array([IDS]), interventions={"layers.1.resid": lambda x: x + added})
        return jax.nn.log_softmax(logits[0, -1])[7]

    close(jax.jit(jax.grad(loss))(jnp.zeros((1, len(IDS), 48))), kept["resid"].grad.numpy(), 2e-5)


def test_an_array_takes_a_values_place():
    """That of a trace as it is, probabilities too; a number everywhere; and nothing that does not fit."""
    other = llmjax.trace(MODEL, IDS[::-1])
    for name in ("layers.1.resid", "layers.1.attn.q_rot", "layers.1.attn.probs"):
        found = llmjax.trace(MODEL, IDS, [name], interventions={name: other.activations[name]})
        np.testing.assert_array_equal(found.activations[name], other.activations[name])
    patched = MODEL.logits([IDS], interventions={"layers.1.resid": other.activations["layers.1.resid"]})[0]
    close(patched, other.activations["logits"])
    assert (
        not llmjax.trace(MODEL, IDS, "layers.0.mlp.act", interventions={"layers.0.mlp.act": 0})
        .activations["layers.0.mlp.act"]
        .any()
    )
    with pytest.raises(RequestError, match=r"layers.1.resid: an array of shape \[3, 48\] does not fit \[1, 6, 48\]"):
        llmjax.trace(MODEL, IDS, interventions={"layers.1.resid": np.zeros((3, 48))})


def test_what_takes_a_values_place_is_of_its_dtype():
    """In 16 bits as if it had been rounded to them: the model does not go on in float32."""
    model, narrow = random_model("hf", "bfloat16", num_hidden_layers=1), jnp.bfloat16
    assert model.numerics.activations == narrow

    @jax.jit
    def logits(vector):
        places = (vector, lambda x: x + vector), (vector.astype(narrow), lambda x: (x + vector).astype(narrow))
        return [model.apply(model.params, jnp.array([IDS]), interventions={"embed": a, "layers.0.attn.out": f})
                for a, f in places]  # fmt: skip

    found, expected = logits(jnp.asarray(STEER))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"layers.1.atn.q": same}, r"'layers.1.atn.q' is no tap of this model; near it are layers.1.attn.q"),
        ({"layers.2.resid": same}, r"'layers.2.resid' is no tap of this model; near it are layers.1.resid"),
        ({"embed": "zero"}, "embed: expected a function or an array of numbers, found 'zero'"),
        ({"embed": None}, "embed: expected a function or an array of numbers, found None"),
        ({"embed": np.full(48, 1j)}, "embed: expected a function or an array of numbers, found"),
        ({"embed": np.array([None])}, "embed: expected a function or an array of numbers, found"),
        (
            {"embed": lambda x: x[..., :1]},
            r"must return an array of numbers of the value's shape \[1, 6, 48\], found .*1, 6, 1",
        ),
        ({"embed": lambda x: None}, "must return an array of numbers of the value's shape .* found None"),
        (
            {"embed": lambda x: x * 1j},
            r"must return an array of numbers of the value's shape \[1, 6, 48\], found .*complex64",
        ),
        ({"embed": lambda: 0}, r"embed: expected a function of a tap's value, or of that and At, found one of \(\)"),
        ({"embed": lambda x, *, at: x}, r"or of that and At, found one of \(x, \*, at\)"),
        ([same], "expected functions or arrays by tap"),
    ],
)
def test_what_cannot_be_is_one_clear_error(wrong, message):
    for call in (
        lambda: MODEL.apply(MODEL.params, jnp.array([IDS]), interventions=wrong),
        lambda: llmjax.trace(MODEL, IDS, interventions=wrong),
    ):
        with pytest.raises(RequestError, match=message):
            call()


def test_a_model_shows_where_it_has_some():
    found = repr(MODEL.intervened({"embed": same, "layers.1.resid": 0}))
    assert "; numerics reference, interventions at embed, layers.1.resid; a" in found and "interventions" not in repr(
        MODEL
    )


def test_what_a_call_does_not_come_by_is_refused():
    """What were never heard of would change nothing."""
    module = MODEL.intervened({"embed": same}).module
    nowhere = Place(("layers_0", "tap:nowhere"), (1, 1, 48))
    module = dataclasses.replace(module, interventions={"nowhere": same}, places={"nowhere": nowhere})
    ids = jnp.array([IDS])
    with pytest.raises(RequestError, match="interventions: nowhere: not computed here"):
        jax.eval_shape(lambda p: module.apply({"params": p}, ids, Context.whole(ids, MODEL.numerics)), MODEL.params)


def test_one_tap_has_one_intervention():
    with pytest.raises(RequestError, match="embed: the model has one there"):
        MODEL.intervened({"embed": same}).intervened({"embed": same})


def test_a_function_that_changes_its_mind_is_heard():
    """What is compiled for one call is kept for none."""
    factor = 1.0

    def times(value):
        return value * factor

    once = MODEL.logits([IDS])[0]
    for factor in (2.0, 3.0):
        found = MODEL.logits([IDS], interventions={"logits": times})[0]
        close(found, factor * once)
    np.testing.assert_array_equal(MODEL.logits([IDS])[0], once)


def test_what_a_function_looks_at_may_change():
    """A model with interventions, its traces and its engine compute what the function says now, not what it said when
    it was compiled; an array that was changed is no other."""
    strength, vector, plain = 1.0, STEER.copy(), random_model(num_hidden_layers=1)
    model = plain.intervened({"layers.0.resid": lambda x, at: x + strength * vector, "layers.0.attn.o": vector})
    llm = made(model)

    def found():
        (logits,), trace = model.logits([IDS]), llmjax.trace(model, IDS, "logits")
        scores = llm.score([IDS[:3]])[0].logprobs[1:]
        return logits, trace.activations["logits"], scores

    before = found()
    strength = 2.0
    vector[:] = STEER / 3
    expected = plain.intervened({"layers.0.resid": lambda x: x + STEER / 1.5, "layers.0.attn.o": STEER / 3})
    (logits,) = expected.logits([IDS])
    scores = jax.nn.log_softmax(logits)[jnp.arange(2), jnp.array(IDS[1:3])]
    for _ in range(2):
        for now, then, wanted in zip(found(), before, (logits, logits, scores), strict=True):
            close(now, wanted)
            assert np.abs(now - np.asarray(then)).max() > 0.01
    assert llm.engine.traces == {"score_texts": 2}


@pytest.mark.slow
def test_what_a_function_looked_at_is_in_no_prefix():
    """An engine generates what it does now, from the beginning of a prompt that it knows."""
    strength, prompts = 1.0, [list(range(1, 40))]
    llm = made(MODEL, {"layers.0.resid": lambda x: x + strength * STEER})
    before = generated(llm, prompts)
    strength = 2.0
    expected = generated(made(MODEL, {"layers.0.resid": lambda x: x + 2 * STEER}), prompts)
    assert generated(llm, prompts) == expected != before
    assert generated(llm, prompts) == expected


def test_an_error_says_at_which_tap():
    with pytest.raises(ZeroDivisionError) as caught:
        MODEL.logits([IDS], interventions={"embed": lambda x: x / 0 if x.ndim == 1 else 1 // 0})
    assert caught.value.__notes__[0] == "in the intervention at embed"


def test_a_result_says_what_was_computed():
    """By the operations and the values that functions look at: a job with others is another job."""
    strength = 1.0

    def steer(x):
        return x + strength * STEER

    def facts(**changes):
        return model_facts(MODEL.intervened({name.replace("_", "."): f for name, f in changes.items()}))

    one = facts(embed=steer, logits=STEER[0])
    assert facts(embed=lambda x: x + 1.0 * STEER.copy(), logits=STEER.copy()[0]) == one
    others = [facts(embed=steer, logits=STEER[1]), facts(embed=lambda x: x - STEER, logits=STEER[0])]
    prompts = facts(embed=lambda x: x if x.shape[1] == 1 else x + STEER)
    answers = facts(embed=lambda x: x if x.shape[1] > 1 else x + STEER)
    plain = facts(embed=same)
    strength = 2.0
    others.append(facts(embed=steer, logits=STEER[0]))
    assert all(list(differences(one, other)) for other in others)
    assert list(differences(plain, prompts)) and list(differences(plain, answers))
    assert list(one["interventions"]) == ["embed", "logits"] and "interventions" not in model_facts(MODEL)


def test_a_result_knows_values_within_compiled_functions():
    def facts(vector):
        added = jax.jit(lambda x: jax.lax.fori_loop(0, 2, lambda _, y: y + vector, x))
        return model_facts(MODEL.intervened({"embed": added}))["interventions"]

    assert facts(jnp.asarray(STEER)) == facts(jnp.asarray(STEER)) != facts(jnp.asarray(2 * STEER))


def test_a_job_goes_on_with_the_same_processor():
    bias = 1.0

    def processor(logits, tokens):
        return logits.at[:, 7].add(bias)

    def asked():
        return identity(LLM(MODEL, max_batch=2, chunk=16, block=16, logits_processor=processor), GREEDY)

    first, again = asked(), asked()
    bias = 2.0
    assert first == again and [d.partition(":")[0] for d in differences(first, asked())] == ["logits_processor"]
    assert "logits_processor" not in identity(made(MODEL), GREEDY)


def test_a_model_that_is_changed_is_what_it_is_now():
    """Attributes are heard where a program was compiled before, too."""
    model = random_model(num_hidden_layers=1)
    before = model.logits([IDS])[0]
    model.config = dataclasses.replace(model.config, rms_norm_eps=0.5)
    expected = dataclasses.replace(model).logits([IDS])[0]
    np.testing.assert_array_equal(model.logits([IDS])[0], expected)
    assert np.abs(expected - before).max() > 0.01 * np.abs(before).max()


def test_the_layers_without_one_share_a_trace(monkeypatch):
    from llmjax.models import layers

    model = random_model(num_hidden_layers=8)
    traced, dense = [], layers.dense_attention
    monkeypatch.setattr(layers, "dense_attention", lambda *a: traced.append(1) or dense(*a))
    at_three = {"layers.3.resid": steered}
    jax.make_jaxpr(lambda p: model.apply(p, jnp.ones((1, 5), jnp.int32), interventions=at_three))(model.params)
    assert len(traced) <= 4  # two for the names, one for seven layers, one for the fourth


def made(model, interventions=None):
    return LLM(model, max_batch=2, chunk=16, block=16, **({"interventions": interventions} if interventions else {}))


def generated(llm, prompts):
    rows = [r.outputs[0] for r in llm.generate(prompts, GREEDY)]
    return [(row.token_ids, row.token_logprobs, row.logprobs) for row in rows]


def answers(llm):
    """Tokens and log-probabilities of all that an engine does, to the bit; what streams is what it generates."""
    streamed = [u.row for u in llm.run([llm.request(PROMPTS[0], GREEDY)], burst=1) if u.row.finish_reason]
    rows, scores = generated(llm, PROMPTS), llm.score([[5, 9, 2, 77], list(range(1, 30))])
    assert [row._token_ids for row in streamed] == [rows[0][0]]
    return rows, [score.logprobs for score in scores]


@pytest.fixture(scope="module", params=["float", slow("stacked")])
def model(request):
    return random_model("fast") if request.param == "float" else packed_model()


@pytest.fixture(scope="module")
def plain(model):
    return answers(made(model))


@pytest.mark.slow
def test_the_identity_changes_no_bit(model, plain):
    """At every tap, in whole and in single layers, generated, scored and streamed."""
    llm = made(model, dict.fromkeys(tap_places(model.config), same))
    assert answers(llm) == plain


def change(model):
    steer = np.resize(STEER, model.config.hidden_size)
    return {
        f"layers.{model.config.num_hidden_layers - 1}.resid": lambda x, at: jnp.where(
            (at.positions >= 2)[..., None], x + steer, x
        ),
        "layers.0.attn.o": lambda x: x * 0.5,
        "layers.1.attn.probs": without_the_first,
        # In a prompt's last chunk that of its last token alone.
        "final_norm": lambda x, at: x * (1 + at.positions % 3 + at.ids % 3)[..., None],
    }


def without_the_first(probs):
    """The first head does not look at the text's first token, unless it is alone."""
    kept = probs.at[:, 0, 0, :, 0].set(0)
    return kept / jnp.maximum(jnp.sum(kept, -1, keepdims=True), 1e-9)


def follows(rows, prompts, model):
    """What was generated has the log-probabilities that the model gives it without a cache."""
    for prompt, (tokens, logprobs, _) in zip(prompts, rows, strict=True):
        every = jax.nn.log_softmax(model.logits([prompt + tokens])[0], -1)
        places = jnp.arange(len(prompt) - 1, len(prompt) + len(tokens) - 1)
        np.testing.assert_allclose(logprobs, every[places, jnp.array(tokens)], atol=2e-4)


def test_an_engine_is_steered(model):
    """In a layer's own place, whether or not layers run in a loop; a prompt of two chunks."""
    llm = made(model, change(model))
    follows(generated(llm, PROMPTS[1:]), PROMPTS[1:], llm.model)


@pytest.mark.slow
@pytest.mark.parametrize("changed_first", [False, True])
def test_no_other_engine_is_steered(model, plain, changed_first):
    """Two engines of one model in either order, and streams."""
    engines = [made(model), made(model, change(model))]
    for llm in engines[:: -1 if changed_first else 1]:
        found = answers(llm)
        assert (found == plain) == (llm is engines[0])
        follows(found[0], PROMPTS, llm.model)
        every = jax.nn.log_softmax(llm.model.logits([[5, 9, 2, 77]])[0], -1)
        np.testing.assert_allclose(found[1][0][1:], every[jnp.arange(3), jnp.array([9, 2, 77])], atol=2e-4)
    assert answers(engines[0]) == plain


@pytest.mark.slow
def test_an_intervention_in_one_row_leaves_the_others_bits(model):
    """At a token that the first prompt alone has, and so in all that follows it there."""
    steer = np.resize(STEER, model.config.hidden_size)
    prompts = [[5, 500, 2], PROMPTS[1]]
    marked = {"layers.0.resid": lambda x, at: jnp.where((at.ids == 500)[..., None], x + steer, x)}
    before, after = (generated(made(model, change), prompts) for change in (None, marked))
    assert 500 not in before[1][0] and before[1] == after[1] and before[0] != after[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma2_window_1", "falcon_7b_alibi_bias", "gemma3", "phi"])
def test_what_a_token_looks_at_is_changed_with_a_cache_too(name):
    """Under windows, soft-caps and biases of position; what a function puts out of sight counts for nothing."""
    model = random_model("fast", **VARIANTS[name])
    last = f"layers.{model.config.num_hidden_layers - 1}.attn.probs"
    changes = {"layers.0.attn.probs": without_the_first, last: without_the_first}
    llm = made(model, changes)
    rows = generated(llm, PROMPTS[1:])
    follows(rows, PROMPTS[1:], llm.model)
    assert rows != generated(made(model), PROMPTS[1:])
    changes[last] = lambda probs: without_the_first(probs) + jnp.where(probs == 0, 7, 0)
    assert rows == generated(made(model, changes), PROMPTS[1:])


def test_a_graph_takes_none():
    from llmjax.litert.model import GraphModel

    graph = GraphModel(**{f.name: None for f in dataclasses.fields(GraphModel)})
    with pytest.raises(RequestError, match="a graph .* takes none"):
        graph.intervened({"embed": same})
