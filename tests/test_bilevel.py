"""Hypergradients against closed forms, finite differences and loops of a few lines; persistence; what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta

KEY = jax.random.key(0)
random = np.random.default_rng(0)
X, VX = random.normal(size=(2, 30, 4))
Y, VY = random.normal(size=(2, 30))
ADJOINTS = {
    "exact": jmeta.exact(),
    "checkpoint": jmeta.exact(checkpoint=True),
    "mixed_mode": jmeta.mixed_mode(),
    "truncated": jmeta.truncated(last=300),
    "conjugate_gradient": jmeta.implicit(jmeta.conjugate_gradient(10)),
    "neumann": jmeta.implicit(jmeta.neumann(300, rate=0.3)),
}


def error(φ, data):
    return 0.5 * jnp.square(data[0] @ φ - data[1]).mean()


def ridge(adjoint=ADJOINTS["exact"], inner_steps=300, **options):
    """θ: the logarithm of the weight of a penalty."""
    return jmeta.bilevel(
        outer=lambda key, task: jnp.zeros(()),
        inner=lambda key, θ, support: jnp.zeros(4),
        inner_loss=lambda key, φ, θ, support: error(φ, support) + 0.5 * jnp.exp(θ) * jnp.square(φ).sum(),
        outer_loss=lambda key, φ, θ, query: error(φ, query),
        inner_optimizer=options.pop("inner_optimizer", optax.sgd(0.3)),
        inner_steps=inner_steps,
        adjoint=adjoint,
        **options,
    )


def data(dtype=None):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), jmeta.Task((X, Y), (VX, VY)))


def source(dtype=jnp.float32):
    return jmeta.TaskSource(data(dtype), lambda key, data: data, {})


def batch():
    return jax.tree.map(lambda x: x[None], data())


def hypergradient(learner, θ, state=()):
    return jax.jit(jax.grad(lambda θ: learner.objective(KEY, θ, state, batch())[0]))(θ)


def ridge_minimum(θ):
    return np.linalg.solve(X.T @ X / 30 + np.exp(θ) * np.eye(4), X.T @ Y / 30)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_the_hypergradient_of_ridge_regression_is_the_closed_form(float64, adjoint):
    θ = -1.0
    φ = ridge_minimum(θ)
    slope = VX.T @ (VX @ φ - VY) / 30
    expected = -slope @ np.linalg.solve(X.T @ X / 30 + np.exp(θ) * np.eye(4), np.exp(θ) * φ)
    learner = ridge(ADJOINTS[adjoint])
    np.testing.assert_allclose(hypergradient(learner, jnp.asarray(θ)), expected, rtol=1e-8)
    np.testing.assert_allclose(learner.adapt(KEY, jnp.asarray(θ), (), data().support).params[0], φ, rtol=1e-8)


@pytest.mark.parametrize("inner_optimizer", [optax.sgd(0.1, momentum=0.9), optax.adam(0.1, eps_root=1e-8)])
def test_the_hypergradient_of_a_short_loop_is_the_finite_difference(float64, inner_optimizer):
    learner = ridge(inner_steps=7, inner_optimizer=inner_optimizer)

    def value(θ):
        return learner.objective(KEY, jnp.asarray(θ), (), batch())[0]

    expected = (value(-1 + 1e-5) - value(-1 - 1e-5)) / 2e-5
    np.testing.assert_allclose(hypergradient(learner, jnp.asarray(-1.0)), expected, rtol=1e-6)


def rated():
    """θ: the logarithm of the inner learning rate."""
    return optax.GradientTransformationExtraArgs(
        optax.identity().init,
        lambda gradient, state, params=None, *, hyper, **_: (-jnp.exp(hyper) * gradient, state),
    )


def test_the_hypergradient_in_the_learning_rate_is_the_closed_form_of_one_step(float64):
    learner = jmeta.bilevel(
        outer=lambda key, task: jnp.zeros(()),
        inner=lambda key, θ, support: jnp.ones(4),
        inner_loss=lambda key, φ, θ, support: error(φ, support),
        outer_loss=lambda key, φ, θ, query: error(φ, query),
        inner_optimizer=rated(),
    )
    α, start = 0.2, np.ones(4)
    g = X.T @ (X @ start - Y) / 30
    expected = -α * g @ VX.T @ (VX @ (start - α * g) - VY) / 30
    np.testing.assert_allclose(hypergradient(learner, jnp.log(jnp.asarray(α))), expected, rtol=1e-10)


def test_maml_is_the_problem_whose_outer_variables_are_where_the_inner_ones_start(float64):
    learner = jmeta.bilevel(
        outer=lambda key, task: jnp.zeros(4),
        inner=lambda key, θ, support: θ,
        inner_loss=lambda key, φ, θ, support: error(φ, support),
        outer_loss=lambda key, φ, θ, query: error(φ, query),
        inner_optimizer=optax.sgd(0.2),
        inner_steps=2,
    )
    θ = jnp.arange(4.0)
    contraction = np.eye(4) - 0.2 * X.T @ X / 30
    φ = np.asarray(θ)
    for _ in range(2):
        φ = φ - 0.2 * X.T @ (X @ φ - Y) / 30
    expected = contraction @ contraction @ VX.T @ (VX @ φ - VY) / 30
    np.testing.assert_allclose(hypergradient(learner, θ), expected, rtol=1e-10)


def test_persistent_inner_variables_are_those_of_a_loop_of_a_few_lines(float64):
    learner = ridge(persistent=True, inner_steps=2, inner_optimizer=optax.sgd(0.1, momentum=0.5))
    fitted = jmeta.fit(KEY, learner, source(jnp.float64), steps=4, tasks=1, optimizer=optax.sgd(0.3))
    θ, φ, velocity = 0.0, np.zeros(4), np.zeros(4)
    for _ in range(4):

        def inner(θ, φ, velocity):
            for _ in range(2):
                velocity = 0.5 * velocity + X.T @ (X @ φ - Y) / 30 + np.exp(θ) * φ
                φ = φ - 0.1 * velocity
            return φ, velocity

        def outer(θ, φ=φ, velocity=velocity, inner=inner):
            return 0.5 * np.square(VX @ inner(θ, φ, velocity)[0] - VY).mean()

        slope = (outer(θ + 1e-6) - outer(θ - 1e-6)) / 2e-6
        φ, velocity = inner(θ, φ, velocity)
        θ -= 0.3 * slope
    np.testing.assert_allclose(fitted.params, θ, rtol=1e-7)
    np.testing.assert_allclose(fitted.state[0], φ, rtol=1e-7)
    np.testing.assert_allclose(fitted.state[1][0].trace, velocity, rtol=1e-7)


def test_persistent_inner_variables_outlive_scans_and_checkpoints(tmp_path):
    learner = ridge(persistent=True, inner_steps=2, inner_optimizer=optax.adam(0.1, eps_root=1e-8))
    options = {"tasks": 1, "optimizer": optax.adam(0.1)}
    whole = jmeta.fit(KEY, learner, source(), steps=6, log_every=6, **options)
    half = jmeta.fit(KEY, learner, source(), steps=3, log_every=1, **options)
    jmeta.save(tmp_path / "half", half.train_state)
    like = jmeta.init(KEY, learner, options["optimizer"], source())
    restored = jmeta.restore(tmp_path / "half", like)
    rest = jmeta.fit(KEY, learner, source(), steps=6, log_every=2, train_state=restored, **options)
    assert np.abs(whole.state[0]).max() > 1e-3
    # scans of other lengths are other programs, whose last bits XLA may round in another way
    same = partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(same, (whole.params, whole.state), (rest.params, rest.state))


def test_inner_variables_start_anew_otherwise():
    learner = ridge(inner_steps=1)
    fitted = jmeta.fit(KEY, learner, source(), steps=3, tasks=1)
    assert fitted.state == ()


def test_a_projection_keeps_the_outer_variables_in_their_set():
    learner = jmeta.bilevel(
        outer=lambda key, task: jnp.full(4, 0.5),
        inner=lambda key, θ, support: jnp.zeros(4),
        inner_loss=lambda key, φ, θ, support: error(φ, support),
        outer_loss=lambda key, φ, θ, query: jnp.square(φ).sum() + (θ * jnp.arange(-1.0, 3.0)).sum(),
    )
    optimizer = jmeta.projected(optax.sgd(0.2), optax.projections.projection_simplex)
    θ = jmeta.fit(KEY, learner, source(), steps=20, tasks=1, optimizer=optimizer).params
    np.testing.assert_allclose(θ, [1, 0, 0, 0], atol=1e-6)


def test_evaluate_measures_the_inner_variables():
    problem = ridge(predict=lambda key, φ, θ, inputs: (inputs @ φ)[:, None])
    examples = jmeta.Task((jnp.float32(X), jnp.float32(Y)), jmeta.Examples(jnp.float32(VX), jnp.float32(VY)[:, None]))
    result = jmeta.evaluate(
        KEY,
        problem,
        jnp.asarray(-1.0),
        (),
        jmeta.TaskSource(examples, lambda key, data: data, {}),
        episodes=2,
        metric=jmeta.mean_squared_error,
    )
    assert result["mean_squared_error"] == pytest.approx(np.square(VX @ ridge_minimum(-1.0) - VY).mean(), rel=1e-4)
    with pytest.raises(jmeta.ModelError, match="this bilevel problem has no `predict`"):
        ridge().predict(KEY, ridge().adapt(KEY, jnp.zeros(()), (), data(jnp.float32).support), X)


def test_an_inner_loop_that_does_not_converge_warns():
    learner = ridge(jmeta.implicit(), inner_steps=1, inner_optimizer=optax.sgd(1e-3))
    with pytest.warns(jmeta.ConvergenceWarning, match="did not converge"):
        fitted = jmeta.fit(KEY, learner, source(), steps=1, tasks=1, log_every=1)
    assert fitted.history[0]["residual"] > 0.9


def independent(adjoint, outer_loss):
    return jmeta.bilevel(
        outer=lambda key, task: jnp.zeros(()),
        inner=lambda key, θ, support: jnp.zeros(4),
        inner_loss=lambda key, φ, θ, support: error(φ, support) + jnp.exp(θ) * jnp.square(φ).sum(),
        outer_loss=outer_loss,
        adjoint=adjoint,
    )


@pytest.mark.parametrize(
    ("adjoint", "outer_loss"),
    [
        (jmeta.first_order(), lambda key, φ, θ, query: error(φ, query)),  # the way from θ to φ is cut
        (jmeta.exact(), lambda key, φ, θ, query: jnp.square(query[1]).mean()),
        (jmeta.exact(), lambda key, φ, θ, query: error(jax.lax.stop_gradient(φ), query)),
    ],
)
def test_an_outer_loss_that_does_not_depend_on_the_outer_variables(adjoint, outer_loss):
    with pytest.raises(jmeta.ModelError, match="does not depend on what the outer loop trains"):
        jmeta.init(KEY, independent(adjoint, outer_loss), optax.sgd(0.1), source())


def test_an_outer_loss_that_sees_the_outer_variables_alone_is_none_of_them():
    jmeta.init(KEY, independent(jmeta.first_order(), lambda key, φ, θ, query: θ**2), optax.sgd(0.1), source())


def test_what_is_refused():
    with pytest.raises(jmeta.ConfigError, match="inner_steps is 0"):
        ridge(inner_steps=0)
    vector = independent(jmeta.exact(), lambda key, φ, θ, query: φ + θ)
    with pytest.raises(jmeta.ModelError, match=r"the outer loss has shape \[4\]; it must be a scalar"):
        jmeta.init(KEY, vector, optax.sgd(0.1), source())
