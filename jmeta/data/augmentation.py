"""Images of tasks turned, shifted, zoomed and bent at random, on the device."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, Key, PyTree

from jmeta.core import Task, TaskSource
from jmeta.errors import ConfigError, DataError


def augmentation(
    *, rotation: float = 0.0, shift: float = 0.0, zoom: float = 0.0, elastic: float = 0.0, coarse: int = 4
) -> Callable[[Key[Array, ""], Array], Array]:
    """A transformation that images of the same classes may have undergone, drawn for each image.

    The pixel at p is that of the image at A (p − c) + c + t + d(p), with the middle c; A turns by an angle and zooms by
    a factor, t shifts, and d bends: normal draws on a grid of `coarse` by `coarse` points, and between them in
    proportion. Values between pixels are bilinear; those beyond the margin are the nearest of it.

    Args:
        rotation: greatest angle, degrees to either side.
        shift: greatest shift along each axis, pixels.
        zoom: greatest change of size, a share: 0.1 is from 1 / 1.1 to 1.1.
        elastic: standard deviation of d, pixels.
        coarse: points of the grid along each axis.

    Returns:
        `(key, images [n, height, width, channels]) -> images`, for `transform=` of `jmeta.from_arrays` and others, and
        for `jmeta.augmented`.

    Raises:
        ConfigError: a negative number, or fewer than 2 points.

    Example:
        >>> import jax, jax.numpy as jnp, jmeta
        >>> turn = jmeta.augmentation(rotation=15.0, shift=2.0)
        >>> turn(jax.random.key(0), jnp.ones((3, 28, 28, 1))).shape
        (3, 28, 28, 1)

    Reference: Simard, Steinkraus, Platt 2003, "Best Practices for Convolutional Neural Networks", section 2.
    """
    for name, value in {"rotation": rotation, "shift": shift, "zoom": zoom, "elastic": elastic}.items():
        if not value >= 0:
            raise ConfigError(f"{name} is {value}; give 0 or more.")
    if coarse < 2:
        raise ConfigError(f"coarse is {coarse}; give at least 2 points.")

    def one(key: Key[Array, ""], image: Float[Array, "height width channels"]) -> Float[Array, "height width channels"]:
        height, width, _ = image.shape
        keys = jax.random.split(key, 4)
        angle = math.radians(rotation) * jax.random.uniform(keys[0], (), minval=-1.0, maxval=1.0)
        size = (1.0 + zoom) ** jax.random.uniform(keys[1], (), minval=-1.0, maxval=1.0)
        moved = shift * jax.random.uniform(keys[2], (2, 1, 1), minval=-1.0, maxval=1.0)
        bent = elastic * jax.random.normal(keys[3], (2, coarse, coarse))
        bent = jax.image.resize(bent, (2, height, width), "linear")
        sin, cos = size * jnp.sin(angle), size * jnp.cos(angle)
        turn = jnp.stack([jnp.stack([cos, -sin]), jnp.stack([sin, cos])])
        middle = jnp.asarray([(height - 1) / 2, (width - 1) / 2])[:, None, None]
        pixels = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")).astype(jnp.float32)
        places = jnp.einsum("ij,jhw->ihw", turn, pixels - middle) + middle + moved + bent
        of_channel = jax.vmap(lambda x: map_coordinates(x, list(places), 1, mode="nearest"), -1, -1)
        return of_channel(image).astype(image.dtype)

    def transform(key: Key[Array, ""], images: Array) -> Array:
        return jax.vmap(one)(jax.random.split(key, len(images)), images)

    return transform


def augmented(source: TaskSource, transform: Callable[[Key[Array, ""], Array], Array]) -> TaskSource:
    """The tasks of any source of images with every image transformed by a draw of its own, for training.

    Args:
        source: of `jmeta.omniglot`, `jmeta.benchmark`, a folder, or any other whose inputs are images.
        transform: `(key, images [n, height, width, channels]) -> images`, as `jmeta.augmentation` makes.

    Returns:
        A source, drawn and transformed inside of the compiled step; its protocol says `augmented`.

    Raises:
        DataError: the inputs are no images.

    Example:
        >>> import jmeta
        >>> source = jmeta.augmented(jmeta.glyphs(ways=5, shots=1), jmeta.augmentation(rotation=10.0))
        >>> source.protocol["augmented"]
        True
    """

    def sample(key: Key[Array, ""], data: PyTree) -> Task:
        task_key, support_key, query_key = jax.random.split(key, 3)
        task = source.sample(task_key, data)
        support = task.support._replace(inputs=transform(support_key, task.support.inputs))
        return Task(support, task.query._replace(inputs=transform(query_key, task.query.inputs)))

    inputs = jax.eval_shape(source.sample, jax.random.key(0), source.data).query.inputs
    if getattr(inputs, "ndim", 0) != 4:
        shape = list(getattr(inputs, "shape", ()))
        raise DataError(f"inputs have shape {shape}; images are [n, height, width, channels].")
    return source._replace(sample=sample, protocol={**source.protocol, "augmented": True})
