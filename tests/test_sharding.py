"""Tasks, and parameters, over several devices: the meta-gradient is that of one device."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jmeta
from benchmarks.scale import divided_model, weak_scaling
from jmeta.devices import on_one_device, sharded
from jmeta.step import TrainState

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def problem():
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    mesh = jax.make_mesh((2,), ("tasks",), axis_types=(jax.sharding.AxisType.Auto,))
    source = jmeta.sinusoid(shots=5, queries=5)
    tasks = jax.vmap(source.sample, (0, None))(jax.random.split(KEY, 4), source.data)
    learner = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1)), inner_rate=0.1, loss=jmeta.mean_squared_error)
    params, state = learner.init(KEY, jax.tree.map(lambda x: x[0], tasks))

    def gradient(params, tasks):
        return jax.grad(lambda p: learner.objective(KEY, p, state, tasks)[0])(params)

    return mesh, gradient, params, tasks


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), a, b)


def test_jit_over_tasks_on_two_devices(problem):
    mesh, gradient, params, tasks = problem
    sharded = jax.device_put(tasks, NamedSharding(mesh, PartitionSpec("tasks")))
    assert_close(jax.jit(gradient)(params, tasks), jax.jit(gradient)(params, sharded))


def test_shard_map_needs_varying_params(problem):
    mesh, gradient, params, tasks = problem

    def on_each(params, tasks):
        # Else the inner gradient of the replicated θ is summed over the devices.
        params = jax.lax.pcast(params, "tasks", to="varying")
        return jax.tree.map(lambda g: jax.lax.pmean(g, "tasks"), gradient(params, tasks))

    mapped = jax.jit(
        jax.shard_map(on_each, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("tasks")), out_specs=PartitionSpec())
    )
    assert_close(jax.jit(gradient)(params, tasks), mapped(params, tasks))


class Transformer(nn.Module):
    """One block, in float64, each of whose matrices is large enough to be divided."""

    @nn.compact
    def __call__(self, tokens):
        kind = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        x = nn.Embed(64, 64, **kind)(tokens)
        x = x + nn.MultiHeadDotProductAttention(2, **kind)(nn.LayerNorm(force_float32_reductions=False, **kind)(x))
        x = x + nn.Dense(64, **kind)(
            nn.gelu(nn.Dense(128, **kind)(nn.LayerNorm(force_float32_reductions=False, **kind)(x)))
        )
        return nn.Dense(2, **kind)(x.mean(axis=1))


def sequences(key, data):
    """Which of two tokens there are more of."""

    def part(key):
        tokens = jax.random.randint(key, (3, 5), 0, 64, jnp.int32)
        return jmeta.Examples(tokens, jax.nn.one_hot((tokens > 31).sum(axis=1) // 3, 2, dtype=jnp.float64))

    return jmeta.Task(*map(part, jax.random.split(key)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("shape", [(1, 2), (2, 1), (2, 4)])
def test_a_transformer_divided_over_an_axis_of_the_mesh(float64, shape, kind):
    if jax.device_count() < (devices := math.prod(shape)):
        pytest.skip(f"needs {devices} devices")
    mesh = jax.make_mesh(shape, ("tasks", "model"), axis_types=(kind, kind), devices=jax.devices()[:devices])
    adjoint = jmeta.mixed_mode(checkpoint=True)
    learner = jmeta.maml(jmeta.linen(Transformer()), inner_rate=0.1, inner_steps=2, adjoint=adjoint)
    source = jmeta.TaskSource((), sequences, {})
    options = {"optimizer": optax.sgd(0.1, momentum=0.9), "steps": 2, "tasks": 4, "log_every": 1}
    alone = jmeta.fit(KEY, learner, source, **options)
    divided = jmeta.fit(KEY, learner, source, mesh=mesh, **options)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-12),
        (divided.params, divided.train_state.optimizer_state, divided.history),
        (alone.params, alone.train_state.optimizer_state, alone.history),
    )
    # θ and the momentum of a device are its part of all
    for tree in (divided.params, divided.train_state.optimizer_state):
        leaves = jax.tree.leaves(tree)
        own = sum(x.addressable_shards[0].data.nbytes for x in leaves)
        assert own < 1.1 * sum(x.nbytes for x in leaves) / shape[1]
    ask = {"episodes": 5, "metric": jmeta.softmax_cross_entropy}
    expected = jmeta.evaluate(KEY, learner, alone.params, alone.state, source, **ask)
    for where in (mesh, None):
        assert jmeta.evaluate(KEY, learner, divided.params, divided.state, source, mesh=where, **ask) == pytest.approx(
            expected, rel=1e-6
        )


def test_an_axis_of_the_mesh_divides_parameters():
    """A leaf that is long enough, along the longest axis that it divides; all of a short or an odd one everywhere."""
    mesh = jax.make_mesh((1, 2), ("tasks", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:2])
    source = jmeta.sinusoid(shots=2, queries=2)
    learner = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1, hidden=(64, 64, 65))), loss=jmeta.mean_squared_error)
    options = {"steps": 2, "tasks": 2, "log_every": 1}
    alone, divided = (jmeta.fit(KEY, learner, source, mesh=each, **options) for each in (None, mesh))
    assert_close(divided.params, alone.params)
    found = {x.shape: x.sharding.spec for x in jax.tree.leaves(divided.train_state.optimizer_state)}
    assert found[64, 64] == PartitionSpec("model")
    assert found[64, 65] == PartitionSpec("model")
    assert found[65, 1] == found[64,] == PartitionSpec()
    explicit = jax.make_mesh((1, 2), ("tasks", "model"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:2])
    with pytest.raises(jmeta.ConfigError, match="'model' of the mesh is Explicit; make it Auto"):
        jmeta.make_step(learner, optax.adam(1e-3), source, tasks=2, mesh=explicit)


def model_mesh(devices, tasks=1):
    kinds = (AxisType.Auto,) * 2
    return jax.make_mesh((tasks, devices), ("tasks", "model"), kinds, devices=jax.devices()[: tasks * devices])


def shapes_of_parts(tree):
    return [x.addressable_shards[0].data.shape for x in jax.tree.leaves(tree)]


def assert_equal(a, b):
    def equal(x, y):
        np.testing.assert_array_equal(*(jax.random.key_data(z) if z.dtype == b.key.dtype else z for z in (x, y)))

    jax.tree.map(equal, a, b)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
def test_a_divided_checkpoint_is_read_to_another_number_of_devices(tmp_path):
    """It is never whole on one device, but where that is asked for."""
    arrays = {"kernel": np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32), "bias": np.zeros(64, "f4")}

    def state_on(mesh, arrays):
        params = sharded(mesh, jax.tree.map(jnp.asarray, arrays))
        return TrainState(KEY, jnp.asarray(7), params, (), optax.sgd(0.1, momentum=0.9).init(params))

    saved = state_on(model_mesh(2), arrays)
    assert shapes_of_parts(on_one_device(saved.params)) == [(64,), (64, 64)]
    jmeta.save(tmp_path / "run", saved)
    empty = jax.tree.map(np.zeros_like, arrays)
    for like, part in ((model_mesh(4), (64, 32)), (model_mesh(2, tasks=2), (64, 64)), (None, (64, 128))):
        restored = jmeta.restore(tmp_path / "run", state_on(like, empty))
        assert_equal(restored, saved)
        params = jmeta.restore(tmp_path / "run", state_on(like, empty), only="params")
        jax.tree.map(np.testing.assert_array_equal, params, arrays)
        for tree in (restored.params, restored.optimizer_state, params):
            assert shapes_of_parts(tree) == [(64,), part]


eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


@eight
@pytest.mark.slow
def test_a_divided_run_goes_on_with_another_number_of_devices(tmp_path):
    learner = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1, hidden=(64, 64))), loss=jmeta.mean_squared_error)
    source = jmeta.sinusoid(shots=2, queries=2)
    options = {"tasks": 4, "log_every": 1}
    unbroken = jmeta.fit(KEY, learner, source, steps=6, **options)
    begun = jmeta.fit(KEY, learner, source, steps=3, mesh=model_mesh(4), **options)
    jmeta.save(tmp_path / "run", begun.train_state)
    for mesh in (model_mesh(8), model_mesh(4, tasks=2), model_mesh(2), None):
        like = jmeta.init(jax.random.key(1), learner, optax.adam(1e-3), source, mesh=mesh)
        restored = jmeta.restore(tmp_path / "run", like)
        assert_equal(restored, begun.train_state)
        rest = jmeta.fit(KEY, learner, source, steps=6, train_state=restored, mesh=mesh, **options)
        assert_close((rest.params, rest.history), (unbroken.params, unbroken.history[3:]))


@eight
@pytest.mark.slow
def test_a_device_does_the_same_when_devices_and_tasks_double():
    one, *others = weak_scaling().values()
    for many in others:
        assert many["all_reduces"] == 1
        for name in ("flops", "temporary"):
            assert many[name] == pytest.approx(one[name], rel=0.02)


@eight
@pytest.mark.slow
def test_a_device_holds_its_part_of_a_model():
    """Nearly 1 / devices: of what lies there between the steps, and of what a step needs."""
    one, *others = divided_model().items()
    for devices, many in others:
        assert many["held"] < 1.1 * one[1]["held"] / devices
        assert many["temporary"] < 1.4 * one[1]["temporary"] / devices
