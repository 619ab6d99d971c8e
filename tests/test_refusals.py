"""What a user gives by mistake is told in a sentence that says what to give."""

import functools
import inspect

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import optax.contrib
import pytest

import jmeta
from jmeta.compilation import made_of
from jmeta.runs.entries import LOSSES
from jmeta.runs.registry import DATA, LEARNERS
from jmeta.runs.settings import resolve

KEY = jax.random.key(0)
SOURCE = jmeta.sinusoid(shots=5, queries=5)
LEARNER = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1, hidden=(4,))), inner_rate=0.01, loss=jmeta.mean_squared_error)


def fit(learner=LEARNER, source=SOURCE, **options):
    return jmeta.fit(KEY, learner, source, **{"steps": 2, "tasks": 2, "log_every": 2} | options)


@functools.cache
def start(hidden=4, optimizer=None):
    model = jmeta.linen(jmeta.MLP(outputs=1, hidden=(hidden,)))
    learner = jmeta.maml(model, inner_rate=0.01, loss=jmeta.mean_squared_error)
    return jmeta.init(KEY, learner, optimizer or optax.adam(1e-3), SOURCE)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 4.5}, "steps is 4.5; give a whole number"),
        ({"tasks": 2.0}, "tasks is 2.0; give a whole number"),
        ({"log_every": "5"}, "log_every is 5; give a whole number"),
        ({"steps": -1}, "steps is -1; give at least 0"),
        ({"tasks": 0}, "tasks is 0; give at least 1"),
    ],
)
def test_a_number_that_is_none(options, sentence):
    with pytest.raises(jmeta.ConfigError, match=sentence):
        jmeta.fit.__wrapped__(KEY, LEARNER, SOURCE, **options)  # without the types that tests check


def test_whole_numbers_of_numpy_are_taken():
    assert len(jmeta.fit.__wrapped__(KEY, LEARNER, SOURCE, steps=np.int64(2), tasks=2).history) == 1


def test_a_run_that_is_done_says_so():
    done = fit().train_state
    with pytest.warns(
        UserWarning, match=r"is at step 2 and steps is 2, counted .* nothing is done; steps=4 makes 2 more"
    ):
        again = fit(train_state=done)
    assert again.history == [] and int(again.train_state.step) == 2
    assert int(fit(train_state=done, steps=4).train_state.step) == 4


@pytest.mark.parametrize(
    ("train_state", "sentence"),
    [
        (lambda: start(hidden=5), r"another learner or model: it has 0/Dense_0/bias float32\[5\], where this one has"),
        (lambda: start(optimizer=optax.sgd(1e-3)), "another optimiser: it has 0/count missing"),
        (lambda: start(optimizer=optax.sgd(1e-3, momentum=0.9)), "another optimiser: it has 0/count missing"),
        (lambda: fit(), "train_state is a Fit; give a TrainState: give its train_state"),
        (lambda: {"params": 1}, "train_state is a dict; give a TrainState, as init"),
    ],
)
def test_a_state_of_another_run(train_state, sentence):
    with pytest.raises(jmeta.ConfigError, match=sentence):
        jmeta.fit.__wrapped__(KEY, LEARNER, SOURCE, steps=4, tasks=2, train_state=train_state())


def test_parameters_in_another_container():
    import flax

    state = start()
    with pytest.raises(jmeta.ConfigError, match="in other containers"):
        fit(train_state=state._replace(params=flax.core.freeze(state.params)))


def test_fit_and_evaluate_under_jit_and_vmap_say_what_to_use():
    with pytest.raises(jmeta.ConfigError, match=r"fit is a loop of Python.*jmeta.make_step inside"):
        jax.vmap(lambda key: jmeta.fit(key, LEARNER, SOURCE, steps=2, tasks=2).params)(jax.random.split(KEY, 2))
    with pytest.raises(jmeta.ConfigError, match="evaluate is a loop of Python"):
        jax.jit(lambda p: jmeta.evaluate(KEY, LEARNER, p, {}, SOURCE, episodes=2))(start().params)


def test_seeds_are_a_vmap_as_the_sentence_says():
    """And a rate for each."""

    def train(key, rate):
        optimizer = optax.sgd(rate)
        step = jmeta.make_step(LEARNER, optimizer, SOURCE, tasks=2)
        return jax.lax.scan(step, jmeta.init(key, LEARNER, optimizer, SOURCE), length=2)[0].params

    many = jax.jit(jax.vmap(train))(jax.random.split(KEY, 2), jnp.asarray([1e-3, 1e-2]))
    one = jmeta.fit(jax.random.split(KEY, 2)[1], LEARNER, SOURCE, optimizer=optax.sgd(1e-2), steps=2, tasks=2).params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-6), many, one)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.contrib.sam(optax.sgd(0.01), optax.chain(optax.contrib.normalize(), optax.sgd(0.05))),
        optax.lbfgs(),
        optax.contrib.schedule_free_sgd(0.01),
        optax.chain(optax.sgd(0.01), optax.contrib.reduce_on_plateau()),
    ],
    ids=["sam", "lbfgs", "schedule_free", "plateau"],
)
def test_optimisers_of_other_signatures_train(optimizer):
    assert np.isfinite(fit(optimizer=optimizer, steps=4, log_every=4).history[-1]["loss"])


def test_an_optimiser_of_other_parameters():
    with pytest.raises(jmeta.ConfigError, match=r"cannot update the parameters of the learner .*fast"):
        fit(optimizer=optax.lookahead(optax.sgd(0.1), sync_period=2, slow_step_size=0.5))


X = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
Y = np.repeat(np.arange(4), 10)


def labelled(of):
    """A source of the user's own, with labels in place of one-hot rows."""
    good = jmeta.from_arrays(X, Y, ways=3, shots=2, queries=2)

    def sample(key, data):
        task = good.sample(key, data)
        return jax.tree.map(
            lambda e: e._replace(targets=of(e.targets)), task, is_leaf=lambda e: isinstance(e, jmeta.Examples)
        )

    return good._replace(sample=sample)


CLASSIFIERS = [name for name, entry in LEARNERS.items() if not (entry.acts or entry.descriptions or entry.pretrains)]
LABELS = {
    "[n]": (lambda t: t.argmax(axis=1), r"integer labels \[6\]; give one-hot rows, jax.nn.one_hot\(targets, ways\)"),
    "[n, 1]": (
        lambda t: t.argmax(axis=1)[:, None],
        r"integer labels \[6, 1\]; give one-hot rows, jax.nn.one_hot\(targets\[:, 0\], ways\)",
    ),
    "floats": (lambda t: t[:, 0], r"of shape \[6\]; give \[n, outputs\], targets\[:, None\]"),
}


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("kind", LABELS)
def test_integer_labels_given_to_adapt(name, kind):
    entry = LEARNERS[name]
    if entry.acts or name == "zero_shot":
        pytest.skip("reads no targets of a support")
    of, sentence = LABELS[kind]
    learner = entry.make(jmeta.linen(jmeta.MLP(outputs=None if entry.embedding else 3, hidden=(4,))))
    targets = of(jnp.eye(3).repeat(2, axis=0))
    with pytest.raises(jmeta.ModelError, match="targets of the support are " + sentence):
        learner.adapt(KEY, {"head": {}, "body": {}}, {}, jmeta.Examples(jnp.asarray(X[:6]), targets))


@pytest.mark.parametrize("kind", LABELS)
def test_integer_labels_from_a_source(kind):
    of, sentence = LABELS[kind]
    learner = jmeta.prototypical(jmeta.linen(jmeta.MLP(outputs=None)))
    with pytest.raises(jmeta.ModelError, match="targets of the support are " + sentence):
        fit(learner, labelled(of))
    with pytest.raises(jmeta.ModelError, match="targets of the support are " + sentence):
        jmeta.evaluate(KEY, learner, {}, {}, labelled(of), episodes=2)


def test_other_things_than_tasks_and_arrays():
    source = SOURCE._replace(sample=lambda key, data: (1, 2))
    with pytest.raises(jmeta.ModelError, match=r"the source gives a tuple; let sample return jmeta.Task"):
        fit(source=source)
    with pytest.raises(jmeta.ModelError, match="of the support are a list; give arrays"):
        LEARNER.adapt(KEY, {}, {}, jmeta.Examples([[1.0]], [[1.0]]))


@pytest.mark.parametrize("name", [name for name, entry in LEARNERS.items() if entry.pretrains])
def test_a_learner_that_pretrains_refuses_episodes(name):
    learner = LEARNERS[name].make(jmeta.linen(jmeta.MLP(outputs=4, hidden=())))
    with pytest.raises(jmeta.ConfigError, match="pre-trains on batches of all classes at once"):
        fit(learner, jmeta.from_arrays(X, Y, ways=3, shots=1, queries=2))


def test_a_regression_is_pretrained_on_its_tasks():
    fit(jmeta.transfer(jmeta.linen(jmeta.MLP(outputs=4)), new_head=False, loss=jmeta.mean_squared_error))


def test_token_ids_beyond_the_table():
    ids = jnp.asarray(jmeta.hashed_text([f"word{i}" for i in range(40)], buckets=2**10))
    model = jmeta.linen(jmeta.TextEncoder(outputs=None, features=8, buckets=64))
    with pytest.raises(jmeta.ModelError, match="the network has 64 rows for them; give hashed_text and TextEncoder"):
        model.init(KEY, ids)
    params, state = jax.jit(model.init)(KEY, ids % 64)
    compiled = jax.jit(lambda ids: model.apply(KEY, params, state, ids, train=False)[0])
    assert jnp.isnan(compiled(ids)).any() and jnp.isfinite(compiled(ids % 64)).all()
    source = jmeta.from_arrays(ids, Y, ways=3, shots=1, queries=2)
    with pytest.raises(jmeta.NonFiniteError, match=r"has the id .* and the table 'vectors' of the model has 64 rows"):
        fit(jmeta.prototypical(model), source)


REGRESSION = jmeta.from_groups(X[:, :3], X[:, 3:6], Y, shots=4, queries=4)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("maml", "prototypical", "in_context") else pytest.mark.slow)
        for name, e in LEARNERS.items()
        if not (e.acts or e.descriptions or e.pretrains)
    ],
)
def test_a_loss_of_classes_on_a_regression_is_told_before_the_run(name):
    entry = LEARNERS[name]
    network = {"context": 2} if name == "cavia" else {}
    one, three = (
        entry.make(jmeta.linen(jmeta.MLP(outputs=None if entry.embedding else n, hidden=(4,), **network)))
        for n in (1, 3)
    )
    with pytest.raises(jmeta.ModelError, match=r"the targets have one column.*loss=jmeta.mean_squared_error"):
        jmeta.init(KEY, one, optax.adam(1e-3), SOURCE)
    with pytest.raises(jmeta.ModelError, match="the targets of the support are no classes, one-hot: a row is"):
        jmeta.init(KEY, three, optax.adam(1e-3), REGRESSION)


def test_a_metric_of_classes_on_a_regression_is_told():
    params = start().params
    with pytest.raises(jmeta.ModelError, match=r"one column.*evaluate metric=jmeta.mean_squared_error"):
        jmeta.evaluate(KEY, LEARNER, params, {}, SOURCE, episodes=2)
    three = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=3)), inner_rate=0.01, loss=jmeta.mean_squared_error)
    train_state = jmeta.init(KEY, three, optax.adam(1e-3), REGRESSION)
    for metric in (jmeta.accuracy, {"accuracy": jmeta.accuracy}, lambda o, t: jmeta.softmax_cross_entropy(o, t)):
        with pytest.raises(jmeta.ModelError, match="the targets of the query are no classes"):
            jmeta.evaluate(KEY, three, train_state.params, {}, REGRESSION, episodes=2, metric=metric)


@pytest.mark.parametrize("targets", [jnp.eye(3), jnp.eye(3).astype(int), jnp.eye(3) > 0, jnp.full((3, 3), 1 / 3)])
def test_one_hot_of_any_kind_and_probabilities_are_classes(targets):
    from jmeta.losses import check_classes

    check_classes("support", jmeta.Examples((), targets))
    assert float(jmeta.accuracy(jnp.eye(3), targets)) in (1.0, pytest.approx(1 / 3))
    assert np.isfinite(float(jmeta.softmax_cross_entropy(jnp.eye(3), targets)))
    assert np.isfinite(float(jmeta.mean_squared_error(jnp.eye(3), targets)))


def test_accuracy_of_trajectories_is_told():
    source = jmeta.rl.bandit(queries=2)
    task = jax.jit(source.sample)(KEY, source.data)
    learner = jmeta.maml_rl(jmeta.linen(jmeta.rl.Policy(task.support.actions)))
    params, state = jax.jit(learner.init)(KEY, task)
    with pytest.raises(jmeta.ModelError, match=r"answers are a Trajectory and no array; give metric=jmeta.mean_return"):
        jmeta.evaluate(KEY, learner, params, state, source, episodes=2)


def test_pictures_of_bytes_do_not_reach_a_network():
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1), np.uint8)
    for model in (jmeta.identity(), jmeta.linen(jmeta.MLP(outputs=3, hidden=()))):
        params, state = jax.jit(model.init)(KEY, jnp.zeros((1, 4, 4, 1)))
        with pytest.raises(jmeta.DataError, match=r"pictures of bytes, \[6, 4, 4, 1\], which sources scale.*as_inputs"):
            model.apply(KEY, params, state, images, train=False)
        model.apply(KEY, params, state, jnp.asarray(jmeta.as_inputs(images)), train=False)


def test_a_classifier_sees_bytes_as_a_source_does():
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 1), np.uint8)
    classifier = jmeta.FewShotClassifier(jmeta.prototypical(jmeta.identity()), {}, {})
    answers = [
        classifier.fit(x[:6], list("aabbcc")).predict_proba(x[6:]) for x in (images, images / 255, images.astype(float))
    ]
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-4, atol=1e-5)
    assert (abs(answers[0] - answers[2]) > 0.01).any()


def test_tasks_that_do_not_fit_into_memory_are_refused_before_they_are_drawn():
    large = jmeta.sinusoid(shots=10**9)
    sentence = r"tasks at a time need [\d,.]+ GB for their examples alone, and this machine has .*; ask for fewer shots"
    with pytest.raises(jmeta.ConfigError, match=sentence):
        fit(source=large, tasks=1000)
    with pytest.raises(jmeta.ConfigError, match=sentence):
        jmeta.init(
            KEY,
            LEARNER,
            optax.adam(1e-3),
            jmeta.sinusoid(shots=2**31 - 2**12, queries=1)._replace(
                sample=lambda key, data: jmeta.Task(*2 * [jmeta.Examples(*2 * [jnp.zeros((10**12, 1))])])
            ),
        )
    with pytest.raises(jmeta.ConfigError, match=sentence):
        jmeta.evaluate(
            KEY,
            LEARNER,
            {},
            {},
            jmeta.sinusoid(shots=10**9),
            task_chunk=1000,
            episodes=1000,
            metric=jmeta.mean_squared_error,
        )


@pytest.mark.parametrize("data", ["glyphs", "sinusoid"])
@pytest.mark.parametrize("name", LEARNERS)
def test_the_rate_inside_is_the_same_in_python_and_in_the_shell(name, data):
    make, loss = LEARNERS[name].make, LOSSES[DATA[data].kind]
    parameters = inspect.signature(make).parameters
    if "inner_rate" not in parameters or LEARNERS[name].acts or (data == "sinusoid" and "loss" not in parameters):
        pytest.skip("has no rate, or no regression")
    model = jmeta.linen(jmeta.MLP(outputs=1))
    given = {"loss": loss} if "loss" in parameters else {}
    rate = resolve(name, data).inner_rate
    default, explicit, other = (make(model, **given, **r) for r in ({}, {"inner_rate": rate}, {"inner_rate": 0.123}))
    assert made_of(default) == made_of(explicit) != made_of(other)


def test_maml_on_sinusoids_starts_sane():
    learner = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1)), loss=jmeta.mean_squared_error)
    fitted = jmeta.fit(KEY, learner, jmeta.sinusoid(), steps=2, tasks=8, log_every=2)
    assert fitted.history[0]["loss"] < 10.0


def test_a_program_that_takes_more_memory_than_there_is_is_refused_before_it_runs(monkeypatch):
    monkeypatch.setattr("jmeta.compilation.memory", lambda: 2**20)
    sentence = r"this needs [\d,.]+ GB while it runs, and this machine has 0.0 GB; ask for fewer shots, queries, inner"
    wide = jmeta.maml(jmeta.linen(jmeta.MLP(outputs=1, hidden=(777, 777))), loss=jmeta.mean_squared_error)
    with pytest.raises(jmeta.ConfigError, match=sentence):
        fit(wide)
    params, state = wide.init(KEY, jax.jit(SOURCE.sample)(KEY, SOURCE.data))
    with pytest.raises(jmeta.ConfigError, match=sentence):
        jmeta.evaluate(KEY, wide, params, state, SOURCE, episodes=4, metric=jmeta.mean_squared_error)
    monkeypatch.undo()
    assert np.isfinite(fit(wide).history[-1]["loss"])


def test_structures_and_sizes_that_do_not_fit_are_told(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users do not run under the type checker
    labels = np.repeat(np.arange(4), 3)
    with pytest.raises(jmeta.DataError, match=r"inputs are a dict; write a source of your own, jmeta.TaskSource"):
        jmeta.from_arrays({"a": np.zeros((12, 3))}, labels)
    with pytest.raises(jmeta.DataError, match=r"other lengths from one example to the next; .* series by padding"):
        jmeta.from_arrays([np.zeros(3 + i % 4) for i in range(12)], labels)
    small, wide = (jmeta.from_arrays(np.ones((12, n)), labels, ways=2, shots=1, queries=1) for n in (3, 5))
    learner = jmeta.prototypical(jmeta.linen(jmeta.MLP(outputs=4, hidden=())))
    fitted = fit(learner, small)
    with pytest.raises(jmeta.ModelError, match=r"cannot take inputs of shape \[5\]; give inputs of the shape"):
        jmeta.evaluate(KEY, learner, fitted.params, fitted.state, wide, episodes=2)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: jmeta.rl.Discrete(0), "Discrete has 0 actions; give at least 1"),
        (lambda: jmeta.rl.Box(0), r"Box has 0 coordinates in \[-1.0, 1.0\]; give at least 1"),
        (lambda: jmeta.rl.Box(2, 1.0, 1.0), r"Box has 2 coordinates in \[1.0, 1.0\]; .* between finite bounds"),
        (lambda: jmeta.search_tasks(SOURCE, SOURCE, tasks=0), "tasks is 0; give at least 1 episode"),
        (lambda: jmeta.genotype({}, skips=-1), "skips is -1; give 0 or more"),
    ],
)
def test_values_that_make_nothing(make, sentence):
    with pytest.raises(jmeta.ConfigError, match=sentence):
        make()


def test_the_implicit_adjoint_has_no_trajectory():
    learner = jmeta.maml_plus_plus(
        jmeta.linen(jmeta.MLP(outputs=1)), adjoint=jmeta.implicit(), loss=jmeta.mean_squared_error
    )
    with pytest.raises(jmeta.ConfigError, match="knows the minimum alone; take exact"):
        fit(learner)
