"""How many queries each class of an episode has, where that is not the same number."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from jmeta.errors import DataError


def apportioned(
    key: Key[Array, ""],
    concentration: float,
    room: Int[Array, "ways"],
    there: Bool[Array, "ways"],
    queries: int,
    most: int,
) -> tuple[Int[Array, "queries"], Bool[Array, "queries"]]:
    """Queries of classes whose shares are drawn from a Dirichlet distribution.

    The number of queries of an episode stays as it is; each class has about its share of them, by the method of
    Sainte-Laguë, and never more than there is room for.

    Args:
        key: draws the shares.
        concentration: of the distribution, the same for each class.
        room: `[ways]`, how many queries a class can have.
        there: `[ways]`, which classes there are; the others have none.
        queries: a class, in the mean.
        most: how many queries of a class to look at; no class has more.

    Returns:
        `[ways * queries]`, numbers from 0 to `ways * most - 1`, class by class: the first queries of the first class,
        and so on; and which of them there are, fewer than all where classes are missing.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jmeta.data.queries import apportioned
        >>> room, there = jnp.asarray([9, 1]), jnp.ones(2, bool)
        >>> apportioned(jax.random.key(0), 2.0, room, there, 3, 9)[0].tolist()  # the second class has room for one
        [0, 1, 2, 3, 4, 9]

    Reference: Veilleux, Boudiaf, Piantanida, Ben Ayed 2021, "Realistic Evaluation of Transductive Few-Shot Learning",
    section 3, https://arxiv.org/abs/2204.11181.
    """
    ways, total = len(room), len(room) * queries
    log_share = jax.random.loggamma(key, concentration, (ways,))  # but for their sum
    place = jnp.arange(most, dtype=room.dtype)[None]
    turn = jnp.log(place.astype(log_share.dtype) + 0.5) - log_share[:, None]
    turn = jnp.where((place < room[:, None]) & there[:, None], turn, jnp.inf).reshape(-1)
    soonest, slot = jax.lax.top_k(-turn, total)
    wanted = jnp.arange(total) < there.sum() * queries
    slot = jnp.sort(jnp.where(wanted & jnp.isfinite(soonest), slot, ways * most))
    return jnp.minimum(slot, ways * most - 1), slot < ways * most


def check_balance(query_balance: float | None, least: int, most: int) -> None:
    """Raises `DataError` unless it is a positive number, and the number of queries one and no range."""
    if query_balance is None:
        return
    if isinstance(query_balance, bool) or not isinstance(query_balance, int | float) or not 0 < query_balance < np.inf:
        raise DataError(f"query_balance is {query_balance}; give a positive concentration, as 2.0, or None.")
    if least < most:
        raise DataError(f"queries is ({least}, {most}), and query_balance divides a fixed number; give one number.")
