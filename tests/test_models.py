"""Networks by name: their sizes, that they can be trained, and what is said where an option is not theirs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nnkit import layers, losses, models, optim, train, tree

IMAGES = {"mlp": (28, 28, 1), "mlp_bn_dropout": (28, 28, 1), "cnn": (28, 28, 1), "lenet": (28, 28, 1)}
# Published: torchvision's ResNets for 1,000 classes are examples of the docstrings; with ten classes and
# CIFAR's stem ResNet-18 has 11,173,962 (kuangliu/pytorch-cifar), ResNet-50 23,520,842.
COUNTS = {
    "mlp": 235_146,
    "mlp_bn_dropout": 235_146 - (256 + 128) + 2 * (256 + 128),
    "cnn": 421_642,
    "lenet": 61_706,
    "resnet18": 11_689_512 - 990 * 513,
    "resnet20": 272_474,
    "resnet50": 25_557_032 - 990 * 2049,
}


@pytest.mark.parametrize("name", models.MODELS)
def test_sizes(name):
    shape = (1, *IMAGES.get(name, (32, 32, 3)))
    model = models.build(name, 10)
    params, state = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
    assert tree.count(params) == COUNTS[name]
    x = jax.ShapeDtypeStruct((4, *shape[1:]), jnp.float32)
    y, _ = jax.eval_shape(lambda p, s, x: model.apply(p, s, x, train=False), params, state, x)
    assert (y.shape, y.dtype) == ((4, 10), jnp.float32)


@pytest.mark.slow
def test_a_resnet18_of_cifars_size_forward_and_backward():
    model = models.resnet18(10, stem="cifar")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 32, 32, 3)), jnp.float32)
    params, state = jax.jit(model.init)(jax.random.key(0), x[:1])
    assert tree.count(params) == 11_173_962

    def loss(params):
        logits, new = model.apply(params, state, x, train=True)
        return losses.softmax_cross_entropy(logits, jnp.arange(4)).mean(), new

    (value, new), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert 1 < float(value) < 10
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for path, grad in tree.flatten(grads).items():
        assert bool(jnp.isfinite(grad).all()), path
        assert bool((grad != 0).any()), path


def test_a_block_that_starts_as_the_identity():
    model = models.resnet(3, stages=(1, 1), width=4, stem="cifar", zero_init_residual=True)
    params, _ = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    scales = {
        path: leaf for path, leaf in tree.flatten(params).items() if path.endswith("body/batch_norm_1/scale")
    }
    assert len(scales) == 2
    assert not any(leaf.any() for leaf in scales.values())


def test_language_models_learn_to_count():
    text = (jnp.arange(32)[:, None] + jnp.arange(9)) % 5
    for model in (
        models.transformer_lm(5, features=16, num_layers=1, num_heads=2, max_length=8),
        models.lstm_lm(5, features=16, num_layers=1, embedding=8),
    ):
        trainer = train.trainer(model, losses.softmax_cross_entropy, optim.adam(2e-2))
        _, history = train.fit(
            trainer,
            (text[:, :-1], text[:, 1:]),
            epochs=30,
            key=jax.random.key(0),
            batch_size=16,
            progress=False,
        )
        assert history[-1]["loss"] < 0.2 < history[0]["loss"]


def test_a_model_of_one_carry_goes_on_where_it_was():
    whole = models.lstm_lm(7, features=8, num_layers=2, embedding=4)
    pieces = models.lstm_lm(7, features=8, num_layers=2, embedding=4, return_carry=True)
    tokens = jnp.asarray(np.random.default_rng(0).integers(7, size=(2, 6)), jnp.int32)
    params, state = whole.init(jax.random.key(0), tokens)
    jax.tree.map(np.testing.assert_array_equal, params, pieces.init(jax.random.key(0), tokens)[0])
    (first, carry), _ = pieces.apply(params, state, tokens[:, :4], train=False)
    (last, _), _ = pieces.apply(params, state, layers.Sequence(tokens[:, 4:], carry=carry), train=False)
    logits, _ = whole.apply(params, state, tokens, train=False)
    np.testing.assert_allclose(jnp.concatenate([first, last], 1), logits, rtol=1e-5, atol=1e-6)


def test_what_a_network_has_not_is_named():
    with pytest.raises(ValueError, match="the model 'lenet' has no option 'hidden': it has no options"):
        models.build("lenet", 10, hidden=(8,))
    with pytest.raises(
        ValueError, match="the model 'cnn' has no option 'widht': its options are channels, hidden, d"
    ):
        models.build("cnn", 10, widht=3)
    assert models.build("lenet", 10, hidden=None).name == "serial_"
    with pytest.raises(ValueError, match="must be 'imagenet' or 'cifar', got 'mnist'"):
        models.resnet18(10, stem="mnist")
