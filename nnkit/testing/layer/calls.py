"""A layer called in every way that JAX has: compiled, mapped, donated, saved, on several devices."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from nnkit.testing.compare import check_close, check_form
from nnkit.testing.layer.subject import LayerSubject, floats_of, with_floats
from nnkit.testing.report import NotApplicable, check, fail
from nnkit.testing.shared import FAST, check_buffers, check_pure, check_saved, mesh_of, sharded, tiled
from nnkit.testing.trees import batch_of, map_floats, stack, sum_of_sines

__all__ = ["donation", "hyperparameters", "jit", "mesh", "one_compilation", "purity", "serialisation", "vmap"]

layer_check = partial(check, subject=LayerSubject)


@layer_check("purity")
def purity(s: LayerSubject) -> None:
    """The same call twice gives the same bits, and neither trees nor arrays of the caller change."""
    for train in s.modes:
        run = partial(s.layer.apply, key=s.key, train=train)
        check_pure(f"apply with train={train}", run, _copied(s.params), _copied(s.state), s.x)


def _copied(tree: Any) -> Any:
    """The same arrays in containers of their own."""
    return jax.tree.map(lambda a: a, tree)


@layer_check("jit")
def jit(s: LayerSubject) -> None:
    """Compiled and not compiled, outputs and states agree."""
    for train in s.modes:
        check_close(
            f"output and state of jit(apply) with train={train}",
            s.eager(train),
            s.jitted(train),
            "something other than the arguments enters while tracing (a counter, a global, numpy's random "
            "numbers), or a number is looked at in Python",
            rtol=s.rtol,
        )


@layer_check("vmap")
def vmap(s: LayerSubject) -> None:
    """A stacked population, each with its own parameters, state, input and key, equals the loop."""
    members = [s.member(seed) for seed in (1, 2)]
    inputs = [map_floats(lambda a, f=f: a * jnp.asarray(f, a.dtype), s.x) for f in (0.5, 1.0)]
    keys = jax.random.split(jax.random.key(3), 2)
    for train in s.modes:
        loop = [
            s.compiled(train)(p, state, x, k) for (p, state), x, k in zip(members, inputs, keys, strict=True)
        ]
        mapped = jax.jit(jax.vmap(partial(s.call, train=train)), compiler_options=FAST)(
            stack([p for p, _ in members]), stack([state for _, state in members]), stack(inputs), keys
        )
        check_close(
            f"output and state of vmap(apply) over two members with train={train}",
            stack(loop),
            mapped,
            "an axis is counted from the front, a shape is taken from elsewhere, or a reduction runs over the "
            "mapped axis",
            rtol=s.rtol,
        )


@layer_check("one compilation")
def one_compilation(s: LayerSubject) -> None:
    """A jitted step that carries the state is traced once, whatever key and numbers it gets."""
    run = s.compiled(True)
    state = run(s.params, s.state, s.x, s.key)["state"]
    before = s.traces[True]
    for seed in (1, 2):
        state = run(s.params, state, s.x, jax.random.key(seed))["state"]
    if s.traces[True] != before:
        check_form("the state that goes round", s.state, state, weak=True)
        fail(
            "a step that carries the state compiles again",
            expected="1 trace",
            arrived=f"{1 + s.traces[True] - before} traces",
            path="state",
            likely="a leaf changes its dtype or its weak type: give constants a dtype, jnp.zeros((), x.dtype)",
        )


@layer_check("donation")
def donation(s: LayerSubject) -> None:
    """Parameters and state may be donated to a jitted step: every leaf is a buffer of its own."""
    check_buffers(
        "what init returns", lambda: dict(zip(("params", "state"), s.layer.init(s.key, s.x), strict=True))
    )
    run = s.compiled(True)
    check_buffers("the new state", lambda: run(s.params, s.state, s.x, s.key)["state"])


@layer_check("serialisation")
def serialisation(s: LayerSubject) -> None:
    """Parameters and state, saved and loaded, give the same output to the bit."""
    params, state = check_saved("the tree of parameters and state", (s.params, s.state))
    train = s.modes[-1]
    check_close(
        "the output of the loaded parameters",
        s.jitted(train),
        s.compiled(train)(params, state, s.x, s.key),
        rtol=0.0,
        atol=0.0,
    )


@layer_check("mesh")
def mesh(s: LayerSubject) -> str:
    """The batch split over up to 8 devices gives the same outputs, states and gradients as one device."""
    devices, x = _shared_out(s)
    for train in s.modes:

        def run(params: Any, state: Any, x: Any, key: Any, train: bool = train) -> Any:
            def loss(numbers: Any) -> Any:
                found = s.call(with_floats(params, numbers), state, x, key, train)
                return sum_of_sines(found["y"]), found

            grads, found = jax.grad(loss, has_aux=True)(floats_of(params))
            return {**found, "gradient": with_floats(params, grads)}

        arguments = (s.params, s.state, x, s.key)
        compiled = jax.jit(run, compiler_options=FAST)
        alone = compiled(*arguments)
        batch = batch_of(x)
        spread = tuple(sharded(a, devices, batch if a is x else None) for a in arguments)
        check_close(
            f"output, state and gradient on {devices.size} devices with train={train}",
            alone,
            compiled(*spread),
            "the layer asks for the number of devices or moves data itself: leave placement to jit",
            rtol=s.rtol,
            # A gradient is a sum over the batch, here in another order: the roundings of as many terms.
            atol=2e-6 * (batch or 1),
        )
    return f"{devices.size} devices"


def _shared_out(s: LayerSubject) -> tuple[jax.sharding.Mesh, Any]:
    """The devices, and the input with its batch repeated for them to share.

    Where the layer is made for one size of batch (it has a mask or a cache of its own), as many devices as divide it.
    """
    devices = mesh_of()
    x = tiled(s.x, devices.size)
    try:
        for train in s.modes:
            jax.eval_shape(partial(s.call, train=train), *s.initial, x, s.key)
    except (TypeError, ValueError):
        batch = batch_of(s.x) or 1
        return mesh_of(max(n for n in range(1, devices.size + 1) if batch % n == 0)), s.x
    return devices, x


@layer_check("hyper-parameters")
def hyperparameters(s: LayerSubject) -> str:
    """Made of traced numbers inside jit, the layer gives what it gives for plain ones, and maps over them."""
    if s.factory is None:
        raise NotApplicable("no factory= and hyperparameters= were given")
    factory, numbers = s.factory, s.hyperparameters

    def run(numbers: Any, x: Any, key: Any, train: bool) -> Any:
        layer = factory(**numbers)
        params, state = layer.init(jax.random.key(0), x)
        y, state = layer.apply(params, state, x, key=key, train=train)
        return {"y": y, "state": state}

    likely = (
        "a hyper-parameter is compared or converted in Python: use jnp.where, and checks.is_static_number "
        "before a comparison"
    )
    for train in s.modes:
        traced = {name: jnp.float32(value) for name, value in numbers.items()}
        try:
            once = jax.jit(partial(run, train=train))(traced, s.x, s.key)
            grid = {name: jnp.stack([v, v]) for name, v in traced.items()}
            mapped = jax.vmap(partial(run, train=train), (0, None, None))(grid, s.x, s.key)
        except jax.errors.ConcretizationTypeError as error:
            fail(
                f"a traced {' or '.join(numbers)} with train={train}",
                expected="a layer",
                arrived=f"{type(error).__name__}: {str(error).splitlines()[0]}",
                likely=likely,
            )
        # Random bits may be drawn in another way for a number that is known (dropout: as few as its rate needs).
        plain = run(traced if s.random and train else numbers, s.x, s.key, train)
        what = f"output and state of traced {', '.join(numbers)} with train={train}"
        check_close(what, plain, once, likely, rtol=s.rtol)
        check_close(f"{what} under vmap", stack([plain, plain]), mapped, likely, rtol=s.rtol)
    return ", ".join(numbers)
