"""Meta-reinforcement learning: environments in pure JAX with gymnax's interface, trajectories, policies, learners."""

from jmeta.rl import cartpole, mdp, navigation, robots
from jmeta.rl.adapters import from_brax, from_gymnax, from_navix, from_xland
from jmeta.rl.bandit import bandit, gaussian_bandit
from jmeta.rl.cartpole import hidden_cartpole
from jmeta.rl.environment import Environment, check_environment, environment_tasks, flat_observation, reveal
from jmeta.rl.host import from_gymnasium
from jmeta.rl.mdp import tabular_mdp
from jmeta.rl.navigation import point_navigation
from jmeta.rl.policies import Policy, RecurrentPolicy
from jmeta.rl.robots import ant_direction, ant_velocity, cheetah_direction, cheetah_velocity, walker_body
from jmeta.rl.rollout import Previous, Trajectory, collect, mean_return, returns, rollout
from jmeta.rl.spaces import Box, Discrete, Space
