"""A meta-trained policy that adapts to an environment."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from jmeta.compilation import compiled
from jmeta.core import Adapted, MetaLearner, Params, State
from jmeta.errors import DataError, NotFittedError
from jmeta.estimators.base import adapt
from jmeta.rl.environment import Environment, check_environment
from jmeta.rl.rollout import Trajectory, returns
from jmeta.tree import leaf_shapes


class FewShotPolicy:
    """A meta-trained policy in the manner of scikit-learn: `fit` acts in an environment to adapt to it.

    Args:
        learner: a meta-learner that acts, as `jmeta.maml_rl` and `jmeta.rl2`.
        params: θ, as `jmeta.fit` gives.
        state: the learner's state.
        like: an environment of training, whose actions and observations those of others must have. Default: unknown.
        seed: of the episodes of adaptation.

    Example:
        >>> import jax, jmeta
        >>> from jmeta.rl import Policy, navigation, point_navigation
        >>> source = point_navigation(horizon=10)
        >>> learner = jmeta.maml_rl(jmeta.linen(Policy(navigation.environment().actions)), trajectories=5)
        >>> fitted = jmeta.fit(jax.random.key(0), learner, source, steps=2, tasks=2)
        >>> policy = jmeta.FewShotPolicy(learner, fitted.params, fitted.state)
        >>> room = navigation.environment(jax.numpy.asarray([0.1, 0.2]), horizon=10)
        >>> policy.fit(room).episodes(3).rewards.shape
        (3, 10)
    """

    def __init__(
        self, learner: MetaLearner, params: Params, state: State, *, like: Environment | None = None, seed: int = 0
    ) -> None:
        self.learner, self.params, self.state, self.like, self.seed = learner, params, state, like, seed

    def fit(self, environment: Environment) -> "FewShotPolicy":
        """Adapts to an environment by episodes of its own, as many as in training.

        Args:
            environment: with the parameters of the task; of gymnasium by `jmeta.rl.from_gymnasium`.

        Returns:
            This policy.

        Raises:
            DataError: its actions or observations are others than in training, or it breaks the contract of an
                `Environment`.
        """
        if self.like is not None:
            _check_alike(environment, self.like)
        check_environment(environment, lambda key: environment.params)
        key = jax.random.key(self.seed)
        self.environment_ = environment
        self.adapted_ = compiled(adapt)(key, self.params, self.state, environment, learner=self.learner)
        return self

    def episodes(self, n: int = 20, *, seed: int | None = None) -> Trajectory:
        """Acts as adapted.

        Args:
            n: episodes.
            seed: of these; default one more than that of adaptation.

        Returns:
            `[n, horizon]`.

        Raises:
            NotFittedError: before `fit`.
        """
        if not hasattr(self, "adapted_"):
            raise NotFittedError("this policy is not adapted; call fit(environment) first.")
        key = jax.random.key(self.seed + 1 if seed is None else seed)
        many = jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *jnp.shape(x))), self.environment_.params)
        environments = self.environment_.with_params(many)
        answers: Trajectory = compiled(_act)(key, self.adapted_, environments, learner=self.learner)
        return answers

    def score(self, n: int = 20, *, seed: int | None = None) -> float:
        """The mean return of `episodes`."""
        return float(np.mean(returns(self.episodes(n, seed=seed))))


def _act(key: Key[Array, ""], adapted: Adapted, environments: Environment, *, learner: MetaLearner) -> PyTree:
    return learner.predict(key, adapted, environments)


def _check_alike(environment: Environment, like: Environment) -> None:
    if environment.actions != like.actions:
        raise DataError(f"the environment takes {environment.actions}, and the policy gives {like.actions}; map them.")
    here, there = _observations(environment), _observations(like)
    if here != there:
        raise DataError(f"the environment shows {here}, and the policy reads {there}; bring it to that.")


def _observations(environment: Environment) -> dict[str, str]:
    seen = jax.eval_shape(lambda params: environment.reset(jax.random.key(0), params)[0], environment.params)
    return {path or "observations": shape for path, shape in leaf_shapes(seen).items()}
