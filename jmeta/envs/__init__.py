"""Environments in pure JAX with gymnax's interface, and the collector of trajectories."""

from jmeta.envs import cartpole, mdp, navigation
from jmeta.envs.adapters import from_brax, from_gymnax
from jmeta.envs.bandit import bandit, gaussian_bandit
from jmeta.envs.cartpole import hidden_cartpole
from jmeta.envs.environment import Environment, check_environment, environment_tasks, flat_observation, reveal
from jmeta.envs.mdp import tabular_mdp
from jmeta.envs.navigation import point_navigation
from jmeta.envs.rollout import Previous, Trajectory, collect, mean_return, returns, rollout
from jmeta.envs.spaces import Box, Discrete, Space
