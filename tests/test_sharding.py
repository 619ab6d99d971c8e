"""Tasks over several devices: the meta-gradient is that of one device."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jmeta

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
