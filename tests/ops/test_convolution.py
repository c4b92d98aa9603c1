"""Every algorithm against lax.conv_general_dilated in float64, its derivatives of both orders, and PyTorch."""

from __future__ import annotations

import itertools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import ops
from nnkit.ops import convolution_algorithms as algorithms
from nnkit.ops import convolution_choice as choice
from nnkit.ops.convolution_geometry import Geometry


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def small_chunks(monkeypatch):
    """So that these few examples are several chunks and a rest, and these few channels many."""
    monkeypatch.setattr(choice, "FEW", 1)
    monkeypatch.setattr(algorithms, "_chunk_size", lambda x, g: min(2, x.shape[0]))


class Case(NamedTuple):
    name: str
    sizes: tuple[int, ...]
    window: tuple[int, ...]
    inputs: int
    outputs: int
    options: dict[str, Any]

    def operands(self, batch: int = 5, dtype: Any = np.float64) -> tuple[jax.Array, jax.Array]:
        rng = np.random.default_rng(0)
        groups = self.options.get("feature_group_count", 1)
        x = rng.normal(size=(batch, *self.sizes, self.inputs))
        kernel = rng.normal(size=(*self.window, self.inputs // groups, self.outputs))
        return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def case(name, sizes, window, inputs, outputs, strides=1, padding=0, **options) -> Case:
    n = len(sizes)
    strides = (strides,) * n if isinstance(strides, int) else strides
    padding = ((padding, padding),) * n if isinstance(padding, int) else padding
    return Case(name, sizes, window, inputs, outputs, {"strides": strides, "padding": padding, **options})


CASES = [
    case("same", (5, 9), (3, 3), 2, 3, padding=1),
    case("wide", (4, 9), (3, 3), 3, 2, padding=1),
    case("strides", (7, 6), (3, 3), 2, 3, strides=2, padding=((1, 1), (0, 1))),
    case("point", (3, 4), (1, 1), 2, 3),
    case("shortcut", (5, 4), (1, 1), 2, 3, strides=2),
    case("stem", (6, 5), (3, 2), 1, 4, padding=1),
    case("depthwise", (5, 4), (3, 3), 3, 3, padding=1, feature_group_count=3),
    case("multiplied", (5, 6), (3, 2), 2, 6, strides=(2, 1), padding=1, feature_group_count=2),
    case("groups", (4, 5), (3, 3), 4, 6, padding=1, feature_group_count=2),
    case("line", (9,), (3,), 2, 3, padding=((4, 0),), kernel_dilation=(2,)),
    case("volume", (3, 4, 3), (2, 3, 2), 2, 2, padding=1),
    case("transposed", (4, 3), (3, 4), 2, 3, padding=((1, 2), (2, 0)), input_dilation=(2, 3)),
    case("few taps", (3, 4), (2, 1), 2, 2, padding=1, input_dilation=(3, 2), feature_group_count=2),
    case("all", (5, 4), (2, 2), 2, 2, (2, 1), ((1, 2), (0, 3)), input_dilation=(2, 2), kernel_dilation=(2, 1)),
    case("cut", (7, 6), (2, 3), 2, 3, strides=(2, 1), padding=((-1, -2), (-2, 3))),
]  # fmt: skip
SLOW = ("wide", "multiplied", "volume", "few taps")  # their programs are long, and others resemble them
BY_NAME = {c.name: c for c in CASES}
NO_PHASES = ("line", "all")  # an axis is dilated and has strides or a dilated window


def reference(
    x, kernel, *, strides, padding, input_dilation=None, kernel_dilation=None, feature_group_count=1
):
    axes = "DHW"[: x.ndim - 2]
    numbers = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, (f"N{axes}C", f"{axes}IO", f"N{axes}C"))
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, input_dilation, kernel_dilation, numbers, feature_group_count
    )


def close(ours: Any, theirs: Any, tolerance: float = 1e-12) -> None:
    """Relative to the largest element: sums of some hundred terms, of which each rounds by 1e-16."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.abs(a - b).max(initial=0) <= tolerance * np.abs(b).max(initial=1)


def derivatives(conv: Any, x: Any, kernel: Any) -> dict[str, Any]:
    """The convolution, both gradients, and each's own derivative."""

    def loss(x, kernel):
        y = conv(x, kernel)
        return jnp.sum(y * jnp.cos(y))

    gradient = jax.grad(loss, (0, 1))
    tangents = (jnp.cos(x), jnp.sin(kernel))
    return {
        "forward": conv(x, kernel),
        "tangent": jax.jvp(conv, (x, kernel), tangents)[1],
        "gradients": gradient(x, kernel),
        "hessian": jax.jvp(gradient, (x, kernel), tangents)[1],
    }


def compiled(f: Any) -> Any:
    """Quickly: what is compiled here runs once."""
    return jax.jit(
        f, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    )


def both(c: Case, algorithm: Any, run: Any = derivatives, batch: int = 5) -> tuple[Any, Any]:
    x, kernel = c.operands(batch)
    return compiled(
        lambda x, kernel: (
            run(lambda x, k: ops.conv(x, k, algorithm=algorithm, **c.options), x, kernel),
            run(lambda x, k: reference(x, k, **c.options), x, kernel),
        )
    )(x, kernel)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["same", "strides", "depthwise", "transposed"])
def test_what_is_chosen_equals_lax_with_first_and_second_derivatives(name):
    close(*both(BY_NAME[name], "auto"))


def places(conv: Any, x: Any, kernel: Any) -> Any:
    y = conv(x, kernel)
    return y, jax.vjp(conv, x, kernel)[1](jnp.cos(y))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "c", [pytest.param(c, id=c.name, marks=[pytest.mark.slow] * (c.name in SLOW)) for c in CASES]
)
def test_every_algorithm_equals_lax_at_every_place(c):
    """One program for each case, with as many convolutions as there are names."""
    uses = [ops.Algorithms()]
    for names in itertools.zip_longest(*choice.NAMES.values(), fillvalue="auto"):
        names = ["auto" if n == "phases" and c.name in NO_PHASES else n for n in names]
        uses.append(ops.Algorithms(*names))
    x, kernel = c.operands()
    ours, theirs = compiled(
        lambda x, kernel: (
            [places(lambda x, k, use=use: ops.conv(x, k, algorithm=use, **c.options), x, kernel) for use in uses],
            places(lambda x, k: reference(x, k, **c.options), x, kernel),
        )
    )(x, kernel)  # fmt: skip
    for result in ours:
        close(result, theirs)


def mapped(conv: Any, x: Any, kernel: Any) -> Any:
    """The gradients and what they are made of, mapped over x, the kernel, and both at once."""
    xs, kernels = jnp.stack([x, x[::-1], x * 2]), jnp.stack([kernel, kernel * kernel, -kernel])

    def gradients(x, kernel):
        return jax.grad(lambda x, k: jnp.sum(jnp.sin(conv(x, k))), (0, 1))(x, kernel)

    return [
        jax.vmap(gradients, axes)(xs if axes[0] == 0 else x, kernels if axes[1] == 0 else kernel)
        for axes in ((0, None), (None, 0), (0, 0))
    ] + [jax.vmap(conv, (-1, 1), 2)(jnp.moveaxis(xs, 0, -1), jnp.moveaxis(kernels, 0, 1))]


@pytest.mark.parametrize("name", ["same", "groups", "transposed"])
def test_vmap_equals_laxs(name):
    close(*both(BY_NAME[name], "auto", mapped, batch=2))


def test_within_a_scan_a_remat_and_a_donated_step_it_is_the_same():
    c = BY_NAME["same"]
    x, kernel = c.operands()
    xs = jnp.stack([x, x + 1, x * 2])

    def steps(conv, kernel):
        def step(kernel, x):
            loss, gradient = jax.value_and_grad(jax.checkpoint(lambda k: jnp.mean(conv(x, k) ** 2)))(kernel)
            return kernel - 0.1 * gradient, loss

        return jax.lax.scan(step, kernel, xs)

    theirs = jax.jit(lambda k: steps(lambda x, k: reference(x, k, **c.options), k))(kernel)
    ours = jax.jit(lambda k: steps(lambda x, k: ops.conv(x, k, **c.options), k), donate_argnums=0)(kernel + 0)
    close(ours, theirs)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32], ids=str)
@pytest.mark.parametrize("algorithm", ["auto", "im2col", "shift"])
def test_every_dtype_is_kept_and_sums_are_float32s(dtype, algorithm):
    """4225 ones: summed in float16 they would stop at 2048, in bfloat16 at 256."""
    x, kernel = jnp.ones((1, 65, 65, 2), dtype), jnp.ones((1, 1, 2, 1), dtype)

    def conv(x, kernel):
        return ops.conv(x, kernel, strides=(1, 1), padding=((0, 0), (0, 0)), algorithm=algorithm)

    y, back = jax.vjp(conv, x, kernel)
    gx, gk = back(y)
    assert {a.dtype for a in (y, gx, gk)} == {np.dtype(dtype)}
    np.testing.assert_array_equal(gk.astype(np.float64), np.asarray(8450, dtype).astype(np.float64))
    assert conv(x.astype(np.float64), kernel.astype(np.float64)).dtype == np.float64


def test_pytorchs_convolutions():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(3, 9, 8, 4)), rng.normal(size=(3, 3, 2, 6))
    ours, back = jax.vjp(
        lambda x, k: ops.conv(
            x, k, strides=(2, 2), padding=((1, 1), (1, 1)), kernel_dilation=(1, 2), feature_group_count=2
        ),
        x, kernel,
    )  # fmt: skip
    tx, tk = (
        torch.tensor(v.transpose(p), requires_grad=True)
        for v, p in ((x, (0, 3, 1, 2)), (kernel, (3, 2, 0, 1)))
    )
    theirs = torch.nn.functional.conv2d(tx, tk, stride=2, padding=1, dilation=(1, 2), groups=2)
    seed = rng.normal(size=ours.shape)
    theirs.backward(torch.tensor(seed.transpose(0, 3, 1, 2)))
    expected = [theirs.detach().numpy().transpose(0, 2, 3, 1), tx.grad.numpy().transpose(0, 2, 3, 1)]
    expected.append(tk.grad.numpy().transpose(2, 3, 1, 0))
    close([ours, *back(jnp.asarray(seed))], expected)

    kernel = rng.normal(
        size=(4, 3, 4, 5)
    )  # PyTorch's kernel of a transposed convolution is flipped, (in, out, ...)
    ours = ops.conv_transpose(jnp.asarray(x), jnp.asarray(kernel), strides=(2, 2), padding=((2, 2), (1, 1)))
    flipped = torch.tensor(kernel[::-1, ::-1].transpose(2, 3, 0, 1).copy())
    theirs = torch.nn.functional.conv_transpose2d(
        torch.tensor(x.transpose(0, 3, 1, 2)), flipped, stride=2, padding=1
    )
    close(ours, theirs.numpy().transpose(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("x", "kernel", "padding"),
    [((0, 4, 4, 2), (3, 3, 2, 3), 1), ((2, 2, 4, 2), (3, 3, 2, 3), 0), ((2, 4, 4, 2), (3, 3, 2, 0), 1)],
)
def test_nothing_to_sum(x, kernel, padding):
    options = {"strides": (1, 1), "padding": ((padding, padding),) * 2}
    x, kernel = jnp.ones(x), jnp.ones(kernel)
    ours = places(lambda x, k: ops.conv(x, k, algorithm="auto", **options), x, kernel)
    close(ours, places(lambda x, k: reference(x, k, **options), x, kernel))


_chunk, _padded, _flipped = algorithms._chunk, algorithms._padded, algorithms._flipped
_interleaved, _across = algorithms._interleaved, algorithms._across
SQUARE = case("square", (3, 3), (3, 3), 2, 2, padding=1, input_dilation=(2, 2))
WRONG = {
    "kernel not reversed": ("same", "auto", "_flipped", lambda w, g: _flipped(w[::-1, ::-1], g)),
    "first chunk again": ("same", "im2col", "_chunk", lambda v, i: _chunk(v, 0)),
    "one place later": (
        "line",
        "im2col",
        "_padded",
        lambda x, g, axis=1: jnp.roll(_padded(x, g, axis), 1, axis),
    ),
    "phases exchanged": (
        "square",
        "auto",
        "_interleaved",
        lambda f, d: _interleaved(lambda at: f(at[::-1]), d),
    ),
    "wrong sum": ("wide", "im2col", "_across", lambda y: _across(y.at[0].multiply(2))),
}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("mutant", WRONG)
def test_a_wrong_algorithm_is_caught(mutant, monkeypatch):
    name, algorithm, function, wrong = WRONG[mutant]
    monkeypatch.setattr(algorithms, function, wrong)
    results = both({**BY_NAME, "square": SQUARE}[name], algorithm, places)
    with pytest.raises(AssertionError):
        close(*results)


SHAPES = {
    "stem": ((128, 28, 28, 1), (3, 3, 1, 32), 1, ("xla", "flip", "im2col")),
    "small": ((128, 14, 14, 32), (3, 3, 32, 64), 1, ("row", "row", "im2col")),
    "resnet": ((32, 32, 32, 64), (3, 3, 64, 64), 1, ("row", "row", "im2col")),
    "halving": ((32, 32, 32, 64), (3, 3, 64, 128), 2, ("im2col", "phases", "im2col")),
    "shortcut": ((32, 32, 32, 64), (1, 1, 64, 128), 2, ("im2col", "flip", "im2col")),
    "large image": ((1, 512, 512, 64), (5, 5, 64, 64), 2, ("xla", "phases", "shift")),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_choice_is_visible(name):
    shape, kernel, strides, expected = SHAPES[name]
    x, k = jax.ShapeDtypeStruct(shape, np.float32), jax.ShapeDtypeStruct(kernel, np.float32)
    low = (kernel[0] - 1) // 2
    options = {"strides": (strides,) * 2, "padding": ((low, low),) * 2}
    assert ops.conv_algorithm(x, k, **options) == expected
    assert ops.conv_algorithm(x, k, platform="cuda", **options) == ("xla", "xla", "xla")


def test_the_platform_lowered_for_decides():
    """Without a GPU in the machine: the program for one is XLA's own convolutions and has no loop."""

    def gradients(x, kernel):
        def loss(x, kernel):
            y = ops.conv(x, kernel, strides=(1, 1), padding=((1, 1), (1, 1)))
            return jnp.sum(ops.max_pool(y, (2, 2), strides=(2, 2), padding=((0, 0), (0, 0))))

        return jax.grad(loss, (0, 1))(x, kernel)

    shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in ((64, 64, 64, 8), (3, 3, 8, 8))]
    text = {
        platform: jax.export.export(jax.jit(gradients), platforms=[platform])(*shapes).mlir_module()
        for platform in ("cuda", "cpu")
    }
    assert text["cuda"].count("stablehlo.convolution") == 3
    assert "stablehlo.while" not in text["cuda"]
    assert "select_and_scatter" in text["cuda"]
    assert "stablehlo.while" in text["cpu"]
    assert "select_and_scatter" not in text["cpu"]


def test_a_context_compiles_anew_and_an_argument_precedes_it():
    c = BY_NAME["same"]
    x, kernel = c.operands()
    traced = []

    @jax.jit
    def conv(x, kernel):
        traced.append(1)
        return ops.conv(x, kernel, **c.options)

    def used(f):
        return re.findall(r"forward='(\w+)'", str(jax.make_jaxpr(f)(x, kernel)))

    assert used(conv) == ["auto"]
    with ops.conv_algorithms("xla"):
        assert used(conv) == ["xla"]
        with ops.conv_algorithms(ops.Algorithms(forward="im2col")):
            assert used(conv) == ["im2col"]
            assert used(lambda x, k: ops.conv(x, k, algorithm="shift", **c.options)) == ["shift"]
        assert used(conv) == ["xla"]
    assert used(conv) == ["auto"]
    assert len(traced) == 3


def test_under_a_mesh_and_under_shard_map():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    c = BY_NAME["same"]
    x, kernel = c.operands()

    def loss(kernel, x):
        return jnp.mean(ops.conv(x, kernel, **c.options) ** 2)

    def mean(kernel, x):
        return jax.lax.pmean(loss(kernel, x), "data")

    within = jax.shard_map(mean, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec())
    close(jax.jit(jax.grad(within))(kernel, x), jax.grad(loss)(kernel, x))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"kernel": jnp.ones((3, 3, 2, 3), jnp.float16)}, TypeError, "one dtype, got float32 and a kernel of float16"),
        ({"kernel": jnp.ones((3, 2, 3), jnp.float32)}, ValueError, r"as many axes, got shapes \(1, 4, 4, 2\) and"),
        ({"kernel": jnp.ones((3, 3, 1, 3), jnp.float32)}, ValueError, r"2 input channels in feature_group_count=1"),
        ({"feature_group_count": 2}, ValueError, r"divisible by the groups, got \(3, 3, 2, 3\)"),
        ({"strides": (1,)}, ValueError, r"strides of 2 positive integers .* got \(1,\)"),
        ({"kernel_dilation": (0, 1)}, ValueError, r"kernel_dilation of 2 positive integers"),
        ({"padding": "SAME"}, ValueError, r"padding as 2 pairs .* names such as \"SAME\""),
        ({"algorithm": "im2cal"}, ValueError, "unknown algorithm of forward 'im2cal'; did you mean 'im2col'"),
        ({"algorithm": ops.Algorithms(kernel_gradient="row")}, ValueError, "of kernel_gradient 'row'"),
        (
            {"algorithm": ops.Algorithms("phases"), "input_dilation": (2, 2), "strides": (2, 2)},
            ValueError, "phases of forward takes no axis",
        ),
    ],
)  # fmt: skip
def test_errors_say_what_arrived(change, error, text):
    arguments = {"x": jnp.ones((1, 4, 4, 2), np.float32), "kernel": jnp.ones((3, 3, 2, 3), np.float32)}
    with pytest.raises(error, match=text):
        ops.conv(**{**arguments, "strides": (1, 1), "padding": ((0, 0), (0, 0)), **change})


def test_the_adjoint_of_the_adjoint_is_the_convolution():
    g = Geometry((7, 6), (3, 2), (2, 1), ((1, 2), (0, -1)), (1, 2), (1, 2))
    there = g.adjoint
    assert there.output == g.sizes
    assert there.adjoint.sizes == g.sizes
    assert there.adjoint._replace(padding=g.padding) == g
    assert [low for low, _ in there.adjoint.padding] == [low for low, _ in g.padding]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("low_high", [(-2, 1), (-3, 4), (1, -2), (3, 0), (3, -2)])
def test_cut_and_padded_far_it_stays_within_its_input(low_high, compiled):
    """XLA's own convolution on a CPU reads beyond its input for some of these, here or in the gradient."""
    rng = np.random.default_rng(0)
    low, high = low_high

    def moved(x):
        x = jnp.pad(x, ((0, 0), (max(low, 0), max(high, 0)), (0, 0), (0, 0)))
        return x[:, max(-low, 0) : x.shape[1] - max(-high, 0)]

    for inputs, outputs in ((4, 2), (2, 4)):
        x = jnp.asarray(rng.normal(size=(2, 7, 6, inputs)), jnp.float32)
        w = jnp.asarray(rng.normal(size=(2, 1, inputs, outputs)), jnp.float32)
        wanted, pull = jax.vjp(
            lambda x, w: ops.conv(moved(x), w, strides=(1, 1), padding=((0, 0),) * 2, algorithm="shift"), x, w
        )
        cotangent = jnp.asarray(rng.normal(size=wanted.shape), jnp.float32)
        for algorithm in ("auto", "xla", ops.Algorithms(input_gradient="flip")):

            def run(x, w, g, algorithm=algorithm):
                f = lambda x, w: ops.conv(
                    x, w, strides=(1, 1), padding=((low, high), (0, 0)), algorithm=algorithm
                )
                y, pull = jax.vjp(f, x, w)
                return y, *pull(g)

            for ours, theirs in zip(
                (jax.jit(run) if compiled else run)(x, w, cotangent), (wanted, *pull(cotangent)), strict=True
            ):
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
