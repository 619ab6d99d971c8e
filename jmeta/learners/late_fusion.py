"""Late fusion of images and descriptions, with a weight learned on descriptions that were not learned."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jmeta.core import Adapted, Examples, Mask, MetaLearner, Model, Params, State, Task
from jmeta.distances import squared_euclidean
from jmeta.embedding import embedded
from jmeta.errors import ConfigError
from jmeta.hyperparameters import learned_number
from jmeta.kinds import is_similar, kinds_of
from jmeta.learners.prototypical import Distance, prototypes
from jmeta.learners.zero_shot import Describe, init_reader, read_descriptions
from jmeta.losses import softmax_cross_entropy
from jmeta.masks import described, only, shots


class Evidence(NamedTuple):
    """What images and descriptions each say about some queries.

    Args:
        images: `[queries, ways]`, distances to the means of the shots.
        readers: `[folds + 1, queries, ways]`, distances to what each reader makes of a description, that of all last.
        shots: `[ways]`.
        told: `[ways]`, which classes have a description.
        fold: `[ways]`, which reader does not learn the description.
        worth: β.
    """

    images: Float[Array, "queries ways"]
    readers: Float[Array, "folds queries ways"]
    shots: Float[Array, "ways"]
    told: Bool[Array, "ways"]
    fold: Int[Array, "ways"]
    worth: Float[Array, ""]


def late_fusion(
    model: Model, *, describe: Describe = None, folds: int = 4, distance: Distance = squared_euclidean
) -> MetaLearner:
    """Distances to images and to descriptions, fused: a description is worth β shots, and β is cross-fitted.

    With z = f_θ(x), cₖ the mean of z over the Kₖ shots of class k, and eₖ(x) the mean over the readers g of
    d(A z, g(description of class k)),

        dₖ(x) = (Kₖ d(z, cₖ) + β (eₖ(x) − δ(x))) / (Kₖ + β), p(y = k | x) = softmaxₖ(−dₖ(x)),

    where δ(x) is the mean of eₖ(x) − d(z, cₖ) over the classes that have both, so that classes of few, many and no
    shots are compared on one scale. Without a shot this is zero-shot learning, without a description a prototypical
    network.

    Fused are distances, not prototypes: ‖z − (λc + (1−λ)w)‖² = λ‖z − c‖² + (1−λ)‖z − w‖² − λ(1−λ)‖c − w‖², so that a
    mixture of prototypes draws queries to the classes whose images and description disagree.

    In training a class's description is known by heart, which says nothing about that of a new class. So beside one g,
    which learns all descriptions, each other gⱼ learns those of all classes but fold j, by which β alone is learned, as
    in stacking; the fold of a class is a hash of its description. If descriptions say nothing about the images of new
    classes, β falls to 0.

    The objective is a sum of cross entropies: of the images alone, of the descriptions alone by each g, and of the
    fused distances, standardised, whose gradient reaches β alone. Descriptions teach f as much as they are worth: their
    gradient reaches it times β.

    Args:
        model: the embedding f_θ, whose outputs `[n, features]` have any width.
        describe: g and each gⱼ before its last linear map; default as in `jmeta.zero_shot`.
        folds: how many gⱼ there are; each learns from all training classes but one part in so many.
        distance: d, `([queries, features], [classes, features]) -> [queries, classes]`.

    Returns:
        The learner, for any number of ways; its support has descriptions, and one model serves any number of shots,
        none included. `Adapted.params` is `(θ, means [ways, features], readings [folds + 1, ways, features], shots
        [ways], told [ways], fold [ways])`, `Adapted.info["worth"]` is β.

    Raises:
        ConfigError: fewer than two folds.
        ModelError: a model is no `Model`.
        DataError: from `init` and `fit`: the support has no descriptions.

    Example:
        >>> import jmeta
        >>> learner = jmeta.late_fusion(jmeta.linen(jmeta.Conv4(outputs=None, pooling="max")))
        >>> tasks = jmeta.glyphs(shots=(0, 5), queries=5, descriptions="attributes")

    Reference: Snell, Swersky, Zemel 2017, "Prototypical Networks for Few-shot Learning", sections 2.3 and 2.7, for the
    two distances; Wolpert 1992, "Stacked Generalization", for a weight that is learned on what its parts did not see.

    Differences from the papers: the fusion of both, the number of shots in it, and the folds by a hash are jmeta's own.
    """
    if folds < 2:
        raise ConfigError(f"folds is {folds}; give at least 2, so that each description is new to one reader.")

    def init(key: Key[Array, ""], task: Task) -> tuple[Params, State]:
        model_key, reader_key, map_key = jax.random.split(key, 3)
        params, state = model.init(model_key, task.query.inputs)
        z, _ = jax.eval_shape(lambda: model.apply(key, params, state, task.query.inputs, train=False))
        readers, reader_state = jax.vmap(lambda key: init_reader(describe, key, task.support, z.shape[-1]))(
            jax.random.split(reader_key, folds + 1)
        )
        linear = jax.nn.initializers.orthogonal()(map_key, 2 * z.shape[-1:], z.dtype)
        worth = jnp.zeros((), z.dtype)
        start = {"model": params, "map": linear, "readers": readers, "worth": worth}
        return start, {"model": state, "readers": reader_state}

    def adapt(key: Key[Array, ""], params: Params, state: State, support: Examples) -> Adapted:
        def taught(kind: Any) -> Any:
            return kind._replace(images=_scale_gradient(kind.images, _worth(params))) if is_similar(kind) else kind

        told = jax.tree.map(taught, support.descriptions, is_leaf=is_similar)

        def read(key: Array, params: Params, state: State) -> tuple[Array, State]:
            return read_descriptions(describe, key, params, state, support._replace(descriptions=told), train=True)

        w, reader_state = jax.vmap(read)(jax.random.split(key, folds + 1), params["readers"], state["readers"])
        known, fold = described(support.descriptions), fold_of(support.descriptions, folds)
        learned = (params, prototypes(support.inputs, support.targets), w, shots(support.targets), known, fold)
        return Adapted(learned, {**state, "readers": reader_state}, {"worth": _worth(params)})

    def evidence(key: Key[Array, ""], adapted: Adapted, z: Float[Array, "queries features"]) -> Evidence:
        params, means, readings, count, told, fold = adapted.params
        worth = _worth(params)
        told_z = _scale_gradient(z, worth) @ params["map"]
        readers = jax.vmap(distance, (None, 0))(told_z, readings)
        return Evidence(distance(z, means), readers, count, told, fold, worth)

    def predict(key: Key[Array, ""], adapted: Adapted, z: Float[Array, "queries features"]) -> Array:
        said = evidence(key, adapted, z)
        distances = fused(said.images, said.readers.mean(axis=0), said.shots, said.told, said.worth)
        return only((said.shots > 0) | said.told, -distances)

    training = embedded(model, init, adapt, evidence, _loss)
    return embedded(model, init, adapt, predict, softmax_cross_entropy)._replace(objective=training.objective)


def fused(
    images: Float[Array, "queries ways"],
    descriptions: Float[Array, "queries ways"],
    count: Float[Array, "ways"],
    told: Bool[Array, "ways"],
    worth: Float[Array, ""],
) -> Float[Array, "queries ways"]:
    """(Kₖ dₖ + β (eₖ − δ)) / (Kₖ + β): distances to images and to descriptions on one scale.

    Args:
        images: `[queries, ways]`, d.
        descriptions: `[queries, ways]`, e.
        count: `[ways]`, K; a class without a shot goes by its description alone.
        told: `[ways]`, which classes have a description; one that has none goes by its images alone.
        worth: β, how many shots a description is worth.

    Returns:
        `[queries, ways]`; δ, for each query, is the mean of e − d over the classes that have both, 0 if none has.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.learners.late_fusion import fused
        >>> d, e, both = jnp.asarray([[1.0, 3.0]]), jnp.asarray([[4.0, 8.0]]), jnp.asarray([True, True])
        >>> fused(d, e, jnp.asarray([1.0, 3.0]), both, jnp.asarray(1.0)).tolist()
        [[0.5, 3.25]]
    """
    seen = count > 0
    both = (seen & told).astype(images.dtype)
    offset = (descriptions - images) @ both / jnp.maximum(both.sum(), 1.0)
    pseudo = jnp.where(told, worth, 0.0)
    share = jnp.where(seen, count / jnp.where(seen, count + pseudo, 1.0), 0.0)[None]
    return share * images + (1.0 - share) * (descriptions - offset[:, None])


def standardised(distances: Float[Array, "queries ways"], known: Bool[Array, "ways"]) -> Float[Array, "queries ways"]:
    """Distances from their mean over the known classes, in units of their root mean square over all queries.

    The cross entropy of them asks how well distances tell classes apart and not how large they are: training classes
    are told apart by their images with a loss of nearly 0, which would leave no gradient.

    Args:
        distances: `[queries, ways]`.
        known: `[ways]`.

    Returns:
        `[queries, ways]`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jmeta.learners.late_fusion import standardised
        >>> standardised(jnp.asarray([[5.0, 9.0], [8.0, 4.0]]), jnp.asarray([True, True])).tolist()
        [[-1.0, 1.0], [1.0, -1.0]]
    """
    mask = known.astype(distances.dtype)
    centred = (distances - (distances @ mask / jnp.maximum(mask.sum(), 1.0))[:, None]) * mask[None]
    square = jnp.square(centred).sum() / jnp.maximum(mask.sum() * len(distances), 1.0)
    return centred / jnp.sqrt(square + jnp.finfo(distances.dtype).tiny ** 0.5)


def fold_of(descriptions: PyTree, folds: int) -> Int[Array, "ways"]:
    """A number below `folds` for each description, the same for the same description: `[ways, ...] -> [ways]`."""
    kinds = kinds_of(descriptions) or {"": descriptions}
    # of similar classes which they are: their images are drawn anew, and embedded by what is learned
    leaves = [kind.of if is_similar(kind) else jax.tree.leaves(kind)[0] for _, kind in sorted(kinds.items())]
    x = jnp.concatenate([leaf.reshape(len(leaf), -1).astype(jnp.float32) for leaf in leaves], axis=1)
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.uint32)  # of the two zeros one remains
    odd = np.random.default_rng(0).integers(2**31, size=x.shape[1], dtype=np.uint32) * 2 + 1
    mixed = (bits ^ (bits >> 16)) * jnp.asarray(odd)[None]
    total = (mixed ^ (mixed >> 15)).sum(axis=1, dtype=jnp.uint32) * jnp.uint32(0x9E3779B1)
    return ((total >> 16) % folds).astype(jnp.int32)


def _worth(params: Params) -> Float[Array, ""]:
    return learned_number(1.0, params["worth"])


def _scale_gradient(x: Float[Array, "..."], scale: Float[Array, ""]) -> Float[Array, "..."]:
    """x, whose gradient comes back times the scale."""
    constant, scale = jax.lax.stop_gradient((x, scale))
    return constant + scale * (x - constant)


def _loss(said: Evidence, targets: Float[Array, "queries ways"], mask: Mask = None) -> Float[Array, ""]:
    seen, told = said.shots > 0, said.told
    targets = targets if mask is None else targets * mask[:, None].astype(targets.dtype)

    def cross_entropy(known: Bool[Array, "ways"], distances: Float[Array, "queries ways"]) -> Float[Array, ""]:
        return softmax_cross_entropy(only(known, -distances), targets * known[None].astype(targets.dtype))

    learns = told[None] & (said.fold[None] != jnp.arange(len(said.readers))[:, None])
    new = jnp.take_along_axis(said.readers, said.fold[None, None], axis=0)[0]
    images, new = jax.lax.stop_gradient((said.images, new))
    both = seen & told
    together = cross_entropy(both, standardised(fused(images, new, said.shots, told, said.worth), both))
    return cross_entropy(seen, said.images) + jax.vmap(cross_entropy)(learns, said.readers).sum() + together
