"""Every gradient-based learner against the closed form of its paper, on linear regression in float64.

L(w) = mean (X w − y)², with ∇L = 2/n Xᵀ(X w − y) and H = 2/n XᵀX.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.flatten_util import ravel_pytree

import jmeta
from jmeta.learners.transfer import logistic_regression

float64 = pytest.mark.usefixtures("float64")
KEY = jax.random.key(0)
α = 0.1

LINEAR = jmeta.Model(
    init=lambda key, inputs: ({"w": jax.random.normal(key, (inputs.shape[1], 1), inputs.dtype)}, ()),
    apply=lambda key, params, state, inputs, *, train: (inputs @ params["w"], state),
)


def examples(seed, n=6, d=3):
    random = np.random.default_rng(seed)
    return jmeta.Examples(jnp.asarray(random.normal(size=(n, d))), jnp.asarray(random.normal(size=(n, 1))))


def gradient(w, data):
    x, y = np.asarray(data.inputs), np.asarray(data.targets)
    return 2 / len(x) * x.T @ (x @ w - y)


def hessian(data):
    x = np.asarray(data.inputs)
    return 2 / len(x) * x.T @ x


def batch_of(*tasks):
    return jax.tree.map(lambda *x: jnp.stack(x), *tasks)


def meta_gradient(learner, params, state, *tasks):
    def objective(params):
        return learner.objective(KEY, params, state, batch_of(*tasks))[0]

    return jax.jit(jax.grad(objective))(params)


def task():
    return jmeta.Task(examples(0), examples(1))


def source():
    return jmeta.TaskSource(task(), lambda key, data: data, {})


W = np.asarray([[0.3], [-1.0], [0.5]])
MSE = {"loss": jmeta.mean_squared_error}


@float64
def test_reptile_moves_towards_the_adapted_weights():
    learner = jmeta.reptile(LINEAR, inner_rate=α, inner_steps=3, inner_batch=None, inner_optimizer=optax.sgd, **MSE)
    tasks = [task(), jmeta.Task(examples(2), examples(3))]
    expected = []
    for each in tasks:
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *each)
        φ = W
        for _ in range(3):
            φ = φ - α * gradient(φ, both)
        expected.append(W - φ)
    result = meta_gradient(learner, {"w": jnp.asarray(W)}, (), *tasks)
    np.testing.assert_allclose(result["w"], np.mean(expected, axis=0), rtol=1e-12)


@float64
def test_reptile_draws_batches_without_replacement():
    """With all rows in a batch the order does not matter; with fewer it does, and never more than a batch is used."""
    few = jmeta.reptile(LINEAR, inner_rate=α, inner_steps=1, inner_batch=2, inner_optimizer=optax.sgd, **MSE)
    step = W - np.asarray(jax.jit(few.adapt)(KEY, {"w": jnp.asarray(W)}, (), task().support).params["w"])
    pairs = [
        α * gradient(W, jax.tree.map(lambda x, rows=(i, j): x[np.asarray(rows)], task().support))
        for i in range(6)
        for j in range(i)
    ]
    assert sum(np.allclose(step, pair) for pair in pairs) == 1
    with pytest.raises(jmeta.ConfigError, match=r"inner_batch is 0"):
        jmeta.reptile(LINEAR, inner_batch=0)


@float64
@pytest.mark.parametrize("solver", [jmeta.conjugate_gradient(10), jmeta.neumann(400, rate=0.3)])
def test_imaml_is_the_implicit_gradient(solver):
    λ = 1.5
    learner = jmeta.imaml(LINEAR, inner_rate=0.2, inner_steps=300, proximal=λ, adjoint=jmeta.implicit(solver), **MSE)
    x, y = np.asarray(task().support.inputs), np.asarray(task().support.targets)
    H = hessian(task().support)
    φ = np.linalg.solve(H + λ * np.eye(3), 2 / len(x) * x.T @ y + λ * W)
    expected = np.linalg.solve(np.eye(3) + H / λ, gradient(φ, task().query))
    adapted = jax.jit(learner.adapt)(KEY, {"w": jnp.asarray(W)}, (), task().support)
    np.testing.assert_allclose(adapted.params["w"], φ, rtol=1e-8)
    assert adapted.info["residual"] < 1e-8
    assert adapted.info["unconverged"] == 0
    np.testing.assert_allclose(meta_gradient(learner, {"w": jnp.asarray(W)}, (), task())["w"], expected, rtol=1e-7)


@float64
def test_the_implicit_gradient_is_that_of_the_unrolled_loop_once_it_converged():
    """Also in leaves that do not adapt, and in a network that is not linear."""
    model = jmeta.linen(jmeta.MLP(outputs=1, hidden=(4,)))

    def both(adjoint):
        problem = jmeta.InnerProblem(
            jmeta.support_loss(model, jmeta.mean_squared_error),
            optax.sgd(0.05),
            600,
            lambda path: "head" in path,
            proximal=1.0,
        )
        solve = adjoint(problem)
        params, state = jax.tree.map(jnp.float64, model.init(KEY, jnp.float32(task().support.inputs)))

        def outer(params, support):
            adapted = solve(KEY, params, state, support)
            outputs, _ = model.apply(KEY, adapted.params, state, task().query.inputs, train=False)
            return jmeta.mean_squared_error(outputs, task().query.targets)

        return ravel_pytree(jax.jit(jax.grad(outer, argnums=(0, 1)))(params, task().support))[0]

    exact, implicit = both(jmeta.exact()), both(jmeta.implicit(jmeta.conjugate_gradient(20)))
    assert np.abs(exact).max() > 0.1
    np.testing.assert_allclose(implicit, exact, rtol=1e-6, atol=1e-8)


def test_imaml_warns_when_the_inner_loop_ends_early():
    learner = jmeta.imaml(LINEAR, inner_rate=1e-4, inner_steps=1, **MSE)
    with pytest.warns(jmeta.ConvergenceWarning, match=r"did not converge in 100%"):
        jmeta.fit(KEY, learner, source(), steps=1, tasks=1, log_every=1)


def test_imaml_needs_a_proximal_term():
    with pytest.raises(jmeta.ConfigError, match=r"proximal is 0.0; give a positive weight"):
        jmeta.imaml(LINEAR, proximal=0.0)
    with pytest.raises(jmeta.ModelError, match=r"the objective does not depend on what the outer loop trains"):
        jmeta.init(KEY, jmeta.maml(LINEAR, adjoint=jmeta.implicit(), **MSE), optax.sgd(0.1), source())
    with pytest.raises(jmeta.ConfigError, match=r"maxiter is 0"):
        jmeta.conjugate_gradient(0)
    with pytest.raises(jmeta.ConfigError, match=r"rate is 0"):
        jmeta.neumann(rate=0.0)


@float64
def test_meta_sgd_learns_its_rates_by_the_product_of_gradients():
    """dL(φ)/dα = −∇L(θ; support) ∘ ∇L(φ; query), dL(φ)/dθ = (I − H diag α) ∇L(φ; query)."""
    learner = jmeta.meta_sgd(LINEAR, **MSE)
    rates = np.asarray([[0.1], [0.2], [-0.3]])
    inner = gradient(W, task().support)
    outer = gradient(W - rates * inner, task().query)
    params = {"model": {"w": jnp.asarray(W)}, "rates": {"w": jnp.asarray(rates)}}
    result = meta_gradient(learner, params, (), task())
    np.testing.assert_allclose(result["rates"]["w"], -inner * outer, rtol=1e-12)
    expected = outer - hessian(task().support) @ (rates * outer)
    np.testing.assert_allclose(result["model"]["w"], expected, rtol=1e-12)
    start = jax.jit(learner.init)(KEY, task())[0]["rates"]["w"]
    np.testing.assert_array_equal(start, np.full((3, 1), 0.01))


@float64
def test_meta_curvature_is_a_matrix_on_each_axis():
    random = np.random.default_rng(0)
    rows, columns = random.normal(size=(3, 3)), random.normal(size=(1, 1))
    params = {"model": {"w": jnp.asarray(W)}, "curvature": {"w": (jnp.asarray(rows), jnp.asarray(columns))}}
    learner = jmeta.meta_curvature(LINEAR, inner_rate=α, **MSE)
    φ = jax.jit(learner.adapt)(KEY, params, (), task().support).params["w"]
    np.testing.assert_allclose(φ, W - α * rows @ gradient(W, task().support) @ columns.T, rtol=1e-12)


def test_meta_curvature_starts_as_maml_on_a_convolution():
    support = pictures(0)
    model = jmeta.linen(Convolution())
    learner, maml = jmeta.meta_curvature(model), jmeta.maml(model)
    params, state = jax.jit(learner.init)(KEY, images())
    assert [m.shape for m in params["curvature"]["Conv_0"]["kernel"]] == [(9, 9), (2, 2), (3, 3)]
    φ = jax.jit(learner.adapt)(KEY, params, state, support).params
    expected = jax.jit(maml.adapt)(KEY, params["model"], state, support).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), φ, expected)


class Convolution(nn.Module):
    outputs: int | None = 2
    policy: str = "transductive"

    @nn.compact
    def __call__(self, x, train):
        x = jmeta.Conv(3, (3, 3))(x)
        x = nn.relu(jmeta.BatchNorm(self.policy, scale=True)(x, train=train)).mean(axis=(1, 2))
        return nn.Dense(self.outputs, name="head")(x)


def test_anil_and_boil_divide_the_parameters():
    model = jmeta.linen(jmeta.MLP(outputs=1, hidden=(4,)))
    for make, adapts in ((jmeta.anil, lambda path: "head" in path), (jmeta.boil, lambda path: "head" not in path)):
        learner = make(model, inner_rate=α, inner_steps=2, **MSE)
        params, state = jax.jit(learner.init)(KEY, task())
        φ = jax.jit(learner.adapt)(KEY, params, state, task().support).params
        for (path, before), after in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(φ), strict=True):
            same = np.array_equal(before, after)
            assert same != adapts(jax.tree_util.keystr(path)), path
    learner = jmeta.anil(model, head="top", **MSE)
    with pytest.raises(jmeta.ConfigError, match=r"choose among Dense_0/bias, Dense_0/kernel, head/bias"):
        jmeta.fit(KEY, learner, jmeta.sinusoid(), steps=1)


def test_cavia_adapts_the_context_alone_and_starts_at_zero():
    model = jmeta.linen(jmeta.MLP(outputs=1, hidden=(4,), context=2))
    learner = jmeta.cavia(model, inner_rate=α, inner_steps=2, **MSE)
    params, state = jax.jit(learner.init)(KEY, task())
    elsewhere = {**params, "context": params["context"] + 7.0}
    adapted, same = (learner.adapt(KEY, p, state, task().support).params for p in (params, elsewhere))
    jax.tree.map(np.testing.assert_array_equal, adapted, same)
    for name in ("Dense_0", "head"):
        jax.tree.map(np.testing.assert_array_equal, adapted[name], params[name])

    def inner(context):
        outputs, _ = model.apply(KEY, {**params, "context": context}, state, task().support.inputs, train=True)
        return jmeta.mean_squared_error(outputs, task().support.targets)

    context = jnp.zeros_like(params["context"])
    for _ in range(2):
        context = context - α * jax.grad(inner)(context)
    assert np.abs(context).min() > 0
    np.testing.assert_allclose(adapted["context"], context, rtol=1e-6)
    assert not np.asarray(meta_gradient(learner, params, state, task())["context"]).any()
    with pytest.raises(jmeta.ConfigError, match=r"no leaf of the parameters is adaptable"):
        jmeta.fit(KEY, jmeta.cavia(jmeta.linen(jmeta.MLP(outputs=1)), **MSE), jmeta.sinusoid(), steps=1)


OFF = {"learned_rates": False, "multi_step_loss": 0, "per_step_norm": False}


def images():
    return jmeta.Task(*map(pictures, (0, 1)))


def pictures(seed):
    x = np.random.default_rng(seed).normal(size=(4, 6, 6, 2))
    return jmeta.Examples(jnp.asarray(x), jnp.eye(2).repeat(2, 0))


def test_maml_plus_plus_with_everything_off_is_maml_bit_for_bit():
    model = jmeta.linen(Convolution())
    plus, maml = (make(model, inner_rate=α, inner_steps=3, **off) for make, off in PAIR)
    params, state = jax.jit(plus.init)(KEY, images())
    result, expected = (
        jax.grad(lambda p, learner=learner, s=s: learner.objective(KEY, p, s, batch_of(images()))[0])(p)
        for learner, p, s in ((plus, params, state), (maml, params["model"], {}))
    )  # operation by operation: compiled, two programs may round in two ways
    jax.tree.map(np.testing.assert_array_equal, result["model"], expected)
    assert not any(np.asarray(rate).any() for rate in jax.tree.leaves(result["rates"]))


PAIR = ((jmeta.maml_plus_plus, OFF), (jmeta.maml, {}))


@float64
@pytest.mark.parametrize("meta_step", [0, 5, 10, 99])
def test_the_multi_step_loss_weighs_the_steps(meta_step):
    """vₖ = (1 − t / T) / K for k < K, the rest for the last step."""
    plus = jmeta.maml_plus_plus(LINEAR, inner_rate=α, inner_steps=3, multi_step_loss=10, **MSE)
    params, state = plus.init(KEY, task())
    params = {**params, "model": {"w": jnp.asarray(W)}}
    state = {**state, "meta_step": jnp.asarray(meta_step, jnp.int32)}
    value, (state, _) = plus.objective(KEY, params, state, batch_of(task()))
    φ, losses = W, []
    for _ in range(3):
        φ = φ - α * gradient(φ, task().support)
        x, y = np.asarray(task().query.inputs), np.asarray(task().query.targets)
        losses.append(np.mean((x @ φ - y) ** 2))
    early = (1 - min(meta_step / 10, 1)) / 3
    np.testing.assert_allclose(value, np.dot([early, early, 1 - 2 * early], losses), rtol=1e-12)
    assert int(state["meta_step"]) == meta_step + 1


@float64
def test_first_order_comes_before_second_order():
    options = {"inner_rate": α, "inner_steps": 2}
    plus = jmeta.maml_plus_plus(LINEAR, first_order_until=3, **OFF, **options, **MSE)
    params, state = plus.init(KEY, task())
    orders = []
    for make in (jmeta.fomaml, jmeta.maml):
        orders.append(meta_gradient(make(LINEAR, **options, **MSE), params["model"], (), task())["w"])
    assert not np.allclose(*orders)
    for meta_step, expected in ((2, orders[0]), (3, orders[1])):
        now = {**state, "meta_step": jnp.asarray(meta_step, jnp.int32)}
        np.testing.assert_allclose(meta_gradient(plus, params, now, task())["model"]["w"], expected, rtol=1e-12)


def test_each_inner_step_has_rates_and_batch_norm_of_its_own():
    model = jmeta.linen(Convolution(policy="running"))
    plus = jmeta.maml_plus_plus(model, inner_rate=α, inner_steps=2, multi_step_loss=0)
    params, state = plus.init(KEY, images())
    assert params["model"]["BatchNorm_0"]["scale"].shape == (2, 3)
    assert params["rates"]["Conv_0"]["kernel"].shape == (2,)
    assert params["rates"]["BatchNorm_0"] == {"bias": None, "scale": None}
    assert state["model"]["batch_stats"]["BatchNorm_0"]["mean"].shape == (2, 3)
    params["rates"] = jax.tree.map(lambda x: x * jnp.asarray([1.0, 0.0], x.dtype), params["rates"])
    once, twice, more = (
        jmeta.maml_plus_plus(model, inner_rate=α, inner_steps=steps, multi_step_loss=0).adapt(
            KEY, params, state, images().support
        )
        for steps in (1, 2, 4)
    )
    # A second step of rate 0 changes no weight, and neither do further steps, which take the last set.
    jax.tree.map(np.testing.assert_array_equal, once.params, twice.params)
    jax.tree.map(np.testing.assert_array_equal, once.params, more.params)
    mean = [a.state["model"]["batch_stats"]["BatchNorm_0"]["mean"] for a in (once, twice, more)]
    assert np.array_equal(mean[0][0], mean[1][0])
    assert not np.array_equal(mean[0][1], mean[1][1])
    assert not np.array_equal(mean[1][1], mean[2][1])


def test_maml_plus_plus_refuses_what_cannot_be():
    with pytest.raises(jmeta.ConfigError, match=r"per_step is 4, but there are 3 inner steps"):
        jmeta.maml_plus_plus(LINEAR, inner_steps=3, per_step=4)
    with pytest.raises(jmeta.ConfigError, match=r"multi_step_loss is -1"):
        jmeta.maml_plus_plus(LINEAR, multi_step_loss=-1)
    with pytest.raises(jmeta.ConfigError, match=r"inner_rate is 0"):
        jmeta.maml_plus_plus(LINEAR, inner_rate=0.0)


def test_proto_maml_without_steps_is_a_prototypical_network():
    model = jmeta.linen(jmeta.MLP(outputs=None, hidden=(5,)))
    support = jmeta.Examples(task().support.inputs, jnp.eye(3).repeat(2, 0))
    params, state = jax.jit(model.init)(KEY, support.inputs)
    outputs = []
    for learner in (jmeta.proto_maml(model, inner_steps=0), jmeta.prototypical(model)):
        adapted = jax.jit(learner.adapt)(KEY, params, state, support)
        outputs.append(jax.nn.log_softmax(jax.jit(learner.predict)(KEY, adapted, task().query.inputs)))
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)


@float64
def test_logistic_regression_is_at_its_minimum():
    random = np.random.default_rng(0)
    z, targets = jnp.asarray(random.normal(size=(12, 4))), jnp.eye(3)[random.integers(0, 3, 12)].astype(jnp.float64)
    head, _ = logistic_regression(z, targets, penalty=0.1, maxiter=40)
    probabilities = np.asarray(jax.nn.softmax(z @ head["kernel"] + head["bias"][None]))
    stationary = np.asarray(z).T @ (probabilities - targets) / 12 + 0.1 * np.asarray(head["kernel"])
    np.testing.assert_allclose(stationary, 0, atol=1e-5)
    np.testing.assert_allclose((probabilities - targets).sum(axis=0), 0, atol=1e-4)


def test_transfer_pre_trains_on_all_classes_and_adapts_to_new_ones():
    x = np.random.default_rng(0).normal(size=(40, 3))
    training = jmeta.from_arrays(x, np.repeat(np.arange(8), 5), batch=16)
    pretraining = jax.jit(training.sample)(KEY, training.data)
    assert pretraining.support == ()
    assert pretraining.query.targets.shape == (16, 8)
    model = jmeta.linen(jmeta.MLP(outputs=None, hidden=(5,)))
    support = jmeta.Examples(task().support.inputs, jnp.eye(3).repeat(2, 0))
    for learner, body_stays in (
        (jmeta.transfer(model), False),
        (jmeta.transfer(model, body=False), True),
        (jmeta.linear_probe(model), True),
        (jmeta.baseline_plus_plus(model), True),
    ):
        params, state = jax.jit(learner.init)(KEY, pretraining)
        assert params["head"]["kernel"].shape == (5, 8)
        adapted = jax.jit(learner.adapt)(KEY, params, state, support)
        assert adapted.params["head"]["kernel"].shape == (5, 3)
        same_body = jax.tree.map(np.array_equal, adapted.params["body"], params["body"])
        assert all(jax.tree.leaves(same_body)) == body_stays


@float64
def test_self_distillation_is_the_loss_of_its_paper():
    random, model = np.random.default_rng(0), LINEAR
    query = jmeta.Examples(jnp.asarray(random.normal(size=(1, 16, 3))), jnp.asarray(np.eye(8)[None, np.arange(16) % 8]))
    batch = jmeta.Task((), query)
    first = jmeta.linear_probe(model)
    teacher, student = (
        jax.jit(first.init)(jax.random.key(seed), jax.tree.map(lambda a: a[0], batch)) for seed in (1, 2)
    )
    learner = jmeta.linear_probe(model, teacher=teacher, distillation=0.3, temperature=2.0)
    found, _ = jax.jit(learner.objective)(KEY, *student, batch)

    def logits(params):
        z, _ = model.apply(KEY, params["body"], (), batch.query.inputs[0], train=False)
        return np.asarray(z) @ np.asarray(params["head"]["kernel"]) + np.asarray(params["head"]["bias"])

    def log_softmax(a):
        return a - np.log(np.exp(a).sum(axis=1, keepdims=True))

    s, t, y = logits(student[0]), logits(teacher[0]), np.asarray(batch.query.targets[0])
    p = np.exp(log_softmax(t / 2))
    divergence = (p * (log_softmax(t / 2) - log_softmax(s / 2))).sum(axis=1).mean()
    np.testing.assert_allclose(found, 0.7 * -(y * log_softmax(s)).sum(axis=1).mean() + 0.3 * 4 * divergence)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"distillation": 1.5}, "distillation is 1.5; give a share"),
        ({"temperature": 0.0}, "temperature is 0.0; give a positive"),
    ],
)
def test_numbers_of_self_distillation_that_cannot_work_are_refused(options, sentence):
    with pytest.raises(jmeta.ConfigError, match=sentence):
        jmeta.linear_probe(LINEAR, **options)


def test_an_inner_loss_must_be_a_scalar():
    learner = jmeta.maml(LINEAR, loss=lambda outputs, targets: (outputs - targets) ** 2)
    with pytest.raises(jmeta.ModelError, match=r"the inner loss has shape .* it must be a scalar"):
        jmeta.fit(KEY, learner, source(), steps=1)


@pytest.mark.parametrize(
    "make", [jmeta.meta_sgd, jmeta.meta_curvature, jmeta.imaml, jmeta.reptile, jmeta.boil, jmeta.cavia, jmeta.transfer]
)
def test_a_rate_is_positive(make):
    with pytest.raises(jmeta.ConfigError, match=r"inner_rate is 0.0; give a positive rate"):
        make(LINEAR, inner_rate=0.0)
    with pytest.raises(jmeta.ConfigError, match=r"inner_steps is -1"):
        make(LINEAR, inner_steps=-1)
