"""Low-rank factors beside the kernels: they start at nothing, are what an inner loop adapts, and are few."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jmeta
from jmeta.errors import ConfigError, ModelError
from jmeta.tree import path_name, under

IS_LORA = under("lora")


class Network(nn.Module):
    """A convolution, attention and dense layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(jmeta.Conv(8, (3, 3), strides=2)(x)).reshape(len(x), -1, 8)
        x = x + nn.MultiHeadDotProductAttention(2)(x)
        return nn.Dense(6, name="head")(x.mean(axis=1))


def factors(params):
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params) if IS_LORA(path_name(path))}


def test_the_network_starts_as_it_was_and_each_kernel_has_a_change_of_its_rank():
    images = jax.random.normal(jax.random.key(1), (3, 6, 6, 2))
    plain = jmeta.linen(Network())
    model = jmeta.lora(plain, 2, alpha=6.0)
    (own, _), (params, state) = (jax.jit(m.init)(jax.random.key(0), images) for m in (plain, model))
    outputs, _ = model.apply(jax.random.key(2), params, state, images, train=True)
    np.testing.assert_allclose(outputs, plain.apply(jax.random.key(2), own, {}, images, train=True)[0], rtol=1e-6)
    shapes = {name: leaf.shape for name, leaf in factors(params).items()}
    attention = "MultiHeadDotProductAttention_0/{}/lora/kernel/{}"
    assert shapes["Conv_0/lora/kernel/a"] == (3, 3, 2, 2) and shapes["Conv_0/lora/kernel/b"] == (2, 8)
    assert shapes[attention.format("query", "a")] == (8, 2) and shapes[attention.format("query", "b")] == (2, 2, 4)
    assert shapes[attention.format("out", "a")] == (2, 4, 2) and shapes[attention.format("out", "b")] == (2, 8)
    assert len(shapes) == 2 * 6
    # a task of its own factors makes nothing of the size of a kernel
    program = jax.make_jaxpr(lambda params: model.apply(jax.random.key(2), params, state, images, train=True))(params)
    kernels = {leaf.shape for leaf in jax.tree.leaves(own) if leaf.ndim > 1}
    made = [out.aval.shape for step in program.eqns if step.primitive.name == "add" for out in step.outvars]
    assert made and not kernels & set(made)

    drawn = jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    by_hand = {
        "Conv_0": {
            "bias": drawn["Conv_0"]["bias"],
            "kernel": drawn["Conv_0"]["kernel"] + 3.0 * changed(drawn["Conv_0"], "hwir,ro->hwio"),
        },
        "MultiHeadDotProductAttention_0": {
            name: {
                "bias": part["bias"],
                "kernel": part["kernel"] + 3.0 * changed(part, "hfr,ro->hfo" if name == "out" else "ir,rhf->ihf"),
            }
            for name, part in drawn["MultiHeadDotProductAttention_0"].items()
        },
        "head": {
            "bias": drawn["head"]["bias"],
            "kernel": drawn["head"]["kernel"] + 3.0 * changed(drawn["head"], "ir,ro->io"),
        },
    }
    np.testing.assert_allclose(
        model.apply(jax.random.key(2), drawn, state, images, train=False)[0],
        plain.apply(jax.random.key(2), by_hand, {}, images, train=False)[0],
        rtol=2e-4,
        atol=2e-5,
    )


def changed(layer, form):
    a, b = layer["lora"]["kernel"]["a"], layer["lora"]["kernel"]["b"]
    return jnp.einsum(form, a, b)


def test_networks_of_nnx_have_factors_too():
    model = jmeta.lora(jmeta.nnx(lambda rngs: nnx.Sequential(nnx.Linear(3, 4, rngs=rngs))), 1)
    params, state = model.init(jax.random.key(0), jnp.ones((2, 3)))
    assert sorted(leaf.shape for leaf in factors(params).values()) == [(1, 4), (3, 1)]
    assert model.apply(jax.random.key(1), params, state, jnp.ones((2, 3)), train=True)[0].shape == (2, 4)


def test_the_inner_loop_adapts_the_factors_alone_and_the_meta_gradient_is_that_of_finite_differences(float64):
    model = jmeta.lora(jmeta.linen(jmeta.MLP(outputs=1, hidden=(4,))), 1)
    settings = {"inner_rate": 0.5, "inner_steps": 2, "loss": jmeta.mean_squared_error}
    learner = jmeta.maml(model, adaptable=IS_LORA, **settings)
    random = np.random.default_rng(0)
    x, y = (jnp.asarray(random.normal(size=(2, 5, n))) for n in (3, 1))  # two tasks
    tasks = jmeta.Task(jmeta.Examples(x, y), jmeta.Examples(x + 0.5, y - x[..., :1]))
    params, state = learner.init(jax.random.key(0), jax.tree.map(lambda x: x[0].astype(np.float32), tasks))
    params = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape)) / 2, params)

    adapted = learner.adapt(jax.random.key(1), params, state, jmeta.Examples(x[0], y[0]))
    moved = jax.tree.map_with_path(
        lambda path, a, b: (IS_LORA(path_name(path)), bool((a != b).any())), params, adapted.params
    )
    assert all(chosen is changed for chosen, changed in jax.tree.leaves(moved, is_leaf=lambda x: isinstance(x, tuple)))

    loss = jax.jit(lambda p: learner.objective(jax.random.key(1), p, state, tasks)[0])
    gradient = jax.jit(jax.grad(loss))(params)
    for i, leaf in enumerate(jax.tree.leaves(params)):
        way = jnp.asarray(random.normal(size=leaf.shape))

        def at(step, i=i, way=way):
            leaves, tree = jax.tree.flatten(params)
            return loss(jax.tree.unflatten(tree, [*leaves[:i], leaves[i] + step * way, *leaves[i + 1 :]]))

        slope = (at(1e-5) - at(-1e-5)) / 2e-5
        np.testing.assert_allclose((jax.tree.leaves(gradient)[i] * way).sum(), slope, rtol=1e-6, atol=1e-9)


def test_what_is_adapted_is_a_twentieth_of_a_small_transformer():
    model = jmeta.lora(jmeta.linen(jmeta.ViT(outputs=5, patch=8, image=32, width=128, depth=3, heads=4)), 4)
    params, _ = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))
    adapted, every = (sum(leaf.size for leaf in tree) for tree in (factors(params).values(), jax.tree.leaves(params)))
    assert 0.01 < adapted / every <= 0.05


def test_a_rank_above_that_of_a_kernel_and_other_mistakes_are_refused():
    inputs, dense = jnp.ones((2, 8)), jmeta.linen(nn.Dense(3))
    with pytest.raises(ModelError, match=r"the rank 4 is above that of kernel, a matrix of 8 x 3; give at most 3, or"):
        jmeta.lora(dense, 4).init(jax.random.key(0), inputs)
    with pytest.raises(ConfigError, match="rank is 0; give at least 1"):
        jmeta.lora(dense, 0)
    with pytest.raises(ModelError, match="no leaf of the network is a kernel; let `kernels` choose"):
        jmeta.lora(jmeta.identity()).init(jax.random.key(0), inputs)
    with pytest.raises(ModelError, match=r"the leaf bias has shape \[3\], which is no matrix"):
        jmeta.lora(dense, 1, kernels=lambda path: True).init(jax.random.key(0), inputs)
    with pytest.raises(ModelError, match="the network has a part called 'lora' at its root"):
        jmeta.lora(jmeta.lora(dense, 1), 1).init(jax.random.key(0), inputs)
