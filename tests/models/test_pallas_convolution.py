from contextlib import nullcontext
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import jmeta
from jmeta.models import lowerings, pallas_convolution
from jmeta.models.convolution import Window, conv_general_dilated

pallas = partial(conv_general_dilated, lowering="pallas")

# name: images, spatial size, kernel, channels, features, strides, padding
CASES = {
    "28, stride 1": (1, (28, 28), (3, 3), 4, 16, (1, 1), "SAME"),
    "28, stride 2": (1, (28, 28), (3, 3), 4, 16, (2, 2), "SAME"),
    "14, stride 2": (2, (14, 14), (3, 3), 16, 16, (2, 2), "SAME"),
    "7, stride 2": (3, (7, 7), (3, 3), 40, 24, (2, 2), "SAME"),
    "4, stride 2": (2, (4, 4), (3, 3), 70, 65, (2, 2), "SAME"),
    "odd, VALID": (2, (9, 5), (3, 3), 5, 3, (1, 1), "VALID"),
    "uneven": (2, (7, 8), (2, 5), 4, 3, (3, 2), ((5, 4), (0, 6))),
    "one, stride 2": (2, (5, 6), (1, 1), 40, 3, (2, 2), "VALID"),
}


def normal(seed, shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_close(ours, theirs, tolerance):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def fails(*_, **__):
    raise AssertionError("the kernels do not fit")


@pytest.mark.parametrize(
    ("case", "dtype"), [*product(CASES, ["float32"]), ("7, stride 2", "bfloat16"), ("odd, VALID", "bfloat16")]
)
def test_the_kernels_agree_with_the_loop(case, dtype):
    n, inputs, kernel, channels, features, strides, padding = CASES[case]
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(inputs, kernel, strides, padding)
    window = Window(inputs, kernel, strides, tuple(padding), (1, 1), "highest")
    x, w = normal(0, (2, n, *inputs, channels), dtype), normal(1, (2, *kernel, channels, features), dtype)
    g = normal(2, (2, n, *window.outputs, features), dtype)
    operands = {"conv": (x, w), "input_gradient": (g, w), "weight_gradient": (x, g)}
    primitives = "task_conv", "task_conv_input_gradient", "task_conv_weight_gradient"

    @jax.jit
    def run():
        ours = [
            pallas_convolution.apply(p, *operands[o], window, True, fails)
            for p, o in zip(primitives, operands, strict=True)
        ]
        theirs = [getattr(lowerings, f"{o}_loop")(*ab, window=window) for o, ab in operands.items()]
        return ours, theirs

    ours, theirs = run()
    assert {a.dtype.name for a in ours} == {dtype}
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, 1e-6 if dtype == "float32" else 1e-2)


def adapted(conv, strides):
    """Of each task, the loss after a step of gradient descent and its gradient: second derivatives of both."""

    def loss(w, x):
        return (conv(jnp.tanh(conv(x, w, strides, "SAME")), w, (1, 1), "SAME") ** 2).mean()

    def after(w, x):
        return loss(w - jax.grad(loss)(w, x), x)

    return jax.vmap(jax.value_and_grad(after, argnums=(0, 1)), (None, 0))


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)], ids=str)
def test_second_derivatives_of_tasks_are_those_of_the_default(strides):
    w, x = normal(0, (3, 3, 5, 5)), normal(1, (2, 2, 6, 5, 5))
    with jax.default_matmul_precision("highest"):
        ours, theirs = jax.jit(lambda: [adapted(conv, strides)(w, x) for conv in (pallas, conv_general_dilated)])()
    assert_close(ours, theirs, 1e-5)


class Small(nn.Module):
    conv: object

    @nn.compact
    def __call__(self, x, train=True):
        layer = nn.Conv(5, (3, 3), strides=2, conv_general_dilated=self.conv)
        return nn.Dense(2, name="head")(nn.relu(layer(nn.relu(layer(x)))).mean((1, 2)))


def test_meta_gradients_are_those_of_the_default():
    images = np.random.default_rng(0).normal(size=(4, 5, 4, 5)).astype("float32")
    source = jmeta.from_arrays(images, np.repeat(np.arange(2), 2), ways=2, queries=1)
    tasks = jax.jit(jax.vmap(source.sample, (0, None)))(jax.random.split(jax.random.key(1), 2), source.data)
    ours, theirs = (
        jmeta.maml(jmeta.linen(Small(conv)), inner_rate=0.1, inner_steps=1) for conv in (pallas, conv_general_dilated)
    )
    params, state = jax.jit(theirs.init)(jax.random.key(0), jax.tree.map(lambda x: x[0], tasks))

    def gradient(learner):
        return jax.grad(lambda θ: learner.objective(jax.random.key(2), θ, state, tasks)[0])(params)

    assert_close(*jax.jit(lambda: (gradient(ours), gradient(theirs)))(), 1e-5)


def on_a_gpu():
    """From JAX 0.11 on, the kernels are lowered for a GPU that has a name."""
    if jax.__version_info__ < (0, 11):
        return nullcontext()
    gpu = jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_operation_lowers_to_a_kernel_for_cuda(dtype):
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((3, 3, 12, 12), (2, 2, 9, 10, 12))]

    def kernels(conv):
        with on_a_gpu():
            exported = jax.export.export(
                jax.jit(adapted(conv, (2, 2))),
                platforms=["cuda"],
                disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")],
            )(*shapes)
        text = exported.mlir_module()
        return text.count("@__gpu$xla.gpu.triton"), text.count("stablehlo.dot_general")

    (ours, no_products), (no_kernels, products) = kernels(pallas), kernels(conv_general_dilated)
    assert ours > 5 and products > 5
    assert no_kernels == no_products == 0


@pytest.mark.parametrize(
    ("x", "w", "options"),
    [
        ((1, 6, 6, 1), (3, 3, 1, 4), {"padding": "SAME"}),
        ((1, 6, 6, 5), (3, 3, 5, 4), {"padding": "SAME", "rhs_dilation": (2, 1)}),
        ((1, 6, 6, 5), (3, 3, 5, 4), {"padding": ((-1, 0), (0, 0))}),
        ((1, 40, 9), (4, 9, 4), {"padding": "VALID"}),
        ((0, 6, 6, 5), (3, 3, 5, 4), {"padding": "SAME"}),
    ],
    ids=["one channel", "dilation", "cropped", "one axis", "no image"],
)
def test_where_the_kernels_do_not_fit_patches_are_taken(x, w, options):
    x, w = normal(0, x), normal(1, w)
    strides = (1,) * (x.ndim - 2)
    program = jax.jit(jax.grad(lambda x, w: pallas(x, w, strides, **options).sum(), argnums=(0, 1))).lower(x, w)
    assert "while" not in program.as_text()  # of the interpreter
    assert_close(pallas(x, w, strides, **options), conv_general_dilated(x, w, strides, **options), 1e-5)


def test_float64_is_not_rounded(float64):
    x, w = normal(0, (1, 6, 6, 5), "float64"), normal(1, (3, 3, 5, 4), "float64")
    assert_close(*(conv(x, w, (1, 1), "SAME") for conv in (pallas, conv_general_dilated)), 1e-14)


def test_devices_of_a_mesh_run_the_kernels():
    mesh = jax.make_mesh((2,), ("t",), axis_types=(AxisType.Auto,))
    w, x = normal(0, (3, 3, 5, 5)), normal(1, (2, 6, 5, 5))

    def gradient(conv):
        one = jax.grad(lambda w, x: (conv(x, w, (2, 2), "SAME") ** 3).sum())
        return jax.shard_map(one, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("t")), out_specs=PartitionSpec())

    assert_close(*jax.jit(lambda: [gradient(conv)(w, x) for conv in (pallas, conv_general_dilated)])(), 1e-5)


def test_an_unknown_lowering_is_told():
    with pytest.raises(ValueError, match="there is no lowering 'triton'; take one of loop, patches, pallas"):
        conv_general_dilated(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1)), (1, 1), "SAME", lowering="triton")
