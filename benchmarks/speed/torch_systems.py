"""The contestants on PyTorch: higher, torchopt, torch.func, and PyTorch alone.

Each takes a case and returns a function that does some meta-steps and returns their losses. All share one functional
network `(params, x) -> outputs`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from flax.traverse_util import flatten_dict
from torch import Tensor, nn

import jmeta
from benchmarks.machine import threads
from benchmarks.speed.cases import EPSILON, Case, batch, draw, weights

Step = Callable[[], np.ndarray]
Params = Mapping[str, Tensor]
Forward = Callable[[Params, Tensor], Tensor]
Tasks = tuple[Tensor, Tensor, Tensor, Tensor]  # support, its labels, query, its labels


def native_batch_norm(x: Tensor, shift: Tensor) -> Tensor:
    """PyTorch's own, with a constant scale, as it has no second derivative without one."""
    return F.batch_norm(x, None, None, torch.ones_like(shift), shift, training=True, eps=1e-3)


def primitive_batch_norm(x: Tensor, shift: Tensor) -> Tensor:
    """From primitives: `torch.func.vmap` of the second derivative of PyTorch's own is wrong (pytorch/functorch#534)."""
    centred = x - x.mean((0, 2, 3), keepdim=True)
    factor = torch.rsqrt(centred.square().mean((0, 2, 3), keepdim=True) + 1e-3)
    return centred * factor + shift[:, None, None]


def conv4(params: Params, x: Tensor, *, pool: bool, norm: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`jmeta.Conv4` on `[n, channels, height, width]`; the embedding if `params` has no head."""
    for i in range(4):
        # SAME padding of stride 2 is (0, 1) for an even size and (1, 1) for an odd one.
        even = not pool and x.shape[-1] % 2 == 0
        x = F.pad(x, (0, 1, 0, 1)) if even else x
        x = F.conv2d(x, params[f"Conv_{i}_kernel"], stride=1 if pool else 2, padding=0 if even else 1)
        x = norm(x, params[f"BatchNorm_{i}_bias"])
        x = F.relu(F.max_pool2d(x, 2) if pool else x)
    x = x.flatten(1) if pool else x.mean((2, 3))
    return F.linear(x, params["head_kernel"], params["head_bias"]) if "head_kernel" in params else x


def mlp(params: Params, x: Tensor) -> Tensor:
    """`jmeta.MLP` with two hidden layers."""
    for layer in ("Dense_0", "Dense_1"):
        x = F.relu(F.linear(x, params[f"{layer}_kernel"], params[f"{layer}_bias"]))
    return F.linear(x, params["head_kernel"], params["head_bias"])


def run_higher(case: Case) -> Step:
    """`higher`, one task after the other, as in its examples."""
    import higher

    network = Network(_forward(case), _params(case))
    inner = torch.optim.SGD(network.parameters(), lr=case.inner_rate)
    loss_of = _loss(case)

    def gradient(*tasks: Tensor) -> float:
        total = 0.0
        for support, labels, query, query_labels in zip(*tasks, strict=True):
            with higher.innerloop_ctx(
                network, inner, copy_initial_weights=False, track_higher_grads=not case.first_order
            ) as (adapted, optimizer):
                for _ in range(case.inner_steps):
                    optimizer.step(loss_of(adapted(support), labels))
                loss = loss_of(adapted(query), query_labels) / case.tasks
                if case.first_order:
                    _accumulate(network.parameters(), torch.autograd.grad(loss, list(adapted.parameters())))
                else:
                    loss.backward()
                total += loss.item()
        return total

    return _train(case, list(network.parameters()), gradient)


class Network(nn.Module):
    """A functional network as a module.

    Args:
        function: `(params, x) -> outputs`.
        params: the initial weights by name.
    """

    def __init__(self, function: Forward, params: Params) -> None:
        super().__init__()
        self.function, self.names = function, tuple(params)
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(value.detach()))

    def forward(self, x: Tensor) -> Tensor:
        return self.function({name: getattr(self, name) for name in self.names}, x)


def run_torchopt(case: Case) -> Step:
    """`torchopt`'s functional SGD, one task after the other."""
    import torchopt

    params, forward, loss_of = _params(case), _forward(case), _loss(case)
    optimizer = torchopt.sgd(lr=case.inner_rate)

    def gradient(*tasks: Tensor) -> float:
        total = 0.0
        for support, labels, query, query_labels in zip(*tasks, strict=True):
            adapted, state = params, optimizer.init(params)
            for _ in range(case.inner_steps):
                loss = loss_of(forward(adapted, support), labels)
                # Without a graph the updates are constants, and the outer gradient is first order.
                values = torch.autograd.grad(loss, list(adapted.values()), create_graph=not case.first_order)
                updates, state = optimizer.update(dict(zip(adapted, values, strict=True)), state, inplace=False)
                adapted = torchopt.apply_updates(adapted, updates, inplace=False)
            loss = loss_of(forward(adapted, query), query_labels) / case.tasks
            loss.backward()
            total += loss.item()
        return total

    return _train(case, list(params.values()), gradient)


def run_torch_func(case: Case) -> Step:
    """`torch.func.vmap` over all tasks with `torch.func.grad` inside."""
    params, forward, loss_of = _params(case), _forward(case, primitive_batch_norm), _loss(case)

    def one_task(params: Params, support: Tensor, labels: Tensor, query: Tensor, query_labels: Tensor) -> Tensor:
        def inner_loss(params: Params) -> Tensor:
            return loss_of(forward(params, support), labels)

        for _ in range(case.inner_steps):
            slopes = torch.func.grad(inner_loss)(params)
            slopes = {name: g.detach() for name, g in slopes.items()} if case.first_order else slopes
            params = {name: p - case.inner_rate * slopes[name] for name, p in params.items()}
        return loss_of(forward(params, query), query_labels)

    def objective(params: Params, *tasks: Tensor) -> Tensor:
        return torch.func.vmap(one_task, in_dims=(None, 0, 0, 0, 0))(params, *tasks).mean()

    value_and_grad = torch.func.grad_and_value(objective)

    def gradient(*tasks: Tensor) -> float:
        slopes, loss = value_and_grad(params, *tasks)
        _accumulate(params.values(), slopes.values())
        return loss.item()

    return _train(case, list(params.values()), gradient)


def run_prototypical(case: Case) -> Step:
    """A prototypical network in plain PyTorch; support and queries each by their own batch statistics."""
    params, forward = _params(case), _forward(case)

    def gradient(*tasks: Tensor) -> float:
        total = 0.0
        for support, _, query, labels in zip(*tasks, strict=True):
            classes = forward(params, support).unflatten(0, (case.ways, case.shots)).mean(1)
            z = forward(params, query)
            distances = z.square().sum(1, keepdim=True) - 2 * z @ classes.T + classes.square().sum(1)
            loss = F.cross_entropy(-distances, labels) / case.tasks
            loss.backward()
            total += loss.item()
        return total

    return _train(case, list(params.values()), gradient)


def _train(case: Case, params: list[Tensor], gradient: Callable[..., float]) -> Step:
    """The outer loop: `gradient` adds to `.grad` and returns the loss."""
    torch.set_num_threads(threads())
    optimizer = torch.optim.Adam(params, lr=case.rate, eps=EPSILON)
    fixed, random = _tensors(case, batch(replace(case, source="fixed"))), np.random.default_rng(0)

    def meta_step() -> float:
        optimizer.zero_grad()
        loss = gradient(*(fixed if case.source == "fixed" else _tensors(case, draw(case, random))))
        optimizer.step()
        return loss

    return lambda: np.array([meta_step() for _ in range(case.steps)])


def _accumulate(params: Any, slopes: Any) -> None:
    for p, g in zip(params, slopes, strict=True):
        p.grad = g if p.grad is None else p.grad + g


def _forward(case: Case, norm: Callable[[Tensor, Tensor], Tensor] = native_batch_norm) -> Forward:
    return mlp if case.network == "mlp" else partial(conv4, pool=case.network == "conv4-max", norm=norm)


def _loss(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    return F.mse_loss if case.network == "mlp" else F.cross_entropy


def _params(case: Case) -> dict[str, Tensor]:
    def leaf(array: Any) -> Tensor:
        order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim]
        return torch.from_numpy(np.asarray(array).transpose(order).copy()).requires_grad_()

    return {name: leaf(array) for name, array in flatten_dict(weights(replace(case, source="fixed")), sep="_").items()}


def _tensors(case: Case, tasks: jmeta.Task) -> Tasks:
    def examples(part: jmeta.Examples) -> tuple[Tensor, Tensor]:
        if case.network == "mlp":
            return torch.from_numpy(part.inputs), torch.from_numpy(part.targets)
        return torch.from_numpy(np.moveaxis(part.inputs, -1, -3)), torch.from_numpy(part.targets.argmax(-1))

    return (*examples(tasks.support), *examples(tasks.query))
