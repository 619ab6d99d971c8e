"""The benchmarks. Speed: jmeta's systems run on small cases, other systems where they are installed."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jmeta
from benchmarks import (
    accelerator,
    backbones,
    bilevel,
    latency,
    learners,
    lora,
    meta_rl,
    molecules,
    pictures,
    pretrained,
    profile,
    side_information,
    transductive,
)
from benchmarks.machine import environment
from benchmarks.packed import packed
from benchmarks.speed import report, worker
from benchmarks.speed.cases import CASES, flops
from benchmarks.speed.measure import check_losses, measure
from benchmarks.speed.systems import SYSTEMS
from jmeta.runs.registry import LEARNERS

BY_NAME = {case.name: case for case in CASES}
MAML = BY_NAME["stride, exact, 1 step, 1 query"]


def small(case):
    return replace(case, tasks=min(case.tasks, 2), steps=2, ways=min(case.ways, 5))


def test_case_names_are_unique():
    assert len(BY_NAME) == len(CASES)


@pytest.mark.slow
def test_two_devices_have_the_loss_of_one_in_a_long_loop_over_tasks():
    """16 tasks a device, five steps of max-pooling: with experimental options of the compiler it was another one."""
    case = replace(BY_NAME["max-pool, exact, 5 steps, 15 queries"], steps=1)
    assert len(measure(case, ["jmeta", "two devices"], calls=1, budget=0)["systems"]) == 2  # and compares the losses


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("max-pool, first order, 1 step, 1 query", marks=pytest.mark.slow),
        "sinusoid, exact, 1 step",
        pytest.param("ProtoNet, 60-way 1-shot, 5 queries", marks=pytest.mark.slow),
        pytest.param("stride, exact, 1 step, 1 query, arrays", marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_jmeta_in_each_family(name):
    case = small(BY_NAME[name])
    systems = [system for system in ("jmeta", "default norm", "fixed batch") if SYSTEMS[system].enters(case)]
    for system in systems:
        result = worker.run(case, system, calls=1, budget=0)
        assert len(result["spent"]) == 2 and result["steps"] == 2
        assert np.isfinite(result["losses"]).all()
        assert result["memory"] > 1e8


SLOW = pytest.param("nn.Conv", marks=pytest.mark.slow)  # compiles for a minute


@pytest.mark.parametrize("name", ["jmeta", "higher", "torchopt", "torch.func", "jax-meta", SLOW])
def test_a_system_has_the_loss_of_jmeta_in_a_process_of_its_own(name, monkeypatch):
    reason = SYSTEMS[name].missing()
    if reason:
        pytest.skip(f"{reason}; pip install -e '.[peers]'")
    monkeypatch.setenv("JAX_NUMPY_DTYPE_PROMOTION", "standard")  # jax-meta mixes dtypes
    monkeypatch.setenv("JAX_NUMPY_RANK_PROMOTION", "allow")
    case = small(BY_NAME["sinusoid, exact, 1 step"] if name != "nn.Conv" else MAML)
    systems = measure(case, list(dict.fromkeys(["jmeta", name])), calls=1, budget=0)["systems"]
    assert set(systems) == {"jmeta", name}
    assert all(system["seconds"] > 0 and system["memory"] > 1e8 for system in systems.values())


@pytest.mark.slow
def test_a_system_that_ends_before_its_time_is_a_row_that_says_so(tmp_path, monkeypatch):
    raises = measure(replace(small(MAML), inner_rate=-1.0), ["jmeta"], calls=1, budget=0)["systems"]["jmeta"]
    assert "inner_rate is -1.0" in raises["died"]
    shell = tmp_path / "python"
    shell.write_text("#!/bin/sh\nkill -9 $$\n")
    shell.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(shell))
    rows = {MAML.name: measure(small(MAML), ["jmeta"], calls=1, budget=0)}
    assert rows[MAML.name]["systems"]["jmeta"] == {"died": "killed by SIGKILL"}
    text = report.markdown({"cpu": "a", "threads": 2, "python": "3", "versions": {}}, report.tables(rows))
    assert f"| {MAML.label} | killed by SIGKILL |" in text


@pytest.mark.slow
def test_a_wrong_gradient_is_seen():
    exact, first_order = (
        worker.run(replace(small(MAML), first_order=flag), "jmeta", calls=1, budget=0)["losses"]
        for flag in (False, True)
    )
    with pytest.raises(RuntimeError, match="meta-step 2"):
        check_losses({"exact": exact, "first order": first_order})


@pytest.mark.parametrize("other", [[1.001, 0.5], [1.0, 0.51], [float("nan"), 0.5]])
def test_a_different_loss_is_seen(other):
    check_losses({"a": [1.0, 0.5], "b": [1.00001, 0.50001]})
    with pytest.raises(RuntimeError, match="do not compute the same loss"):
        check_losses({"a": [1.0, 0.5], "b": other})


def test_flops_of_the_known_case():
    # 45 GFLOP, counted by hand layer by layer.
    assert flops(BY_NAME["stride, exact, 1 step, 15 queries"]) == pytest.approx(45.2e9, rel=0.01)


def test_the_report(tmp_path):
    def system(seconds):
        return {"seconds": seconds, "compile": 1.0, "tasks": 32, "processes": 2, "memory": 3e9}

    systems = {"jmeta": system(0.1), "two devices": system(0.05), "higher": system(0.2)}
    rows = {MAML.name: {"flops": 1e9, "peak": 1e11, "tasks": 32, "systems": systems}}
    tables = report.tables(rows)
    environment = {"cpu": "a", "threads": 2, "python": "3", "versions": {"jax": "1"}}
    text = report.markdown(environment, tables)
    assert f"| {MAML.label} | 100² | 50² (0.5) | 200² (2.0) |" in text
    assert f"| {MAML.name} | 3.0 | 3.0 | 3.0 |" in text
    assert f"| {MAML.name} | 50 | 2 | 4.00 (higher) | 1.0 | 1 | 20% |" in text
    report.picture(tmp_path / "speed.png", rows)
    assert (tmp_path / "speed.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_learner_under_a_budget(tmp_path):
    case = next(case for case in learners.learners() if case.name == "sinusoid, cavia")
    row = learners.measure(case, seconds=0.05, seed=0)
    assert row["steps"] >= 20
    assert row["parameters"] == 40 * 51 + 40 + 41 * 40 + 41 + 50
    assert not row["transductive"]
    table = learners.markdown("learners", {**environment(()), "seconds": 0.05, "seed": 0}, {case: row}, None)
    assert f"| cavia | {row['value']:.3f} ± {row['ci95']:.3f} | {row['steps']} |" in table
    learners.picture(tmp_path / "picture.png", {case: row}, None)
    assert (tmp_path / "picture.png").exists()


def test_every_learner_and_every_part_is_a_case():
    assert {case.learner for case in learners.learners()} == {n for n, entry in LEARNERS.items() if not entry.acts}
    for study in learners.STUDIES.values():
        names = [case.name for case in study()]
        assert len(set(names)) == len(names)


def test_operations_are_grouped_by_kind():
    assert [profile.kind(name) for name in ("convolution.12", "add_fusion.3.clone", "dot")] == [
        "convolution",
        "add_fusion",
        "dot",
    ]


def test_hyper_parameters_are_tuned_through_the_inner_loop():
    task, _ = bilevel.faces(classes=5, seed=0)
    assert task.support.inputs.shape == task.query.inputs.shape == (20, 28 * 28)
    learner = bilevel.classifier(steps=20)
    optimizer = optax.adam(0.5)
    fitted = jmeta.fit(
        jax.random.key(0), learner, bilevel.constant(task), steps=8, tasks=1, log_every=1, optimizer=optimizer
    )
    losses = [row["loss"] for row in fitted.history]
    assert losses[-1] < 0.9 * losses[0]


def test_tanimoto_is_shared_bits_over_all_bits():
    bits = jnp.asarray([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    learner = molecules.tanimoto()
    adapted = learner.adapt(jax.random.key(0), {}, {}, jmeta.Examples(bits, jnp.eye(2)))
    outputs = learner.predict(jax.random.key(0), adapted, jnp.asarray([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]))
    np.testing.assert_allclose(outputs, [[1 / 2, 0], [1 / 3, 1]], atol=1e-5)


def test_side_information_is_taken_away_in_one_program():
    data = side_information.arrays()
    source = data.source("test", shots=5, queries=2)
    sample = jax.jit(side_information.part_of(source))
    for shots, told in ((0, True), (2, False)):
        support = sample(jax.random.key(0), (source.data, shots, told)).support
        np.testing.assert_array_equal(support.targets.sum(axis=0), np.full(5, shots))
        assert bool(support.descriptions.any()) == told
    assert sample._cache_size() == 1


def test_the_table_of_side_information(tmp_path):
    def row(name, seed):
        shots = {"prototypical": (1, 2, 5), "zero_shot": (0,)}.get(name, side_information.SHOTS)
        results = {str(k): {"accuracy": 0.9 + (k + seed) / 100, "ci95": 0.01} for k in shots}
        without = {k: {"accuracy": 0.5, "ci95": 0.01} for k in "125"}
        return {"seconds": 1.0, "worth": 0.5, "shots": results, "without": without}

    rows = {
        side_information.name_of(data, name, seed): row(name, seed)
        for data in side_information.DATA
        for name in side_information.LEARNERS
        for seed in (0, 1)
    }
    table = side_information.markdown(rows, seeds=2)
    assert "| glyphs, attributes | 0 | 90.5 ± 0.7 | – | – | 90.5 ± 0.7 | 90.5 ± 0.7 |" in table
    assert "| CLINC150, names | 1 | 91.5 ± 0.7 | 50.0 ± 0.0 | 91.5 ± 0.7 | – | 91.5 ± 0.7 |" in table
    side_information.picture(tmp_path / "picture.png", rows, seeds=2)
    assert (tmp_path / "picture.png").exists()


def test_latency_is_a_line_for_each_number_of_images():
    times = latency.milliseconds(lambda: jnp.ones(2) + 1, calls=5)
    assert 0 < times["median"] <= times["p95"]
    row = {"model": "conv4", "bytes": 500_000, "images": {"1": {"classifier": times}, "64": {"classifier": times}}}
    table = latency.markdown({"maml": row})
    assert f"| maml | conv4 | 64 | {times['median']:.2f} ({times['p95']:.2f}) | 0.50 MB |" in table


def test_the_accelerator_in_its_small_form(tmp_path):
    out = tmp_path / "results.jsonl"
    rows = accelerator.main(["--small", "--parts", "device", "reward", "--out", str(out)])
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    assert not any("error" in row for row in rows)
    assert rows[-1]["environment_steps_a_second"] > 0
    assert "| rl2 | bandit | 8 |" in accelerator.table(rows)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the inner loop adapts convolutions")  # as the grouped lowering is there to show
def test_every_part_of_the_accelerator_in_its_small_form(tmp_path):
    rows = accelerator.main(["--small", "--out", str(tmp_path / "results.jsonl")])
    assert not any("error" in row for row in rows)
    assert {row["part"] for row in rows} == set(accelerator.PARTS)
    limits = {"float64": 1e-12, "float32": 1e-5}
    assert all(row["difference"] < limits[row["dtype"]] for row in rows if row["part"] == "agree")


def test_a_part_that_fails_ends_no_other(tmp_path, monkeypatch):
    def fails(*_):
        raise MemoryError("too large")

    monkeypatch.setattr(accelerator, "agree", fails)
    rows = accelerator.main(["--small", "--parts", "agree", "device", "--out", str(tmp_path / "results.jsonl")])
    assert "too large" in rows[0]["error"]
    assert rows[1]["kind"]


@pytest.mark.slow
def test_omniglot_travels_in_one_file(tmp_path):
    try:
        jmeta.omniglot(split="test")
    except jmeta.DataError as error:
        pytest.skip(str(error))
    accelerator.main(["--pack", str(tmp_path / "omniglot.npz")])
    source = packed(tmp_path / "omniglot.npz", "test")
    given = jmeta.omniglot(split="test")
    task, expected = (s.sample(jax.random.key(0), s.data) for s in (source, given))
    assert set(np.unique(task.query.inputs)) == {0.0, 1.0}
    np.testing.assert_array_equal(np.asarray(task.query.inputs), np.asarray(expected.query.inputs) > 0.5)


@pytest.mark.slow
def test_the_table_of_transductive_methods():
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), 60)
    z = np.abs(random.normal(size=(12, 6))[labels] + random.normal(size=(720, 6))).astype(np.float32)
    data = transductive.Embedded(z, labels, np.repeat([0, 1], 6))
    last = dict(list(transductive.tasks().items())[-2:])
    rows = {
        f"seed {seed}, {title}": transductive.gains(data, 4, **options | {"queries": 3})
        for title, options in last.items()
        for seed in range(2)
    }
    row = next(iter(rows.values()))
    assert row["prototypical"]["gain"] == 0.0
    assert set(row) == {"prototypical", "label_propagation", "soft_kmeans"}
    table = transductive.markdown(rows, 2, list(last))
    assert table.count("±") == 4


def test_what_untrained_embeddings_answer_is_the_cosine_with_mean_and_name():
    random = np.random.default_rng(0)
    x, names, z = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((6, 8), (3, 8), (4, 8)))
    support = jmeta.Examples(x, jnp.repeat(jnp.eye(3), 2, axis=0), names)

    def cosines(a, b):
        return np.einsum("nf,kf->nk", a, b) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)[None]

    by_mean, by_name = 2 * cosines(z, np.asarray(x).reshape(3, 2, 8).mean(axis=1)), cosines(z, names)
    for mean, name, expected in ((True, False, by_mean), (False, True, by_name), (True, True, by_mean + by_name)):
        learner = pretrained.fixed(mean, name)
        outputs = learner.predict(jax.random.key(0), learner.adapt(jax.random.key(0), {}, {}, support), z)
        between = np.asarray(outputs)[:, :1] - np.asarray(outputs)  # as softmax sees them
        np.testing.assert_allclose(between, expected[:, :1] - expected, atol=1e-5)


def test_the_table_of_pictures():
    def row(name, seed):
        result = {"accuracy": 0.9 + seed / 100, "transductive": name == "tim"}
        return {"seconds": 2.0, "results": dict.fromkeys((f"{n}-way {k}-shot" for n, k in pictures.TASKS), result)}

    rows = {f"{name}, seed {seed}": row(name, seed) for name in pictures.METHODS for seed in (0, 1)}
    table = pictures.markdown(rows, seeds=2)
    assert "| nearest mean | 90.5 ± 0.7 | 90.5 ± 0.7 | 90.5 ± 0.7 | 90.5 ± 0.7 | no | 2 |" in table
    assert "| tim | 90.5 ± 0.7 | 90.5 ± 0.7 | 90.5 ± 0.7 | 90.5 ± 0.7 | yes | 2 |" in table


def test_the_tables_of_backbones_and_of_lora():
    rows = {f"{name}, seed 0": {"accuracy": 0.9, "ci95": 0.01, "parameters": 5000, "seconds": 3} for name in ("conv4",)}
    rows |= {"resnet12, seed 0": {"accuracy": 0.95, "ci95": 0.02, "parameters": 12_424_320, "seconds": 700}}
    assert "| resnet12 | 12,424,320 | 0 | 95.0 ± 2.0 % | 700 |" in backbones.markdown(rows, seeds=1)
    found = {"accuracy": 0.9, "ci95": 0.01}
    row = {"adapted": 1000, "share": 0.01, "inner_rate": 0.1, "before": found, "after": found, "seconds": 9}
    table = lora.accuracy_markdown({f"accuracy, rank {rank}, seed 0": row for rank in lora.RANKS[:2]}, seeds=1)
    assert "| MAML, all weights | 0 | 1,000 | 1.0 % | 0.1 | 90.0 ± 1.0 % | 90.0 ± 1.0 % | 9 |" in table


@pytest.mark.slow
def test_resnet12_and_conv4_train_on_the_same_tasks(monkeypatch):
    monkeypatch.setitem(backbones.NETWORKS, "resnet12", lambda: jmeta.ResNet12(None, features=(8, 8, 8, 8)))
    try:
        jmeta.omniglot()
    except jmeta.DataError as error:
        pytest.skip(str(error))
    for name in backbones.NETWORKS:
        row = backbones.measured(name, steps=2, episodes=2, seed=0)
        assert 0 <= row["accuracy"] <= 1 and row["parameters"] > 1000


@pytest.mark.slow
def test_what_is_hidden_is_told_by_an_episode(monkeypatch, tmp_path):
    monkeypatch.setattr(meta_rl, "RESULTS", tmp_path)
    monkeypatch.setitem(meta_rl.CASES, "cartpole", meta_rl.CASES["cartpole"]._replace(tasks=4, width=8))
    meta_rl.main("cartpole", steps=2, episodes=4)
    table = (tmp_path / "meta_rl_cartpole.md").read_text()
    assert all(f"| {name}, seed 0 |" in table for name in ("no adaptation", "oracle", "rl2"))
    with pytest.raises(SystemExit, match="no case 'horse'; choose navigation"):
        meta_rl.main("horse")


def test_the_table_of_pretrained_embeddings():
    def row(name, seed):
        shots = {
            str(k): {"accuracy": 0.9 + (k + seed) / 100, "transductive": name == "tim"}
            for k in pretrained.METHODS[name].shots
        }
        return {"seconds": 2.0, "ways": {"20": shots, "50": shots}}

    rows = {f"{name}, seed {seed}": row(name, seed) for name in pretrained.METHODS for seed in (0, 1)}
    table = pretrained.markdown(rows, seeds=2)
    assert "| nearest name | 90.5 ± 0.7 | – | – | 90.5 ± 0.7 | – | – | no | 2 |" in table
    assert "| fused | 90.5 ± 0.7 | 91.5 ± 0.7 | 95.5 ± 0.7 | 90.5 ± 0.7 | 91.5 ± 0.7 | 95.5 ± 0.7 | no | 2 |" in table
    assert "| tim | – | 91.5 ± 0.7 | 95.5 ± 0.7 | – | 91.5 ± 0.7 | 95.5 ± 0.7 | yes | 2 |" in table
