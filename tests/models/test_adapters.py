from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jmeta

SOURCE = jmeta.sinusoid(shots=5)
WIDTHS = (1, 8, 8, 1)
RNG = np.random.default_rng(0)
WEIGHTS = [
    (np.float32(RNG.normal(size=(a, b)) / a**0.5), np.float32(0.1 * RNG.normal(size=b))) for a, b in pairwise(WIDTHS)
]


def linen_mlp():
    def tree(weights):
        return {
            name: {"kernel": w, "bias": b} for name, (w, b) in zip(["Dense_0", "Dense_1", "head"], weights, strict=True)
        }

    return jmeta.linen(jmeta.MLP(outputs=1, hidden=(8, 8))), tree


def nnx_mlp():
    def make(rngs):
        layers = [nnx.Linear(a, b, rngs=rngs) for a, b in pairwise(WIDTHS)]
        return nnx.Sequential(layers[0], nnx.relu, layers[1], nnx.relu, layers[2])

    def tree(weights):
        return {"layers": {2 * i: {"kernel": w, "bias": b} for i, (w, b) in enumerate(weights)}}

    return jmeta.nnx(make), tree


def equinox_mlp():
    eqx = pytest.importorskip("equinox")
    model = jmeta.equinox(lambda key: eqx.nn.MLP(1, 1, 8, 2, key=key))
    like = model.init(jax.random.key(0), jnp.ones((1, 1)))[0]

    def tree(weights):
        leaves = [leaf for w, b in weights for leaf in (jnp.swapaxes(w, -1, -2), b)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    return model, tree


def haiku_mlp():
    hk = pytest.importorskip("haiku", exc_type=Exception)

    def tree(weights):
        return {f"mlp/~/linear_{i}": {"w": w, "b": b} for i, (w, b) in enumerate(weights)}

    return jmeta.haiku(lambda inputs: hk.nets.MLP(WIDTHS[1:])(inputs)), tree


ADAPTERS = {"linen": linen_mlp, "nnx": nnx_mlp, "equinox": equinox_mlp, "haiku": haiku_mlp}


def learner_of(model):
    return jmeta.maml(model, inner_rate=0.05, inner_steps=2, loss=jmeta.mean_squared_error)


def by_hand(weights, tasks):
    """φ of each task and the meta-gradient of `learner_of`, from nothing but jax.grad."""

    def loss(weights, examples):
        x = examples.inputs
        for i, (w, b) in enumerate(weights):
            x = (jax.nn.relu(x) if i else x) @ w + b[None]
        return jnp.square(x - examples.targets).mean()

    def adapt(weights, support):
        for _ in range(2):
            weights = jax.tree.map(lambda p, g: p - 0.05 * g, weights, jax.grad(loss)(weights, support))
        return weights

    def objective(weights):
        return jax.vmap(lambda task: loss(adapt(weights, task.support), task.query))(tasks).mean()

    return jax.vmap(lambda task: adapt(weights, task.support))(tasks), jax.grad(objective)(weights)


@pytest.mark.parametrize("library", ADAPTERS)
def test_each_library_gives_the_meta_gradient_written_by_hand(library):
    model, tree = ADAPTERS[library]()
    learner, params, key = learner_of(model), tree(WEIGHTS), jax.random.key(0)
    tasks = jax.vmap(SOURCE.sample, (0, None))(jax.random.split(key, 3), SOURCE.data)
    fresh, state = model.init(key, tasks.support.inputs[0])
    assert_same_shapes(fresh, params)

    @jax.jit
    def by_learner(params):
        φ = jax.vmap(lambda task: learner.adapt(key, params, state, task.support).params)(tasks)
        return φ, jax.grad(lambda params: learner.objective(key, params, state, tasks)[0])(params)

    φ, gradient = jax.jit(by_hand)(WEIGHTS, tasks)
    assert_close(by_learner(params), (tree(φ), tree(gradient)))


def assert_close(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), a, b)


def assert_same_shapes(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert jax.tree.map(np.shape, a) == jax.tree.map(np.shape, b)


@pytest.mark.parametrize("library", ADAPTERS)
def test_each_library_is_trained_by_fit(library):
    model, _ = ADAPTERS[library]()
    fitted = jmeta.fit(jax.random.key(0), learner_of(model), SOURCE, steps=4, tasks=2, log_every=2)
    assert [row["step"] for row in fitted.history] == [2, 4]
    assert np.isfinite([row["loss"] for row in fitted.history]).all()


def linen_normalised():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)
            return nn.Dropout(0.5, deterministic=not train)(x)

    return jmeta.linen(Net())


def nnx_normalised():
    def make(rngs):
        return nnx.Sequential(nnx.BatchNorm(4, momentum=0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))

    return jmeta.nnx(make)


def haiku_normalised():
    hk = pytest.importorskip("haiku", exc_type=Exception)

    def net(inputs, train):
        x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.5)(inputs, is_training=train)
        with jax.numpy_dtype_promotion("standard"):  # hk.dropout multiplies by a mask of booleans
            return hk.dropout(hk.next_rng_key(), 0.5, x) if train else x

    return jmeta.haiku(net)


def equinox_normalised(mode="batch"):
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        norm: eqx.nn.BatchNorm
        drop: eqx.nn.Dropout

        def __init__(self):
            self.norm = eqx.nn.BatchNorm(4, "rows", mode=mode, momentum=0.5)
            self.drop = eqx.nn.Dropout(0.5)

        def __call__(self, x, state, *, key=None):
            x, state = self.norm(x, state)
            return self.drop(x, key=key), state

    return jmeta.equinox(lambda key: eqx.nn.make_with_state(Net)())


NORMALISED = {
    "linen": linen_normalised,
    "nnx": nnx_normalised,
    "haiku": haiku_normalised,
    "equinox": equinox_normalised,
    "equinox, ema": lambda: equinox_normalised("ema"),
}

# the same nets with a switch of another name, {learns} where they learn; the values are what the names say
SWITCHES = {
    "training": "training",
    "is_training": "is_training",
    "deterministic": "not deterministic",
    "use_running_average": "not use_running_average",
    "inference": "not inference",
}
OTHERS = {
    "linen": """
class Net(nn.Module):
    @nn.compact
    def __call__(self, x, {name}):
        x = nn.BatchNorm(use_running_average=not ({learns}), momentum=0.5)(x)
        return nn.Dropout(0.5, deterministic=not ({learns}))(x)
model = jmeta.linen(Net())
""",
    "a field of linen": """
class Net(nn.Module):
    {name}: bool = False
    @nn.compact
    def __call__(self, x):
        {name} = self.{name}
        x = nn.BatchNorm(use_running_average=not ({learns}), momentum=0.5)(x)
        return nn.Dropout(0.5, deterministic=not ({learns}))(x)
model = jmeta.linen(Net())
""",
    "nnx": """
class Net(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.drop = nnx.BatchNorm(4, momentum=0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
    def __call__(self, x, {name}):
        return self.drop(self.norm(x, use_running_average=not ({learns})), deterministic=not ({learns}))
model = jmeta.nnx(Net)
""",
    "an attribute of nnx": """
class Net(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.drop = nnx.BatchNorm(4, momentum=0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        self.{name} = False
    def __call__(self, x):
        {name} = self.{name}
        return self.drop(self.norm(x, use_running_average=not ({learns})), deterministic=not ({learns}))
model = jmeta.nnx(Net)
""",
    "equinox": """
class Net(eqx.Module):
    norm: eqx.nn.BatchNorm
    drop: eqx.nn.Dropout
    def __init__(self):
        self.norm, self.drop = eqx.nn.BatchNorm(4, "rows", mode="batch", momentum=0.5), eqx.nn.Dropout(0.5)
    def __call__(self, x, state, key, {name}):
        x, state = self.norm(x, state, inference=not ({learns}))
        return self.drop(x, key=key, inference=not ({learns})), state
model = jmeta.equinox(lambda key: eqx.nn.make_with_state(Net)())
""",
    "haiku": """
def net(x, {name}):
    x = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.5)(x, is_training={learns})
    with jax.numpy_dtype_promotion("standard"):
        return hk.dropout(hk.next_rng_key(), 0.5, x) if {learns} else x
model = jmeta.haiku(net)
""",
}


def switched(library, name):
    names = {"nn": nn, "nnx": nnx, "jmeta": jmeta, "jax": jax}
    if library in ("equinox", "haiku"):
        names["eqx" if library == "equinox" else "hk"] = pytest.importorskip(library, exc_type=Exception)
    exec(OTHERS[library].format(name=name, learns=SWITCHES[name]), names)
    return names["model"]


MODELS = NORMALISED | {
    f"{library} {name}": lambda library=library, name=name: switched(library, name)
    for library in OTHERS
    for name in SWITCHES
}


@pytest.mark.parametrize("library", MODELS)
def test_batch_norm_and_dropout_train_on_the_support_and_rest_on_the_queries(library):
    model = MODELS[library]()
    x = jnp.asarray(3 * RNG.normal(size=(64, 4)) + 1, jnp.float32)
    one, two = jax.random.split(jax.random.key(0))
    params, fresh = model.init(one, x)

    trained, state = model.apply(one, params, fresh, x, train=True)
    assert 0.3 < float((trained == 0).mean()) < 0.7
    np.testing.assert_array_equal(model.apply(one, params, fresh, x, train=True)[0], trained)
    assert (model.apply(two, params, fresh, x, train=True)[0] != trained).any()
    assert_same_shapes(fresh, state)
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), fresh, state)
    assert any(jax.tree.leaves(moved))

    asked, unmoved = model.apply(one, params, state, x, train=False)
    np.testing.assert_array_equal(model.apply(two, params, state, x, train=False)[0], asked)
    np.testing.assert_allclose(model.apply(one, params, state, x[:1], train=False)[0], asked[:1], rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, state, unmoved)


@pytest.mark.parametrize("library", NORMALISED)
def test_moving_averages_are_constants(library):
    model = NORMALISED[library]()
    x = jnp.asarray(RNG.normal(size=(8, 4)), jnp.float32)
    params, state = model.init(jax.random.key(0), x)

    def statistics(x):
        state_after = model.apply(jax.random.key(0), params, state, x, train=True)[1]
        return sum(leaf.sum() for leaf in jax.tree.leaves(state_after) if leaf.dtype == jnp.float32)

    np.testing.assert_array_equal(jax.grad(statistics)(x), 0)


class TwoDropouts(nnx.Module):
    def __init__(self, rngs):
        self.one, self.two = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return jnp.stack([self.one(x), self.two(x)])


def test_dropout_of_nnx_differs_between_layers_and_between_tasks():
    model = jmeta.nnx(TwoDropouts)
    x = jnp.ones(50)
    params, state = model.init(jax.random.key(0), x)
    assert jax.tree.leaves((params, state)) == []
    keys = jax.random.split(jax.random.key(1), 2)
    masks = jax.vmap(lambda key: model.apply(key, params, state, x, train=True)[0])(keys).reshape(4, 50)
    assert len(np.unique(masks, axis=0)) == 4


X = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
ONE, TWO = jax.random.split(jax.random.key(0))


@pytest.mark.parametrize(
    "noise",
    [
        lambda self, x, train: nn.Dropout(0.5, deterministic=not train, rng_collection="droppath")(x),
        lambda self, x, train: x + jax.random.normal(self.make_rng("noise"), x.shape) if train else x,
    ],
    ids=["droppath", "noise"],
)
def test_every_stream_of_linen_has_a_key(noise):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            first = noise(self, x, train)
            return jnp.stack([first, noise(self, x, train)])

    model = jmeta.linen(Net())
    params, state = model.init(ONE, X)
    a, b, again = (model.apply(key, params, state, X, train=True)[0] for key in (ONE, TWO, ONE))
    np.testing.assert_array_equal(a, again)
    assert (a != b).any() and (a[0] != a[1]).any()
    np.testing.assert_array_equal(model.apply(ONE, params, state, X, train=False)[0][0], X)


def test_what_linen_sows_is_not_kept_and_what_it_counts_is():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.sow("losses", "activity", jnp.mean(x**2))
            self.sow("intermediates", "x", x)
            count = self.variable("counts", "calls", lambda: jnp.zeros(()))
            count.value += 0.0 if self.is_initializing() else 1.0
            return self.perturb("h", nn.Dense(1)(x))

    model = jmeta.linen(Net())
    params, state = model.init(ONE, X)
    assert list(state) == ["counts"]
    for _ in range(2):
        state = model.apply(ONE, params, state, X, train=True)[1]
    assert float(state["counts"]["calls"]) == 2.0
    model.apply(ONE, params, state, X[:2], train=False)  # `perturb` had the shape of the support
    assert jax.tree.map(jnp.shape, params) == {"Dense_0": {"kernel": (4, 1), "bias": (1,)}}


class Own(nn.Module):
    drops: bool = False

    @nn.compact
    def __call__(self, x, mode=None):
        if self.drops:
            return nn.Dropout(0.5, deterministic=False)(x)
        return nn.BatchNorm(use_running_average=True)(x)


class Needs(nn.Module):
    @nn.compact
    def __call__(self, x, phase):
        return x


def test_what_linen_cannot_switch_is_told():
    with pytest.raises(jmeta.ModelError, match="the call of Needs needs 'phase', which jmeta does not give"):
        jmeta.linen(Needs())
    with pytest.raises(jmeta.ModelError, match="'Dropout_0' drops out where the network answers; give it determin"):
        jmeta.linen(Own(drops=True)).apply(ONE, {}, {}, X, train=False)
    model = jmeta.linen(Own())
    params, state = model.init(ONE, X)
    model.apply(ONE, params, state, X, train=False)
    with pytest.raises(jmeta.ModelError, match="'BatchNorm_0' does nothing where the network learns: use_running_av"):
        model.apply(ONE, params, state, X, train=True)


def test_what_nnx_and_haiku_cannot_switch_is_told():
    class Phased(nnx.Module):
        def __init__(self, rngs):
            pass

        def __call__(self, x, phase):
            return x

    with pytest.raises(jmeta.ModelError, match="the call of Phased needs 'phase'"):
        jmeta.nnx(Phased)
    pytest.importorskip("haiku", exc_type=Exception)
    with pytest.raises(jmeta.ModelError, match="the call of <lambda> needs 'phase'"):
        jmeta.haiku(lambda x, phase: x)


def test_what_equinox_cannot_do_is_told():
    eqx = pytest.importorskip("equinox")

    def net(call, **fields):
        return type("Net", (eqx.Module,), {"__call__": call, "__annotations__": dict.fromkeys(fields, object)})(
            **fields
        )

    norm, drop = eqx.nn.BatchNorm(4, "batch", mode="batch"), eqx.nn.Dropout(0.5)
    for make, sentence in (
        (
            lambda key: net(lambda self, x, state: self.norm(x, state), norm=norm),
            r"make it by eqx.nn.make_with_state\(Net\)",
        ),
        (
            lambda key: net(lambda self, x: self.drop(x), drop=drop),
            "has dropout and gets no key; let its __call__ take",
        ),
        (lambda key: net(lambda self, x, phase: x), "the call of Net needs 'phase'"),
        (eqx.nn.make_with_state(lambda key: net(lambda self, x: x, norm=norm)), "has a state and does not take it"),
    ):
        with pytest.raises(jmeta.ModelError, match=sentence):
            jmeta.equinox(make)
    last = type(net(lambda self, x, state: (x, state.set(self.last, x)), last=None))
    model = jmeta.equinox(lambda key: eqx.nn.make_with_state(last)(last=eqx.nn.StateIndex(jnp.zeros(4))))
    params, state = model.init(ONE, X)
    with pytest.raises(jmeta.ModelError, match="the state of the network differs between the examples"):
        model.apply(ONE, params, state, X, train=True)


@pytest.mark.parametrize("library", ["equinox", "linen training", "nnx deterministic"])
def test_a_network_with_a_switch_and_a_state_is_trained_by_fit(library):
    source = jmeta.from_arrays(RNG.normal(size=(40, 4)), np.repeat(np.arange(4), 10), ways=4, shots=2, queries=2)
    learner = jmeta.maml(MODELS[library](), inner_rate=0.1)
    fitted = jmeta.fit(ONE, learner, source, steps=2, tasks=2, log_every=2)
    moved = jax.tree.leaves(fitted.state)
    assert np.isfinite(fitted.history[0]["loss"]) and any(float(abs(x.astype(float)).sum()) > 0 for x in moved)
