"""A user's convolutions are brought to the one that is fast under the weights of each task; the numbers stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jmeta

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(3, 6, 5, 2))


class LinenNet(nn.Module):
    """With a layer made in place and one made in `setup`, of several forms."""

    def setup(self):
        self.first = nn.Conv(4, (3, 3), strides=2, param_dtype=float)

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(self.first(x))
        x = nn.tanh(
            nn.Conv(4, (2, 3), feature_group_count=2, kernel_dilation=2, padding="CIRCULAR", param_dtype=float)(x)
        )
        return nn.Dense(2, param_dtype=float)(x.reshape(len(x), -1))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(2, 4, (3, 3), strides=2, param_dtype=float, rngs=rngs)
        self.groups = nnx.Conv(
            4, 4, (2, 3), feature_group_count=2, kernel_dilation=2, padding="CIRCULAR", param_dtype=float, rngs=rngs
        )
        self.head = nnx.Linear(36, 2, param_dtype=float, rngs=rngs)

    def __call__(self, x):
        x = nnx.tanh(self.groups(nnx.tanh(self.first(x))))
        return self.head(x.reshape(len(x), -1))


def plain_linen():
    """Linen as it is."""
    module = LinenNet()
    apply = lambda key, params, state, x, *, train: (module.apply({"params": params}, x), state)  # noqa: E731
    return jmeta.Model(lambda key, x: (module.init(key, x)["params"], {}), apply)


def plain_nnx():
    graph, params = nnx.split(NnxNet(nnx.Rngs(KEY)))

    def apply(key, params, state, x, *, train):
        new = jax.tree.unflatten(jax.tree.structure(nnx.split(NnxNet(nnx.Rngs(0)))[1]), jax.tree.leaves(params))
        return nnx.merge(graph, new)(x), state

    return jmeta.Model(lambda key, x: (nnx.to_pure_dict(params), {}), apply)


PAIRS = {"linen": (lambda: jmeta.linen(LinenNet()), plain_linen), "nnx": (lambda: jmeta.nnx(NnxNet), plain_nnx)}


def meta_gradient(model):
    learner = jmeta.maml(model, inner_rate=0.1, inner_steps=2, loss=jmeta.mean_squared_error)
    examples = jmeta.Examples(jnp.stack([X, 2 * X]), jnp.ones((2, 3, 2)))
    tasks = jmeta.Task(examples, examples._replace(inputs=-examples.inputs))
    return jax.jit(lambda params: jax.value_and_grad(lambda p: learner.objective(KEY, p, {}, tasks)[0])(params))


@pytest.mark.filterwarnings("ignore:the inner loop adapts convolutions")  # of the plain layer
@pytest.mark.parametrize("library", PAIRS)
def test_a_users_convolution_gives_the_meta_gradient_of_the_plain_layer_without_grouped_ones(library, float64):
    ours, plain = (make() for make in PAIRS[library])
    params, _ = ours.init(KEY, jnp.asarray(X))
    outputs = [model.apply(KEY, params, {}, jnp.asarray(X), train=True)[0] for model in (ours, plain)]
    np.testing.assert_allclose(*outputs, rtol=1e-12, atol=1e-12)
    gradients = [meta_gradient(model) for model in (ours, plain)]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12),
        *(gradient(params) for gradient in gradients),
    )
    fast, slow = (str(jax.make_jaxpr(gradient)(params)) for gradient in gradients)
    assert "task_conv" in fast and "conv_general_dilated" not in fast
    assert "conv_general_dilated" in slow


def own(*args, **kwargs):
    return jax.lax.conv_general_dilated(*args, **kwargs)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"kernel_size": (3, 3), "conv_general_dilated": own}, (2, 5, 5, 2)),  # the user's own stays
        ({"kernel_size": (7, 7), "padding": "VALID"}, (2, 5, 5, 2)),  # nothing is left of the input
        ({"kernel_size": (1, 1, 1, 1)}, (2, 2, 2, 2, 2, 2)),
    ],
)
def test_what_the_fast_convolution_does_not_take_is_left_as_it_is(options, shape):
    x = jnp.ones(shape)
    module = nn.Conv(3, **options)
    model = jmeta.linen(module)
    params, state = model.init(KEY, x)
    np.testing.assert_array_equal(
        model.apply(KEY, params, state, x, train=False)[0], module.apply({"params": params}, x)
    )
    assert "task_conv" not in str(jax.make_jaxpr(lambda p: model.apply(KEY, p, state, x, train=False)[0])(params))


def test_the_users_module_is_not_changed():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Conv(2, 3, (3, 3), preferred_element_type=jnp.float32, rngs=rngs)

        def __call__(self, x):
            return self.layer(x)

    made = []
    model = jmeta.nnx(lambda rngs: made.append(Net(rngs)) or made[-1])
    params, state = model.init(KEY, jnp.ones((2, 5, 5, 2)))
    assert made[-1].layer.conv_general_dilated is jax.lax.conv_general_dilated
    call = str(jax.make_jaxpr(lambda p: model.apply(KEY, p, state, jnp.ones((2, 5, 5, 2)), train=False)[0])(params))
    assert "conv_general_dilated" in call  # an argument that ours does not know


class Transposed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.ConvTranspose(3, (3, 3))(x).reshape(len(x), -1))


def haiku_net(x):
    import haiku as hk

    return hk.Linear(2)(hk.Flatten()(hk.Conv2D(3, 3)(x)))


@pytest.mark.parametrize("make", [lambda: jmeta.linen(Transposed()), lambda: jmeta.haiku(haiku_net)])
def test_a_convolution_that_stays_slow_is_told_where_it_is_adapted_and_only_there(make):
    images = np.random.default_rng(0).normal(size=(40, 6, 5, 2)).astype(np.float32)
    source = jmeta.from_arrays(images, np.arange(40) // 10, ways=2, shots=1, queries=2)
    model = make()
    with pytest.warns(
        UserWarning, match=r"adapts convolutions that are many times slower .* take jmeta.Conv, or nn.Conv"
    ):
        jmeta.fit(KEY, jmeta.maml(model), source, steps=1, tasks=2)
    head = jmeta.maml(model, adaptable=lambda path: path.startswith(("Dense", "linear")))
    jmeta.fit(KEY, head, source, steps=1, tasks=2)
    jmeta.fit(KEY, jmeta.prototypical(model), source, steps=1, tasks=2)
