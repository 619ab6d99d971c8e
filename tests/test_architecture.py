"""Cells, the search for them, and what the command line makes of it."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.flatten_util import ravel_pytree

import jmeta
from jmeta.cli import main
from jmeta.cli.search import Search, _conv4
from jmeta.search import CellNetwork
from jmeta.search.cells import OPERATIONS, SeparableConv, Settings, edge_count
from jmeta.tree import combine, partition, under

KEY = jax.random.key(0)
FEW = nn.FrozenDict({name: OPERATIONS[name] for name in ("zero", "skip", "max_pool_3x3", "separable_3x3")})
NETWORK = {"features": 2, "nodes": 1, "cells": ("normal",), "operations": FEW}


@pytest.mark.parametrize(("strides", "dilation"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("kernel", [3, 5])
def test_a_separable_convolution_is_a_grouped_and_a_pointwise_one(float64, kernel, strides, dilation):
    x = jax.random.normal(KEY, (2, 9, 8, 3))
    layer = SeparableConv(5, kernel, strides, dilation)
    params = jax.tree.map(jnp.float64, layer.init(KEY, jnp.float32(x)))
    reach = dilation * (kernel - 1) // 2
    depthwise = jax.lax.conv_general_dilated(
        x,
        params["params"]["depthwise"].reshape(kernel, kernel, 1, 3),
        (strides, strides),
        [(reach, reach)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
    )
    expected = depthwise @ params["params"]["pointwise"]
    np.testing.assert_allclose(layer.apply(params, x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_channels_and_halve_the_size_with_strides(name, strides):
    images = jax.random.normal(KEY, (2, 7, 6, 4))
    y, _ = OPERATIONS[name](Settings(4, strides, "transductive")).init_with_output(KEY, images, True)
    assert y.shape == ((2, 7, 6, 4) if strides == 1 else (2, 4, 3, 4))
    assert (np.abs(y).max() > 0) == (name != "zero")


def test_pooling_is_that_of_flax_but_for_the_batch_norm():
    images = jax.random.normal(KEY, (2, 7, 6, 4))
    padding = ((1, 1), (1, 1))
    pools = {
        "max_pool_3x3": nn.max_pool(images, (3, 3), padding=padding),
        "average_pool_3x3": nn.avg_pool(images, (3, 3), padding=padding, count_include_pad=False),
    }
    for name, pooled in pools.items():
        y, _ = OPERATIONS[name](Settings(4, 1, "transductive")).init_with_output(KEY, images, True)
        μ, σ2 = pooled.mean((0, 1, 2), keepdims=True), pooled.var((0, 1, 2), keepdims=True)
        np.testing.assert_allclose(y, (pooled - μ) / jnp.sqrt(σ2 + 1e-3), atol=1e-5)


def test_a_mixture_of_one_certain_operation_is_that_operation():
    """The search network and the one of the genotype agree where softmax is one-hot."""
    images = jax.random.normal(KEY, (3, 12, 12, 1))
    operations = {name: OPERATIONS[name] for name in ("zero", "skip", "average_pool_3x3")}
    settings = {"features": 2, "nodes": 1, "cells": ("normal",), "operations": nn.FrozenDict(operations)}
    mixed = CellNetwork(**settings)
    params, _ = jmeta.linen(mixed).init(KEY, images)
    logits = jnp.full((2, 3), -1e3).at[0, 1].set(0.0).at[1, 2].set(0.0)
    params = {**params, "architecture": {"normal": logits, "reduction": logits}}
    found = jmeta.genotype(params, operations=operations)
    assert found.normal == (("skip", 0), ("average_pool_3x3", 1))
    chosen = jmeta.linen(CellNetwork(**settings, genotype=found))
    theirs, _ = chosen.init(KEY, images)
    assert ravel_pytree(theirs)[0].size < ravel_pytree(params)[0].size
    outputs = [
        model.apply(KEY, p, {}, images, train=True)[0] for model, p in ((jmeta.linen(mixed), params), (chosen, theirs))
    ]
    stem = {"Conv_0", "BatchNorm_0"}
    for name in stem:
        theirs[name] = params[name]
    cell, own = params["_Cell_0"], theirs["_Cell_0"]
    for name in own:
        if name.startswith("_Pointwise"):
            own[name] = cell[name]
    outputs[1] = chosen.apply(KEY, theirs, {}, images, train=True)[0]
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


def test_the_genotype_keeps_the_two_best_edges_of_each_node():
    names = list(OPERATIONS)
    logits = np.zeros((edge_count(2), len(names)), np.float32)
    logits[:, 0] = 5.0  # zero, which does not count
    for edge, name, value in [(0, "skip", 9.0), (1, "max_pool_3x3", 9.0), (2, "skip", 7.0), (3, "dilated_5x5", 8.0)]:
        logits[edge, names.index(name)] = value
    logits[4, names.index("separable_3x3")] = 9.0
    params = {"normal": jnp.asarray(logits), "reduction": jnp.zeros_like(logits)}
    found = jmeta.genotype(params)
    assert found.normal == (("skip", 0), ("max_pool_3x3", 1), ("dilated_5x5", 1), ("separable_3x3", 2))
    fewer = jmeta.genotype(params, skips=0)
    assert fewer.normal[0][0] != "skip" and fewer.normal[1:] == found.normal[1:]
    with pytest.raises(jmeta.ConfigError, match="skips is -1"):
        jmeta.genotype(params, skips=-1)


def test_random_cells_have_two_different_inputs_a_node():
    drawn = [jmeta.random_genotype(seed, nodes=3) for seed in range(20)]
    assert len(set(drawn)) == 20
    assert drawn[0] == jmeta.random_genotype(0, nodes=3)
    for cell in (cell for cells in drawn for cell in cells):
        for node in range(3):
            (a, i), (b, j) = cell[2 * node : 2 * node + 2]
            assert i < j < node + 2
            assert "zero" not in (a, b)


def source(split="train"):
    return jmeta.glyphs(split=split, ways=3, shots=1, queries=2)


def tasks():
    return jmeta.search_tasks(source(), source("validation"))


def search(adjoint, ξ=0.05):
    learner = jmeta.prototypical(jmeta.linen(CellNetwork(**NETWORK)))
    return learner, jmeta.darts(learner, inner_optimizer=optax.sgd(ξ), adjoint=adjoint)


@pytest.mark.slow
@pytest.mark.parametrize(("adjoint", "second"), [(jmeta.exact(), True), (jmeta.first_order(), False)])
def test_a_search_step_is_that_of_a_reference_loop(float64, adjoint, second):
    """Liu et al. 2019, equation 6: ∇θ F(φ', θ) − ξ ∇²θφ L(φ, θ) ∇φ' F(φ', θ), by separate derivatives."""
    ξ = 0.05
    learner, problem = search(adjoint, ξ)
    one = tasks()
    with jax.enable_x64(False):
        task = one.sample(KEY, one.data)
        params = jax.jit(learner.init)(KEY, jax.tree.map(lambda x: x[0], task.support))[0]
    task, params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (task, params))
    θ, φ = partition(under("architecture"), params)

    def loss(φ, θ, data):
        return learner.objective(KEY, combine(φ, θ), {}, data)[0]

    @jax.jit
    def by_hand(φ, θ):
        gradient = jax.grad(loss)(φ, θ, task.support)
        after = jax.tree.map(lambda p, g: p - ξ * g, φ, gradient)
        direct, v = jax.grad(lambda θ: loss(after, θ, task.query))(θ), jax.grad(loss)(after, θ, task.query)

        def along(θ):
            return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.grad(loss)(φ, θ, task.support), v)))

        return jax.tree.map(lambda d, m: d - ξ * m, direct, jax.grad(along)(θ)) if second else direct, after

    @jax.jit
    def searched(φ, θ):
        def objective(θ):
            batch = jax.tree.map(lambda x: x[None], task)
            value, (state, _) = problem.objective(KEY, θ, (φ, optax.sgd(ξ).init(φ)), batch)
            return value, state

        return jax.grad(objective, has_aux=True)(θ)

    with jax.numpy_dtype_promotion("standard"):  # Flax initialises in float32
        (expected, after), (found, state) = by_hand(φ, θ), searched(φ, θ)
    assert np.abs(ravel_pytree(found)[0]).max() > 1e-6
    np.testing.assert_allclose(ravel_pytree(found)[0], ravel_pytree(expected)[0], rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(ravel_pytree(state[0])[0], ravel_pytree(after)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_search_changes_architecture_and_weights():
    _, problem = search(jmeta.exact())
    fitted = jmeta.fit(KEY, problem, tasks(), steps=2, tasks=1, log_every=1, optimizer=optax.adam(0.1))
    start = jmeta.init(KEY, problem, optax.adam(0.1), tasks())
    for before, after in ((start.params, fitted.params), (start.state[0], fitted.state[0])):
        assert np.abs(ravel_pytree(before)[0] - ravel_pytree(after)[0]).max() > 1e-4
    assert len(jmeta.genotype(fitted.params, operations=FEW).normal) == 2


class Wide(nn.Module):
    """An operation that does not keep the channels."""

    @nn.compact
    def __call__(self, x, train):
        return jnp.concatenate([x, x], axis=-1)


def test_what_is_refused():
    operations = nn.FrozenDict({"skip": OPERATIONS["skip"], "wide": lambda settings: Wide()})
    images = jnp.ones((1, 8, 8, 1))
    with pytest.raises(jmeta.ModelError, match=r"different shapes: skip \[1, 4, 4, 2\], wide \[1, 4, 4, 4\]"):
        CellNetwork(**{**NETWORK, "operations": operations}).init(KEY, images)
    with pytest.raises(jmeta.ConfigError, match="tasks is 0"):
        jmeta.search_tasks(source(), source(), tasks=0)
    moving = jmeta.darts(jmeta.prototypical(jmeta.linen(CellNetwork(**NETWORK, norm="running"))))
    with pytest.raises(jmeta.ModelError, match="the learner has a state"):
        jmeta.init(KEY, moving, optax.sgd(0.1), tasks())
    plain = jmeta.darts(jmeta.prototypical(jmeta.linen(jmeta.Conv4(outputs=None, features=2, groups=1))))
    with pytest.raises(jmeta.ConfigError, match="no leaf of the parameters is adaptable"):
        jmeta.init(KEY, plain, optax.sgd(0.1), tasks())


def test_the_rival_of_a_cell_is_a_conv4_of_its_norm_and_size():
    found = CellNetwork(**NETWORK)
    rival = _conv4(Search(ways=3), found)
    assert rival.norm == found.norm
    assert rival.features == 4  # the smallest, as the cell is


SMALL = ["--steps", "2", "--retrain-steps", "2", "--cells", "2", "--nodes", "1", "--features", "2", "--ways", "3"]


@pytest.mark.slow  # five networks and two searches to compile
def test_the_command(tmp_path, capsys):
    out = tmp_path / "search"
    main(["search", *SMALL, "--out", str(out)])
    result = json.loads((out / "result.json").read_text())
    assert set(result["networks"]) == {"second order", "first order", "random 0", "random 1", "conv4"}
    assert set(result["rank"]) == {"second order", "first order"}
    assert (out / "second_order.png").stat().st_size > 1000
    text = capsys.readouterr().out
    assert "Genotype(normal=" in text and "rank among the 2 random cells" in text
    with pytest.raises(SystemExit):
        main(["search", *SMALL, "--out", str(out)])
    assert "add --resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["search", "--out", str(out), "--resume"])
    assert "searched with other settings" in capsys.readouterr().err
    before = (out / "result.json").read_text()
    main(["search", *SMALL, "--out", str(out), "--resume"])
    assert (out / "result.json").read_text() == before


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_a_search_on_two_devices_is_that_of_one():
    _, problem = search(jmeta.first_order())
    mesh = jax.make_mesh((2,), ("tasks",), devices=jax.devices()[:2])
    options = {"steps": 2, "tasks": 2, "optimizer": optax.adam(3e-3)}
    one, two = (jmeta.fit(KEY, problem, tasks(), mesh=each, **options) for each in (None, mesh))
    near = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(near, (two.params, two.state, two.history), (one.params, one.state, one.history))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps is 0"),
        (["--data", "sinusoid"], "sinusoid has no images to search cells for"),
        (["--data", "bandit"], "bandit has no images to search cells for"),
        (["--data", "glyph"], "did you mean 'glyphs'"),
        (["--cells", "-1"], "--cells is -1"),
        (["--devices", "0"], "--devices is 0"),
        (["--devices", "2"], "do not divide 1 tasks; take 2 tasks a step"),
    ],
)
def test_bad_flags(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["search", *flags, "--out", str(tmp_path / "search")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
