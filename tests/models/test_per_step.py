"""Sets of weights and statistics for each inner step."""

import jax
import jax.numpy as jnp
import numpy as np

import jmeta
from jmeta.models.per_step import per_step

KEY = jax.random.key(0)


def apply(key, params, state, inputs, *, train):
    return inputs * params["norm"] + params["shift"], {"seen": state["seen"] + inputs.sum() if train else state["seen"]}


def test_each_step_takes_and_writes_its_own_set_and_an_answer_is_that_of_the_step_before():
    start = {"norm": jnp.zeros(()), "shift": jnp.zeros(())}, {"seen": jnp.zeros(())}
    network = per_step(jmeta.Model(lambda key, inputs: start, apply), 2, weights=lambda path: path == "norm")
    params, state = network.init(KEY, jnp.ones(1))
    assert jax.tree.map(jnp.shape, params) == {"norm": (2,), "shift": ()}
    params = {"norm": jnp.asarray([1.0, 10.0]), "shift": jnp.asarray(0.5)}
    state = {**state, "other": jnp.asarray(7)}
    for norm, before, seen in ((1.0, 1.0, [1, 0]), (10.0, 1.0, [1, 2]), (10.0, 10.0, [1, 5])):
        answer, after = network.apply(KEY, params, state, jnp.ones(1), train=False)
        np.testing.assert_allclose(answer, [before + 0.5])
        assert int(after["step"]) == int(state["step"])
        inputs = jnp.full(1, 1.0 + int(state["step"]))
        outputs, state = network.apply(KEY, params, state, inputs, train=True)
        np.testing.assert_allclose(outputs, inputs * norm + 0.5)
        np.testing.assert_array_equal(state["model"]["seen"], seen)
    assert (int(state["step"]), int(state["other"])) == (3, 7)
