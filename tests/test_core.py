"""Losses, trees, registries, docstrings and the public names."""

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta
from jmeta.core import check_model
from jmeta.errors import lookup
from jmeta.inner import check_inner
from jmeta.tree import combine, partition


def test_partition_and_combine_are_inverse():
    tree = {"body": {"kernel": 1.0, "bias": 2.0}, "head": {"kernel": 3.0}}
    selected, rest = partition(lambda path: path.startswith("head"), tree)
    assert jax.tree.leaves(selected) == [3.0]
    assert combine(selected, rest) == tree


def test_losses_by_hand():
    logits, targets = np.asarray([[2.0, 0.0], [1.0, 1.0]]), np.eye(2)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    arrays = [jnp.asarray(x, jnp.float32) for x in (logits, targets)]
    np.testing.assert_allclose(jmeta.softmax_cross_entropy(*arrays), -np.log([p[0, 0], p[1, 1]]).mean(), rtol=1e-6)
    np.testing.assert_allclose(jmeta.mean_squared_error(*arrays), ((logits - targets) ** 2).mean(), rtol=1e-6)
    assert float(jmeta.accuracy(*arrays)) == 0.5


@pytest.mark.parametrize("loss", [jmeta.softmax_cross_entropy, jmeta.mean_squared_error, jmeta.accuracy])
def test_outputs_of_another_shape_are_told(loss):
    with pytest.raises(jmeta.ModelError, match=r"outputs have shape \[4, 3\] where the targets have \[4, 5\]"):
        loss(jnp.zeros((4, 3)), jnp.zeros((4, 5)))


def test_lookup_gives_the_nearest_name():
    with pytest.raises(jmeta.UnknownNameError, match="no learner 'mamal'; did you mean 'maml'"):
        lookup({"maml": 1, "anil": 2}, "mamal", "learner")


def test_anil_leaves_the_body_as_it_is_bit_for_bit():
    learner = jmeta.anil(jmeta.linen(jmeta.MLP(outputs=3)))
    random = np.random.default_rng(0)
    support = jmeta.Examples(jnp.asarray(random.normal(size=(3, 4)), jnp.float32), jnp.eye(3))
    params, state = jax.jit(learner.init)(jax.random.key(0), jmeta.Task(support, support))
    φ = jax.jit(learner.adapt)(jax.random.key(1), params, state, support).params
    for name in params:
        changed = any(
            not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (params[name], φ[name])), strict=True)
        )
        assert changed == (name == "head")


def test_prototypes_are_class_means():
    flat = jmeta.Model(
        init=lambda key, inputs: ({}, {}), apply=lambda key, params, state, inputs, *, train: (inputs, state)
    )
    learner = jmeta.prototypical(flat)
    x = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    support = jmeta.Examples(jnp.asarray(x), jnp.repeat(jnp.eye(3), 2, axis=0))
    adapted = jax.jit(learner.adapt)(jax.random.key(0), {}, {}, support)
    means = x.reshape(3, 2, 4).mean(axis=1)
    np.testing.assert_allclose(adapted.params[1], means, rtol=1e-5)
    outputs = jax.jit(learner.predict)(jax.random.key(0), adapted, jnp.asarray(x))
    np.testing.assert_allclose(outputs, -((x[:, None] - means[None]) ** 2).sum(-1), rtol=1e-3, atol=1e-4)


def test_wrong_inner_settings_are_told():
    model = jmeta.linen(jmeta.MLP(outputs=3))
    with pytest.raises(jmeta.ConfigError, match="inner_rate is 0"):
        jmeta.maml(model, inner_rate=0.0)
    with pytest.raises(jmeta.ConfigError, match="inner_steps is -1"):
        jmeta.fomaml(model, inner_steps=-1)


def test_an_inner_optimiser_that_has_its_rate_is_told():
    with pytest.raises(jmeta.ConfigError, match="inner_optimizer is an optimiser that has its rate; give a function"):
        check_inner(0.1, 1, optax.sgd(0.1))


MODULES = [m.name for m in pkgutil.walk_packages(jmeta.__path__, "jmeta.")]


OPTIONAL = {"jmeta.data.stream": "grain"}  # what examples need that is in an extra
LONG = """
    bilevel calibration data.assays data.embeddings data.glyphs data.stream data.varying embedding estimators.regressor
    learners.bd_cspn learners.label_propagation learners.meta_baseline learners.reptile learners.simpleshot
    learners.transfer models.adapters models.efficientnet models.networks models.norms models.resnet models.sentences
    models.vit open_set rl.maml_rl rl.mdp rl.policies rl.policy_gradients rl.rl2 rl.rollout runs.run search.architecture
    search.cells sweep
"""  # which compile for long


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.removeprefix("jmeta.") in LONG.split() else ())
        for name in MODULES
    ],
)
def test_the_examples_in_docstrings_run(name):
    if name in OPTIONAL:
        pytest.importorskip(OPTIONAL[name])
    # The hook that checks shapes hides what functools wraps from doctest: names are taken from the module itself.
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner()
    for _, value in inspect.getmembers(module, lambda x: getattr(x, "__module__", None) == name):
        for test in doctest.DocTestFinder(recurse=False).find(value, globs={"__name__": name}):
            runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_public_names_are_documented():
    missing = []
    for name in MODULES:
        module = importlib.import_module(name)
        for member, value in inspect.getmembers(module, lambda x: inspect.isfunction(x) or inspect.isclass(x)):
            if value.__module__ == name and not member.startswith("_") and not inspect.getdoc(value):
                missing.append(f"{name}.{member}")
    assert missing == []


def test_importing_jmeta_loads_no_data_library():
    code = "import sys, jmeta; print({'tensorflow', 'tensorflow_datasets', 'equinox', 'haiku'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "set()"
    )


def test_accuracy_of_answers_that_are_not_finite_is_not_a_number():
    assert np.isnan(jmeta.accuracy(jnp.full((2, 2), jnp.nan), jnp.eye(2)))


def test_images_without_a_channel_axis_are_told():
    with pytest.raises(jmeta.ModelError, match="a channel axis"):
        jmeta.softmax_cross_entropy(jnp.zeros(5), jnp.eye(5))


def test_a_module_that_is_not_wrapped_is_told():
    with pytest.raises(jmeta.ModelError, match=r"the model is a MLP; wrap it: jmeta\.linen"):
        check_model(jmeta.MLP(outputs=3))  # learners call it; here the checked shapes would speak first


def test_the_head_of_anil_is_a_part_of_a_path():
    model = jmeta.linen(jmeta.MLP(outputs=3))
    task = jmeta.Task(*[jmeta.Examples(jnp.ones((3, 4)), jnp.eye(3))] * 2)
    for head, leaves in (("Dense_1", 2), ("head/kernel", 1)):
        learner = jmeta.anil(model, head=head)
        params, state = jax.jit(learner.init)(jax.random.key(0), task)
        φ = jax.jit(learner.adapt)(jax.random.key(0), params, state, task.support).params
        assert sum(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (params, φ)), strict=True)) <= leaves
    with pytest.raises(jmeta.ConfigError, match="ANIL's `head`"):
        jmeta.anil(model, head="last").adapt(jax.random.key(0), params, state, task.support)


def test_a_source_is_shown_by_its_protocol():
    assert repr(jmeta.from_arrays(np.zeros((6, 2)), np.repeat([0, 1], 3), ways=2, shots=1, queries=1)) == (
        "TaskSource(ways=2, shots=1, queries=1)"
    )
