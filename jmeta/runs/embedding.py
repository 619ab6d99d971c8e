"""Embeddings of data of one's own, once and for all: into a file that a kill leaves with all that was done."""

import hashlib
import inspect
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PyTree

from jmeta.data.labelled import Labelled
from jmeta.embedding import embed
from jmeta.errors import CheckpointError, ConfigError
from jmeta.files import write_whole
from jmeta.inputs import as_inputs
from jmeta.models.sentences import sentence_encoder
from jmeta.models.weights import Matched, match
from jmeta.runs.own import model_entry
from jmeta.runs.run import read_config
from jmeta.runs.settings import options_of
from jmeta.runs.start import weights_of

Rows = Float[np.ndarray, "n features"]


class Embedder(NamedTuple):
    """A network that reads rows, and what tells it from others.

    Args:
        rows: inputs to embeddings.
        digest: of the weights.
        text: whether it reads texts, and so the names of classes as well.
        matched: which leaves have the weights of a file.
    """

    rows: Callable[[Any], Rows]
    digest: str
    text: bool
    matched: Matched | None = None


def is_encoder(model: str) -> bool:
    """Whether the name of a network is a folder of sentence-transformers."""
    folder = Path(model).expanduser()
    return (folder / "config.json").exists() and not (folder / "metrics.jsonl").exists()


def encoder_of(model: str, batch: int) -> Embedder:
    """An encoder of sentences, by its folder."""
    encoder = sentence_encoder(model)
    return Embedder(lambda texts: encoder(texts, batch=batch), _digest(encoder.params), True)


def network_of(model: str | None, place: str | None, network: Mapping[str, Any], inputs: Any, batch: int) -> Embedder:
    """A network without a head, with the weights of a run or of a file.

    Args:
        model: its name, as of `jmeta train --model`; None for that of the run.
        place: the run, or the file.
        network: options of the network, beside those of the run.
        inputs: `[n, ...]`.
        batch: how many at a time.

    Returns:
        The embedder.

    Raises:
        ConfigError: neither model nor run, or a network without weights.
        ModelError: weights that are of another network or that miss some of its leaves.
        CheckpointError: a run or a file that cannot be read.
    """
    if place is None:
        raise ConfigError(
            "there are no weights to embed by; give a run or a file by --from, or an encoder of sentences."
        )
    options: dict[str, Any] = {}
    if model is None:
        if not Path(place).expanduser().is_dir():
            raise ConfigError(f"{place} does not tell the network; name it by --model, one of `jmeta list`.")
        config = read_config(Path(place).expanduser())
        model, options = config.model, {**config.arguments("model", "test"), **config.network}
    entry = model_entry(model)
    options |= options_of("network", model, entry.make, network)
    if "outputs" in inspect.signature(entry.make).parameters:
        options["outputs"] = None
    made = entry.adapter(entry.make(**options))
    first = jnp.asarray(as_inputs(inputs[:1]))
    like = jax.eval_shape(made.init, jax.random.key(0), first)
    (params, state), matched = match(weights_of(place), like, {"_fc": None, "head": None}, source=place)
    if not matched.whole:
        raise ConfigError(f"{place} has no weights for all of {model}: {matched}; name another --model, or --network.")
    return Embedder(lambda x: embed(made, params, state, x, batch=batch), _digest((params, state)), False, matched)


def embed_file(
    out: Path,
    found: Labelled,
    embedder: Embedder,
    about: Mapping[str, Any],
    *,
    batch: int,
    advance: Callable[[int], None],
) -> Mapping[str, Any]:
    """Embeds rows into a file; one that was killed goes on where it was.

    Args:
        out: an `.npz`, with `x`, `y`, `split` where the data is divided, and `descriptions` by an encoder of sentences.
        found: the rows.
        embedder: what reads them.
        about: what to keep of where they are from.
        batch: rows at a time.
        advance: is told how many rows are done.

    Returns:
        What the file says of itself.

    Raises:
        CheckpointError: the file is there, of other rows or another network.
    """
    about = {
        **about,
        "rows": len(found.labels),
        "data_sha256": _digest(found.inputs),
        "weights_sha256": embedder.digest,
    }
    if out.exists():
        if _about(out) != about:
            raise CheckpointError(f"{out} exists, of other data or another network; choose another --out.")
        advance(len(found.labels))
        return about
    part = out.with_name(f"{out.name}.rows")
    x = _rows(part, about, found.inputs, embedder, batch, advance)
    arrays: dict[str, Any] = {"x": x, "y": np.asarray(found.names)[found.labels], "about": json.dumps(about)}
    if found.division:
        split_of = {name: split for split, names in found.division.items() for name in names}
        arrays["split"] = np.asarray([split_of[found.names[label]] for label in found.labels])
    if embedder.text:
        names = [found.names[i] for i in np.argsort(np.asarray(found.names))]  # as y is sorted
        arrays["descriptions"] = embedder.rows([name.replace("_", " ") for name in names])
    elif found.descriptions is not None:
        arrays["descriptions"] = np.asarray(found.descriptions)
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    write_whole(out, stream.getvalue())
    part.unlink()
    return about


def _rows(
    part: Path, about: Mapping[str, Any], inputs: Any, embedder: Embedder, batch: int, advance: Callable[[int], None]
) -> Rows:
    """All rows, of which a file keeps those that are done: a line of JSON, then their bytes."""
    n, parts = len(inputs), [*_done(part, about)]
    done = sum(map(len, parts))
    advance(done)
    with part.open("ab") as stream:
        for start in range(done, n, batch):
            z = np.asarray(embedder.rows(inputs[start : start + batch]), np.float32)
            if stream.tell() == 0:
                stream.write(json.dumps({**about, "features": z.shape[1]}).encode() + b"\n")
            stream.write(z.tobytes())
            stream.flush()
            parts.append(z)
            advance(start + len(z))
    return np.concatenate(parts)


def _done(part: Path, about: Mapping[str, Any]) -> Sequence[Rows]:
    """The rows of an earlier call that was killed; a file of other rows, or damaged, begins anew."""
    try:
        line, _, content = part.read_bytes().partition(b"\n")
        told = json.loads(line)
        width = told.pop("features")
        if told != about:
            raise ValueError("of other data")
        z = np.frombuffer(content[: len(content) // (4 * width) * 4 * width], np.float32).reshape(-1, width)
        part.write_bytes(line + b"\n" + z.tobytes())  # without a row that was cut
        return [z]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, AttributeError, TypeError):
        part.unlink()
        return []


def _about(file: Path) -> Any:
    try:
        with np.load(file, allow_pickle=False) as stored:
            return json.loads(str(stored["about"]))
    except Exception:  # a file of anything else
        return None


def _digest(tree: PyTree) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(leaf.encode() + b"\0" if isinstance(leaf, str) else np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
