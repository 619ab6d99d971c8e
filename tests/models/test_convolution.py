import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

import jmeta
from jmeta.models import lowerings
from jmeta.models.convolution import Window, conv_general_dilated

# name: shape of x, shape of w, strides, padding, options
CASES = {
    "one": ((2, 5, 6, 3), (1, 1, 3, 2), (1, 1), "SAME", {}),
    "one, stride 3": ((2, 7, 6, 1), (1, 1, 1, 4), (3, 2), "VALID", {}),
    "two, uneven rest": ((2, 8, 5, 2), (2, 2, 2, 1), (3, 2), "VALID", {}),
    "three, stride 2, even": ((2, 6, 6, 1), (3, 3, 1, 4), (2, 2), "SAME", {}),
    "three, stride 2, odd": ((2, 7, 5, 3), (3, 3, 3, 2), (2, 2), "SAME", {}),
    "five by two": ((1, 7, 6, 2), (5, 2, 2, 3), (3, 1), "SAME_LOWER", {}),
    "negative padding": ((2, 7, 8, 1), (3, 2, 1, 2), (2, 1), ((-1, -2), (-3, 3)), {}),
    "more padding than kernel": ((2, 3, 4, 1), (3, 2, 1, 2), (2, 2), ((5, 4), (3, 6)), {}),
    "dilated kernel": ((2, 7, 8, 2), (3, 2, 2, 2), (2, 1), "SAME", {"rhs_dilation": (2, 3)}),
    "dilated input": ((2, 4, 5, 2), (3, 2, 2, 2), (2, 1), ((1, 0), (2, 1)), {"lhs_dilation": (2, 3)}),
    "groups": ((2, 5, 5, 4), (3, 3, 2, 6), (2, 1), "SAME", {"feature_group_count": 2}),
    "one channel a group": ((2, 5, 5, 3), (3, 3, 1, 3), (1, 2), "VALID", {"feature_group_count": 3}),
    "one axis": ((2, 9, 3), (3, 3, 2), (2,), "SAME", {}),
    "three axes": ((1, 3, 4, 5, 2), (2, 3, 2, 2, 2), (2, 1, 2), "SAME", {}),
}


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def both(strides, padding, **options):
    """The convolution and `jax.lax`'s as functions of x and w."""

    def of(function):
        def conv(x, w):
            space = "HWD"[: x.ndim - 2]
            layout = (f"N{space}C", f"{space}IO", f"N{space}C")
            return function(x, w, strides, padding, dimension_numbers=layout, **options)

        return conv

    return of(conv_general_dilated), of(lax.conv_general_dilated)


def assert_close(ours, theirs, tolerance=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), ours, theirs)


def dot(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_first_and_second_derivatives_are_those_of_lax(case, float64):
    x_shape, w_shape, strides, padding, options = case
    at = normal(0, x_shape), normal(1, w_shape)
    along = normal(2, x_shape), normal(3, w_shape)

    def derivatives(conv):
        def gradient(*xw):
            return jax.grad(lambda *xw: (conv(*xw) ** 3).sum(), argnums=(0, 1))(*xw)

        forward_over_reverse = jax.jvp(gradient, at, along)  # the gradient and its product with the Hessian
        reverse_over_reverse = jax.grad(lambda xw: dot(gradient(*xw), along))(at)
        return jax.jvp(conv, at, along), forward_over_reverse, reverse_over_reverse

    ours, theirs = jax.jit(lambda: [derivatives(conv) for conv in both(strides, padding, **options)])()
    assert_close(ours, theirs)
    assert_close(ours[1][1], ours[2])


@pytest.mark.parametrize(
    ("along", "stack_x", "stack_w"),
    [
        (lambda f: jax.vmap(f, (0, None)), (3,), ()),
        (lambda f: jax.vmap(f, (None, 0)), (), (3,)),
        (jax.vmap, (3,), (3,)),
        (lambda f: jax.vmap(jax.vmap(f, (0, None)), (None, 0)), (3,), (2,)),
        (lambda f: jax.vmap(jax.vmap(f, (None, 0))), (2,), (2, 3)),
        (lambda f: jax.vmap(jax.vmap(f)), (2, 3), (2, 3)),
        (lambda f: lambda x, w: lax.scan(lambda _, xw: (None, f(*xw)), None, (x, w))[1], (3,), (3,)),
        (lambda f: lambda x, w: lax.map(lambda x: jax.vmap(f, (None, 0))(x, w), x), (2,), (3,)),
    ],
    ids=["x", "w", "x and w", "x in w", "w in x and w", "x and w twice", "scan", "w in map"],
)
def test_transformed_gradients_are_those_of_lax(along, stack_x, stack_w, float64):
    x, w = normal(0, (*stack_x, 2, 5, 6, 2)), normal(1, (*stack_w, 3, 3, 2, 3))

    def gradients(conv):
        inside = along(jax.grad(lambda x, w: (conv(x, w) ** 3).sum(), argnums=(0, 1)))
        outside = jax.grad(lambda x, w: (along(conv)(x, w) ** 3).sum(), argnums=(0, 1))
        return inside(x, w), outside(x, w)

    assert_close(*jax.jit(lambda: [gradients(conv) for conv in both((2, 1), "SAME")])())


@pytest.mark.parametrize("axes", [(1, -1), (-1, None), (None, 2)], ids=str)
def test_vmap_over_any_axis(axes, float64):
    x, w = normal(0, (2, 5, 6, 2)), normal(1, (3, 3, 2, 3))
    x, w = (a if axis is None else jnp.stack([a, 2 * a], axis) for a, axis in zip((x, w), axes, strict=True))
    assert_close(*(jax.jit(jax.vmap(conv, axes))(x, w) for conv in both((2, 1), "SAME")))


@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("name", ["three, stride 2, odd", "negative padding", "dilated kernel", "one axis"])
def test_the_lowerings_agree(name, pairs, float64):
    x_shape, w_shape, strides, padding, options = CASES[name]
    inputs, kernel, dilation = x_shape[1:-1], w_shape[:-2], options.get("rhs_dilation", (1,) * len(strides))
    if isinstance(padding, str):
        spread = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        padding = lax.padtype_to_pads(inputs, spread, strides, padding)
    window = Window(inputs, kernel, strides, tuple(padding), dilation)
    x, w = normal(0, (pairs, *x_shape)), normal(1, (pairs, *w_shape))
    g = normal(2, (pairs, x_shape[0], *window.outputs, w_shape[-1]))

    @jax.jit
    def lowered():
        operands = {"conv": (x, w), "input_gradient": (g, w), "weight_gradient": (x, g)}
        return [
            [getattr(lowerings, f"{name}_{how}")(*ab, window=window) for name, ab in operands.items()]
            for how in ("loop", "matmul")
        ]

    assert_close(*lowered())


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_second_derivative_lowers_without_grouped_convolution(platform):
    conv, theirs = both((2, 2), "SAME")

    def text(conv):
        def adapted_loss(x, w):
            return (conv(x, w - jax.grad(lambda w: (conv(x, w) ** 3).sum())(w)) ** 3).sum()

        def step(x, w):
            return jax.vmap(jax.grad(adapted_loss, argnums=1), (0, None))(x, w)

        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 5, 8, 8, 2), (3, 3, 2, 3))]
        return jax.export.export(jax.jit(step), platforms=[platform])(*shapes).mlir_module()

    grouped = re.compile(r"(feature|batch)_group_count = ([2-9]|1\d)")
    assert grouped.search(text(theirs))
    assert not grouped.search(text(conv))
    assert ("stablehlo.convolution" in text(conv)) == (platform == "cpu")


def test_gradients_inside_shard_map_are_summed_as_those_of_lax():
    mesh = AbstractMesh((2,), ("t",), axis_types=(AxisType.Auto,))

    def sums(conv):
        gradient = jax.grad(lambda w, x: conv(x, w).sum())
        shared = jax.shard_map(
            gradient, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("t")), out_specs=PartitionSpec()
        )
        return str(jax.make_jaxpr(shared)(jnp.ones((3, 3, 1, 2)), jnp.ones((2, 5, 5, 1)))).count("psum")

    ours, theirs = map(sums, both((1, 1), "SAME"))
    assert ours == theirs > 0


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ((2, 7, 6, 2), {"kernel_size": (3, 3), "strides": 2, "padding": "SAME"}),
        ((2, 7, 6, 2), {"kernel_size": (3, 2), "strides": (2, 1), "padding": "VALID", "use_bias": False}),
        ((2, 7, 6, 2), {"kernel_size": (3, 3), "padding": "CIRCULAR"}),
        ((2, 7, 6, 2), {"kernel_size": (3, 3), "padding": "REFLECT", "kernel_dilation": 2}),
        ((2, 7, 6, 2), {"kernel_size": (3, 3), "padding": 2, "kernel_dilation": (1, 2)}),
        ((2, 7, 6, 2), {"kernel_size": (2, 3), "padding": ((2, 1), (0, 3)), "input_dilation": (2, 1)}),
        ((2, 7, 6, 4), {"kernel_size": (3, 3), "feature_group_count": 4, "strides": 2}),
        ((2, 7, 6, 2), {"kernel_size": (3, 3), "dtype": jnp.bfloat16}),
        ((2, 9, 2), {"kernel_size": 3, "padding": "CAUSAL", "kernel_dilation": 2}),
        ((2, 2, 7, 6, 2), {"kernel_size": (3, 3)}),
        ((7, 6, 2), {"kernel_size": (3, 3)}),
        ((0, 7, 6, 2), {"kernel_size": (3, 3)}),
    ],
    ids=str,
)
def test_layer_is_that_of_linen(inputs, options):
    x = jax.random.normal(jax.random.key(0), inputs)

    @jax.jit
    def run():
        return [layer(features=4, **options).init_with_output(jax.random.key(1), x) for layer in (jmeta.Conv, nn.Conv)]

    (ours, our_params), (theirs, their_params) = run()
    assert ours.dtype == theirs.dtype == options.get("dtype", jnp.float32)
    assert_close(our_params, their_params)
    assert_close(ours.astype(jnp.float32), theirs.astype(jnp.float32), 1e-5 if ours.dtype == jnp.float32 else 1e-2)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 1, 5, 5), {"dimension_numbers": ("NCHW", "HWIO", "NCHW")}, "layout NHWC"),
        ((2, 2, 2, 1), {}, "does not fit"),
    ],
)
def test_what_it_cannot_do_is_told(shape, options, message):
    with pytest.raises(ValueError, match=message):
        conv_general_dilated(jnp.ones(shape), jnp.ones((3, 3, 1, 2)), (1, 1), "VALID", **options)


@pytest.mark.parametrize(("block", "parts"), [(1 << 20, 1), (1200, 3), (1, 7)])
def test_a_weight_gradient_is_the_sum_over_blocks_of_examples(block, parts, float64, monkeypatch):
    """Of as many as fit the cache, uneven where the number does not divide."""
    monkeypatch.setattr(lowerings, "BLOCK_BYTES", block)
    x, g = normal(0, (7, 5, 6, 2)), normal(1, (7, 3, 3, 4))

    def gradient(conv):
        return lambda x, g: jax.vjp(lambda w: conv(x, w), jnp.zeros((3, 3, 2, 4)))[1](g)[0]

    ours, theirs = map(gradient, both((2, 2), "SAME"))
    assert str(jax.jit(ours).lower(x, g).as_text()).count("stablehlo.convolution") == parts
    assert_close(jax.jit(ours)(x, g), jax.jit(theirs)(x, g))
