"""What a training function is given, what was read of it, and the forms such a function may have."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from nnkit import search
from nnkit.search.hparams import adapt

SPACE = search.as_space(
    {
        "lr": search.log_uniform(1e-5, 1.0),
        "model": {"width": search.integer(1, 64), "rate": search.uniform(0, 1)},
        "optimizer": search.conditional(
            {"sgd": {"momentum": search.uniform(0, 1)}, "adam": {"b1": search.uniform(0, 1)}}
        ),
    }
)
STATIC = (("model/width", 32), ("optimizer/kind", "sgd"))
TRACED = {"lr": 0.1, "model/rate": 0.5, "optimizer/sgd/momentum": 0.9}
ALL = ("lr", "model/width", "model/rate", "optimizer/kind", "optimizer/sgd/momentum")


@pytest.fixture
def hparams():
    return SPACE.hparams(STATIC, {path: jnp.float32(value) for path, value in TRACED.items()})


def test_it_is_a_mapping_and_has_attributes(hparams):
    assert list(hparams) == ["lr", "model", "optimizer"]
    assert len(hparams) == 3
    assert hparams["model"]["width"] == hparams.model.width == 32
    assert hparams.optimizer.kind == "sgd"
    assert "lr" in hparams
    assert "wd" not in hparams
    assert hparams.get("wd", 3) == 3
    assert getattr(hparams, "wd", 4) == 4
    assert hparams.get(0) is None
    assert dict(**hparams["optimizer"]) == {"kind": "sgd", "momentum": jnp.float32(0.9)}
    assert "'width': 32" in repr(hparams)


def test_it_is_read_only(hparams):
    with pytest.raises(AttributeError, match="read-only: write lr = "):
        hparams.lr = 1
    with pytest.raises(TypeError):
        hparams["lr"] = 1


def test_what_was_read_is_known(hparams):
    assert hparams.unread() == ALL
    _ = hparams["lr"], "model" in hparams, list(hparams), repr(hparams)
    model = hparams.model
    assert hparams.unread() == ALL[1:]  # a group is not read before what is in it
    _ = model["width"]
    assert hparams.unread() == ALL[2:] == model.unread()
    dict(**hparams["optimizer"])
    assert hparams.unread() == ("model/rate",)
    jax.tree.map(lambda x: x, hparams)
    assert hparams.unread() == ()


def test_as_a_pytree_it_has_the_traced_numbers(hparams):
    leaves, structure = jax.tree.flatten(hparams)
    assert [float(leaf) for leaf in leaves] == [float(jnp.float32(v)) for v in TRACED.values()]
    double = jax.tree.map(lambda x: 2 * x, hparams)
    assert float(double.lr) == float(2 * hparams.lr)
    assert double.model.width == 32
    assert jax.tree.structure(double) == structure
    other = SPACE.hparams((("model/width", 16), ("optimizer/kind", "sgd")), TRACED)
    assert jax.tree.structure(other) != structure
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(hparams)]
    assert paths == ["['lr']", "['model/rate']", "['optimizer/momentum']"]
    f = jax.jit(lambda h: h.lr * h.model.width)
    assert float(f(hparams)) == pytest.approx(3.2)


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (
            lambda h: h["learning_rate"],
            "unknown hyper-parameter 'learning_rate'. Known: lr, model, optimizer",
        ),
        (lambda h: h.lrr, "unknown hyper-parameter 'lrr'; did you mean 'lr'"),
        (lambda h: h.model.widht, "unknown hyper-parameter 'model/widht'; did you mean 'model/width'"),
        (
            lambda h: h.optimizer.b1,
            "'optimizer/adam/b1' is there only where 'optimizer/kind' is 'adam', and here it is 'sgd'",
        ),
    ],
)
def test_what_is_missing_is_named(hparams, read, text):
    with pytest.raises((KeyError, AttributeError)) as error:
        read(hparams)
    assert text in str(error.value)


# ----- forms of a training function


def call(train_fn, names=("lr", "width"), folds=False):
    hparams = search.Hparams(dict.fromkeys(names, 2))
    return adapt(train_fn, names, folds=folds)("key", hparams, 7 if folds else None), hparams.unread()


class Callable:
    def __call__(self, key, hparams, **fold):
        return key, hparams["lr"], hparams["width"], *fold.values()


def by_keyword(key, *, lr, width):
    return key, lr, width


def by_position(key, lr, width=1):
    return key, lr, width


def with_all(key, **all):
    return key, all["lr"], all["width"]


def with_hparams(key, hparams, /, other=3):
    return key, hparams["lr"], hparams["width"]


def with_rest(*args):
    return args[0], args[1].lr, args[1].width


@pytest.mark.parametrize(
    "train_fn", [by_keyword, by_position, with_all, with_hparams, with_rest, Callable(), jax.jit(by_keyword)]
)
def test_forms(train_fn):
    if isinstance(train_fn, type(jax.jit(by_keyword))):
        found, unread = adapt(train_fn, ("lr", "width")), ()
        assert found(1, search.Hparams({"lr": 2, "width": 3}), None) == (1, 2, 3)
        return
    found, unread = call(train_fn)
    assert found == ("key", 2, 2)
    assert unread == ()


def test_folds_are_handed_on():
    assert call(lambda key, hparams, *, fold: (hparams.lr, fold), folds=True) == ((2, 7), ("width",))
    assert call(lambda key, *, lr, width, fold: (lr, width, fold), folds=True)[0] == (2, 2, 7)
    assert call(Callable(), folds=True)[0] == ("key", 2, 2, 7)
    assert call(lambda key, hparams, fold=3: fold)[0] == 3


@pytest.mark.parametrize(
    ("train_fn", "folds", "text"),
    [
        (lambda key, *, lr: 0, False, "the space has 'width', which the training function does not take"),
        (
            lambda key, *, lr, widht: 0,
            False,
            "does not take: unknown parameter 'width'; did you mean 'widht'",
        ),
        (lambda key, *, lr, width, wd: 0, False, "takes 'wd', which the space does not have: unknown hyper"),
        (
            lambda: 0,
            False,
            r"takes no key: write train_fn\(key, hparams\), or train_fn\(key, \*, lr, width\)",
        ),
        (
            lambda key: 0,
            False,
            r"takes \(key\): write train_fn\(key, hparams\), or train_fn\(key, \*, lr, width\)",
        ),
        (
            lambda key, data, hparams: 0,
            False,
            r"takes \(key, data, hparams\): write train_fn\(key, hparams\)",
        ),
        (lambda key, hparams: 0, True, r"write train_fn\(key, hparams, \*, fold\) and cut the data"),
        (lambda key, hparams, *, fold: 0, False, "takes fold: pass folds=5 to the sweep"),
        (3, False, r"is called as train_fn\(key, hparams\), got 3"),
    ],
)
def test_other_signatures(train_fn, folds, text):
    with pytest.raises((TypeError, ValueError), match=text):
        call(train_fn, folds=folds)


def test_to_jit_a_whole_number_is_not_a_float():
    # Failed where 1, 1.0 and True were the same program.
    half = jax.jit(lambda hparams: jnp.full((), hparams["n"] / 2 if isinstance(hparams["n"], float) else 7.0))
    for value, wanted in ((1, 7.0), (1.0, 0.5), (True, 7.0)):
        space = search.as_space({"n": search.choice([value])})
        assert half(space.hparams((("n", value),), {})) == wanted
