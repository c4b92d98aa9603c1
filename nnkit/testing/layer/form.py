"""The form of a layer: its signature, its trees, shapes and dtypes."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnkit.testing.compare import check_form, check_same_bits, show
from nnkit.testing.layer.subject import LayerSubject
from nnkit.testing.report import NotApplicable, check, fail
from nnkit.testing.trees import is_float, map_floats, specs_of
from nnkit.tree import flatten, path_str

__all__ = ["dtypes", "init", "paths", "shapes", "signature", "state", "test_state"]

layer_check = partial(check, subject=LayerSubject)


@layer_check("signature")
def signature(s: LayerSubject) -> None:
    """``init(key, x)`` and ``apply(params, state, x, *, key=None, train)``, as combinators call them."""
    for name, function, wanted in (
        ("init", s.layer.init, lambda key, x: None),
        ("apply", s.layer.apply, lambda params, state, x, *, key=None, train: None),
    ):
        found, expected = inspect.signature(function), inspect.signature(wanted)
        if _form(found) != _form(expected):
            bare = [
                p.replace(annotation=p.empty) for p in found.parameters.values() if p.kind != p.VAR_KEYWORD
            ]
            fail(
                f"{name}'s parameters",
                expected=f"{name}{expected}",
                arrived=f"{name}{found.replace(parameters=bare, return_annotation=inspect.Signature.empty)}",
                likely="combinators and trainers call it so, and a mode that has a default is forgotten: write "
                f"def {name}{expected}",
            )


def _form(signature: inspect.Signature) -> list[Any]:
    """How many positional parameters there are, whatever their names, and the keywords with their defaults."""
    parameters = signature.parameters.values()
    positional = [p.default for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [positional, sorted((p.name, str(p.default)) for p in parameters if p.kind == p.KEYWORD_ONLY)]


@layer_check("readable paths")
def paths(s: LayerSubject) -> None:
    """Parameters and state are trees of arrays whose paths are unique names, ``dense_0/kernel``."""
    for what, part in zip(("params", "state"), s.initial, strict=True):
        names = [path_str(path) for path, _ in jax.tree_util.tree_leaves_with_path(part)]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            fail(
                f"two leaves of {what} have one path",
                expected="each path once",
                arrived=", ".join(names),
                path=twice[0],
                likely="a name has '/' in it: masks and files could not tell the two apart",
            )
        for name, leaf in zip(names, jax.tree.leaves(part), strict=True):
            pieces = name.split("/")
            if not all((n.isidentifier() or n.isdigit()) and not n.endswith("_") for n in pieces):
                fail(
                    f"a path of {what} that cannot be read or written in code",
                    expected="names like dense_0/kernel, without '_' at the end",
                    arrived=repr(name),
                    path=name,
                    likely="a kind such as 'dense_' was used as a name: let name_children count it",
                )
            if not isinstance(leaf, jax.Array):
                fail(
                    f"a leaf of {what} is no array",
                    expected="jax.Array",
                    arrived=f"{type(leaf).__name__} {leaf!r}",
                    path=name,
                    likely="init returned a Python or numpy number: wrap it in jnp.asarray",
                )


@layer_check("init")
def init(s: LayerSubject) -> None:
    """``init`` gives the same bits for an array, for its ``ShapeDtypeStruct`` and for other values.

    Another key gives other parameters.
    """
    likely = "init reads the values of x: it may look at x.shape and x.dtype only"
    for what, x in (
        ("init of a ShapeDtypeStruct", specs_of(s.x)),
        ("init of other values of the same shape", map_floats(lambda a: 2 * a + 1, s.x)),
        ("init called again with the same key", s.x),
    ):
        again = what.startswith("init called")
        check_same_bits(
            what,
            s.initial,
            s.layer.init(jax.random.key(0), x),
            "init draws from something beside its key" if again else likely,
        )
    other = flatten(s.layer.init(jax.random.key(1), s.x)[0])
    for path, leaf in flatten(s.initial[0]).items():
        if is_float(leaf) and _drawn(np.asarray(leaf)) and np.array_equal(leaf, other[path]):
            fail(
                "init with two keys",
                expected="other numbers for another key",
                arrived=f"the same: {show(leaf, 3)}",
                path=f"params/{path}",
                likely="init draws from a key of its own, or from numpy: draw from the key it gets; a table that is "
                "meant to be constant belongs into the state",
            )
    specs = jax.eval_shape(s.layer.init, jax.random.key(0), s.x)
    check_form("what init returns", specs, s.initial, "init does other things when it is traced")


def _drawn(numbers: np.ndarray) -> bool:
    """Whether a leaf looks drawn: most numbers differ, and they do not rise or fall as arange's and logspace's do."""
    flat = numbers.astype(np.float64).reshape(-1)
    steps = np.diff(flat)
    ordered = bool((steps >= 0).all() or (steps <= 0).all())
    return flat.size > 2 and not ordered and np.unique(flat).size > flat.size / 2


@layer_check("shapes as eval_shape says")
def shapes(s: LayerSubject) -> None:
    """Output and state have the shapes and dtypes that ``jax.eval_shape`` says, not compiled as well."""
    for train in s.modes:
        expected = s.shapes(train=train, key=s.key)
        check_form(
            f"(y, state) with train={train}",
            expected,
            s.eager(train),
            "apply does something else when it is traced: it looks at values, or keeps numpy arrays",
        )


@layer_check("state")
def state(s: LayerSubject) -> None:
    """The new state has the structure, shapes, dtypes and weak types of the old, in both modes."""
    if not isinstance(s.state, dict) and jax.tree.leaves(s.state):
        fail("the state's type", expected="a dict", arrived=type(s.state).__name__, path="state")
    for train in (True, False):
        check_form(
            f"the state after train={train}",
            s.state,
            s.shapes(train=train, key=s.key)["state"],
            "a scan or a jitted step cannot carry a state that changes its form: return the structure, shapes and "
            "dtypes (x.astype(old.dtype)) that init made, without weakly typed Python numbers",
            weak=True,
        )


@layer_check("state at test time")
def test_state(s: LayerSubject) -> None:
    """With train=False the state comes back as it was, to the bit."""
    check_same_bits(
        "the state after train=False",
        s.state,
        s.jitted(False)["state"],
        "statistics move at test time: return the state as it came where train is False; a cache that is meant "
        "to grow then skips this check",
    )


@layer_check("dtypes")
def dtypes(s: LayerSubject) -> None:
    """Half precision in, half precision out, the state in its own dtypes; float64 stays float64."""
    if not any(map(is_float, jax.tree.leaves(s.x))):
        raise NotApplicable("the input has no floating leaf")
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64):
        with jax.enable_x64(dtype == jnp.float64):
            x = map_floats(lambda a, d=dtype: jax.ShapeDtypeStruct(a.shape, d), specs_of(s.x))
            params, state = jax.eval_shape(s.layer.init, s.key, x)
            for train in s.modes:

                def run(params: Any, state: Any, x: Any, train: bool = train) -> Any:
                    return s.layer.apply(params, state, x, key=s.key, train=train)

                y, after = jax.eval_shape(run, params, state, x)
                for path, leaf in flatten(y).items():
                    if is_float(leaf) and leaf.dtype != dtype:
                        fail(
                            f"the output for {jnp.dtype(dtype)} input with train={train}",
                            expected=jnp.dtype(dtype),
                            arrived=leaf.dtype,
                            path=path or "y",
                            likely="a wider constant or parameter widened it: compute wide where sums need it, and "
                            "end with y.astype(x.dtype)",
                        )
                check_form(
                    f"the state for {jnp.dtype(dtype)} input with train={train}",
                    state,
                    after,
                    "the new state takes the input's dtype: cast it to that of the old",
                )
