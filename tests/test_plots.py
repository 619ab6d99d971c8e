"""The pictures draw what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from jmeta.rl import bandit, collect, point_navigation
from jmeta.runs import pictures

KEY = jax.random.key(0)


@pytest.fixture
def figure(monkeypatch):
    """The figure that is drawn upon."""
    drawn = Figure()
    monkeypatch.setattr(pictures, "_figure", lambda width, height: drawn)
    return drawn


def episodes(source, output):
    """Environments of two tasks, and two lots of seven episodes in each, of one policy."""
    tasks = jax.vmap(source.sample, (0, None))(jax.random.split(KEY, 2), source.data).support

    def act(carry, observation, previous):
        return carry, jnp.full(tasks.actions.outputs, output)

    before, after = (
        jax.vmap(lambda key, environment: collect(key, environment, act, 7))(jax.random.split(key, 2), tasks)
        for key in jax.random.split(KEY)
    )
    return tasks, before, after


def test_trajectories_in_the_plane_are_paths_to_a_star(figure, tmp_path):
    tasks, before, after = episodes(point_navigation(horizon=6), -2.0)
    pictures.trajectories(tmp_path / "paths.png", tasks, before, after)
    assert (tmp_path / "paths.png").read_bytes().startswith(b"\x89PNG")
    assert len(figure.axes) == 4
    axes = figure.axes[3]  # after, of the second task
    *paths, start, goal = axes.lines
    assert len(paths) == 5
    np.testing.assert_allclose(paths[2].get_xydata(), after.observations[1, 2], rtol=1e-6)
    np.testing.assert_array_equal(start.get_xydata(), [[0.0, 0.0]])
    np.testing.assert_allclose(goal.get_xydata()[0], tasks.params[1], rtol=1e-6)
    assert axes.get_title() == f"after adaptation, return {after.rewards[1].sum(axis=1).mean():.1f}"


def test_paths_end_with_their_episodes(figure, tmp_path):
    tasks, before, after = episodes(point_navigation(horizon=6), -2.0)
    before = before._replace(alive=before.alive.at[..., 3:].set(False))
    pictures.trajectories(tmp_path / "paths.png", tasks, before, after)
    assert [len(line.get_xydata()) for line in figure.axes[0].lines[:5]] == [3] * 5


def test_trajectories_elsewhere_are_rewards(figure, tmp_path):
    tasks, before, after = episodes(bandit(arms=3, pulls=4), 0.0)
    pictures.trajectories(tmp_path / "rewards.png", tasks, before, after)
    for axes, drawn in zip(figure.axes, (before.rewards[0], before.rewards[1], *after.rewards), strict=True):
        np.testing.assert_allclose(axes.lines[0].get_ydata(), drawn.mean(axis=0), rtol=1e-6)
