"""Flax's modules, linen's and nnx's, and the same here: outputs from their numbers, and the numbers back."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

from nnkit import interop, layers, tree
from tests.interop.oracle import close, draw, same_bits


def drawn(variables: Any, dtype: Any = None) -> Any:
    """The same tree with all numbers away from where they start; variances positive."""

    def draw_leaf(path: Any, leaf: Any) -> Any:
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        seed = sum(map(ord, jax.tree_util.keystr(path)))
        rng = np.random.default_rng(seed)
        low, high = (0.5, 2.0) if "var" in jax.tree_util.keystr(path) else (-0.6, 0.6)
        return jnp.asarray(rng.uniform(low, high, leaf.shape), dtype or leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw_leaf, variables)


def made(module: nn.Module, x: Any, **call: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):  # linen makes statistics in float32, whatever the input
        shapes = jax.eval_shape(lambda key: module.init(key, x, **call), jax.random.key(0))
    return drawn(shapes, x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else None)


def check_linen(model: Any, module: nn.Module, x: Any, *, names: Any = None, **call: Any) -> None:
    variables = made(module, x, **call)
    params, state = interop.from_flax(model, x, variables, names=names)
    wanted = jax.jit(lambda variables, x: module.apply(variables, x, **call))(variables, x)
    close(jax.jit(lambda *a: model.apply(*a, train=False)[0])(params, state, x), wanted)
    same_bits(interop.to_flax(model, x, params, state, variables, names=names), variables)


def check_nnx(model: Any, module: Any, x: Any, *, names: Any = None, run: Any = None) -> None:
    nnx.update(module, drawn(nnx.state(module), x.dtype))
    theirs = nnx.state(module)
    params, state = interop.from_flax(model, x, theirs, names=names)
    wanted = (run or module)(x)
    close(model.apply(params, state, x, train=False)[0], wanted)
    back = interop.to_flax(model, x, params, state, theirs, names=names)
    assert jax.tree.structure(back) == jax.tree.structure(theirs)
    same_bits(interop.from_flax(model, x, back, names=names), (params, state))
    zeros = jax.tree.map(lambda a: jnp.zeros_like(a) if jnp.issubdtype(a.dtype, jnp.floating) else a, theirs)
    nnx.update(module, zeros)
    nnx.update(module, back)
    assert np.array_equal((run or module)(x), wanted)


LAYERS = {
    "dense": (layers.dense(5), nn.Dense(5), (3, 4)),
    "dense without bias": (layers.dense(5, use_bias=False), nn.Dense(5, use_bias=False), (3, 4)),
    "conv": (layers.conv(6, (3, 2), feature_group_count=2), nn.Conv(6, (3, 2), feature_group_count=2), (2, 5, 5, 4)),
    "conv_transpose": (layers.conv_transpose(4, (3, 2), strides=2), nn.ConvTranspose(4, (3, 2), (2, 2)), (2, 3, 3, 4)),
    "conv_transpose, kernel transposed": (
        layers.conv_transpose(5, (3,), strides=2, transpose_kernel=True),
        nn.ConvTranspose(5, (3,), (2,), transpose_kernel=True),
        (2, 3, 4),
    ),
    "layer_norm": (layers.layer_norm(), nn.LayerNorm(), (2, 3, 4)),
    "group_norm": (layers.group_norm(2), nn.GroupNorm(2), (2, 3, 3, 4)),
    "instance_norm": (layers.instance_norm(), nn.InstanceNorm(), (2, 3, 3, 4)),
    "rms_norm": (layers.rms_norm(), nn.RMSNorm(), (2, 3, 4)),
    "prelu": (layers.prelu(), nn.PReLU(), (3, 4)),
    "attention": (
        layers.multi_head_attention(2, normalize_qk=True),
        nn.MultiHeadDotProductAttention(2, normalize_qk=True),
        (2, 3, 8),
    ),
    "simple_rnn": (layers.simple_rnn(5), nn.RNN(nn.SimpleCell(5)), (2, 4, 3)),
    "lstm": (layers.lstm(5), nn.RNN(nn.LSTMCell(5)), (2, 4, 3)),
    "optimized lstm": (layers.lstm(5), nn.RNN(nn.OptimizedLSTMCell(5)), (2, 4, 3)),
    "gru": (layers.gru(5), nn.RNN(nn.GRUCell(5)), (2, 4, 3)),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYERS)
def test_linens_layers_are_ours(case):
    model, module, shape = LAYERS[case]
    check_linen(model, module, draw(0, *shape))


def test_an_embedding():
    check_linen(layers.embedding(7, 3), nn.Embed(7, 3), jnp.array([[0, 6, 2]]))


class LinenCNN(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Any, train: bool) -> Any:
        of = {"param_dtype": self.dtype}
        for features in (4, 6):
            x = nn.Conv(features, (3, 3), **of)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, use_fast_variance=False, **of)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(8, **of)(x.reshape(x.shape[0], -1)))
        return nn.Dense(3, **of)(x)


class NnxCNN(nnx.Module):
    def __init__(self, dtype: Any, rngs: nnx.Rngs):
        of = {"param_dtype": dtype, "rngs": rngs}
        self.conv1 = nnx.Conv(3, 4, (3, 3), **of)
        self.conv2 = nnx.Conv(4, 6, (3, 3), **of)
        self.bn1 = nnx.BatchNorm(4, use_fast_variance=False, **of)
        self.bn2 = nnx.BatchNorm(6, use_fast_variance=False, **of)
        self.linear1, self.linear2 = nnx.Linear(24, 8, **of), nnx.Linear(8, 3, **of)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2)):
            x = nnx.max_pool(nnx.relu(norm(conv(x))), (2, 2), (2, 2))
        return self.linear2(self.dropout(nnx.relu(self.linear1(x.reshape(x.shape[0], -1)))))


def cnn() -> Any:
    body = []
    for features in (4, 6):
        body += [layers.conv(features, (3, 3)), layers.batch_norm(), layers.relu, layers.max_pool((2, 2))]
    return layers.serial(*body, layers.flatten, layers.dense(8), layers.relu, layers.dense(3))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_cnn_with_batch_normalisation(dtype):
    with jax.enable_x64(dtype == np.float64):
        x = draw(0, 3, 8, 8, 3, dtype=dtype)
        model, module = cnn(), LinenCNN(dtype)
        check_linen(model, module, x, train=False)
        variables = made(module, x, train=False)
        params, state = interop.from_flax(model, x, variables)
        train = jax.jit(lambda variables, x: module.apply(variables, x, True, mutable=["batch_stats"]))
        with jax.numpy_dtype_promotion("standard"):
            wanted, changed = train(variables, x)
        y, state = jax.jit(lambda *a: model.apply(*a, train=True))(params, state, x)
        close(y, wanted)
        theirs = interop.to_flax(model, x, params, state, variables)["batch_stats"]
        for ours, reference in zip(
            jax.tree.leaves(theirs), jax.tree.leaves(changed["batch_stats"]), strict=True
        ):
            close(ours, reference)
        nnx_module = NnxCNN(dtype, nnx.Rngs(0))
        nnx_module.eval()
        check_nnx(model, nnx_module, x)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        m = nn.gelu(nn.Dense(16)(nn.LayerNorm()(h)))
        return h + nn.Dense(x.shape[-1])(m)


class LinenTransformer(nn.Module):
    @nn.compact
    def __call__(self, ids: Any) -> Any:
        x = nn.Embed(11, 8)(ids)
        for _ in range(2):
            x = LinenBlock()(x)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="norm")(x))


def test_a_transformer():
    """Its norms are numbered in each block and one has a name: only names tell, as rules or as a function."""
    block = layers.transformer_block(2, mlp_features=16)
    model = layers.serial(embedding=layers.embedding(11, 8), body=layers.repeat(block, 2), norm=layers.layer_norm(),
                          head=layers.dense(3))  # fmt: skip
    rules = [
        (r"^embedding$", "Embed_0"),
        (r"^body/block/(\d)", r"LinenBlock_\1"),
        (r"attention_norm$", "LayerNorm_0"),
        (r"mlp_norm$", "LayerNorm_1"),
        (r"mlp/dense_(\d)$", r"Dense_\1"),
        (r"attention$", "MultiHeadDotProductAttention_0"),
    ]
    ids = jnp.array([[1, 5, 10, 0]])
    check_linen(model, LinenTransformer(), ids, names=rules)
    variables = made(LinenTransformer(), ids)
    message = r"which of LinenBlock_0, LinenBlock_1, norm comes first is not in the names, which are sorted"
    with pytest.raises(ValueError, match=message):
        interop.from_flax(model, ids, variables)


class NnxRNN(nnx.Module):
    def __init__(self, cell: Any):
        self.rnn = nnx.RNN(cell, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.rnn(x)


@pytest.mark.parametrize(
    ("model", "cell"),
    [
        (layers.simple_rnn(5), nnx.SimpleCell),
        (layers.lstm(5), nnx.LSTMCell),
        (layers.lstm(5), nnx.OptimizedLSTMCell),
        (layers.gru(5), nnx.GRUCell),
    ],
    ids=["simple_rnn", "lstm", "optimized lstm", "gru"],
)
def test_nnxs_recurrent_cells(model, cell):
    check_nnx(model, NnxRNN(cell(3, 5, rngs=nnx.Rngs(0))), draw(0, 2, 4, 3))


def test_a_bias_that_nnxs_gru_has_not():
    model, x = layers.gru(5, bias_init=lambda key, shape, dtype: jnp.ones(shape, dtype)), draw(0, 2, 4, 3)
    params, state = model.init(jax.random.key(0), x)
    theirs = nnx.state(nnx.GRUCell(3, 5, rngs=nnx.Rngs(0)))
    with pytest.raises(
        ValueError, match="has a bias of the state in its last 5 numbers, which nnx's GRUCell has not"
    ):
        interop.to_flax(model, x, params, state, theirs)


def test_ragged_sequences():
    model, module = layers.lstm(5), nn.RNN(nn.OptimizedLSTMCell(5), return_carry=True)
    x, lengths = draw(0, 3, 6, 2), jnp.array([6, 1, 4])
    variables = made(module, x)
    params, state = interop.from_flax(model, x, variables)
    y, _ = model.apply(params, state, layers.Sequence(x, lengths), train=False)
    _, wanted = module.apply(variables, x, seq_lengths=lengths)
    for row, length in enumerate([6, 1, 4]):
        close(y[row, :length], wanted[row, :length])


def test_a_cell_within_an_rnn_goes_by_the_rnns_name():
    module = nn.Sequential([nn.Dense(3), nn.RNN(nn.GRUCell(5))])
    check_linen(layers.serial(layers.dense(3), layers.gru(5)), module, draw(0, 2, 4, 3),
                names={"dense_0": "layers_0", "gru_0": "layers_1"})  # fmt: skip


def test_nnxs_lists_count():
    module = nnx.Sequential(*[nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in range(11)])
    model = layers.serial(*[layers.dense(3)] * 11)
    check_nnx(model, module, draw(0, 2, 3))
    names = interop.flax_names(model, draw(0, 2, 3), nnx.state(module))
    assert names["dense_2"] == "layers/2"
    assert names["dense_10"] == "layers/10"
    pure = nnx.to_pure_dict(nnx.state(module))
    same_bits(interop.from_flax(model, draw(0, 2, 3), pure),
              interop.from_flax(model, draw(0, 2, 3), nnx.state(module)))  # fmt: skip


def test_what_is_not_ours_stays():
    """Other collections, frozen dicts, and arrays that carry the names of mesh axes."""
    model, x = layers.serial(layers.dense(2)), jnp.zeros((1, 3))
    boxed = nn.Partitioned(jnp.ones((3, 2)), ("a", None))
    variables = freeze(
        {"params": {"Dense_0": {"kernel": boxed, "bias": jnp.ones(2)}}, "cache": {"index": jnp.array(3)}}
    )
    params, state = interop.from_flax(model, x, variables)
    assert tree.flatten(params).keys() == {"dense_0/bias", "dense_0/kernel"}
    doubled = jax.tree.map(lambda a: 2 * a, params)
    back = interop.to_flax(model, x, doubled, state, variables)
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    assert back["cache"]["index"] == 3
    assert back["params"]["Dense_0"]["kernel"].names == ("a", None)
    assert float(back["params"]["Dense_0"]["kernel"].value[0, 0]) == 2
    assert float(boxed.value[0, 0]) == 1


def test_names_of_our_own():
    model, x = layers.serial(layers.dense(2), layers.batch_norm()), jnp.zeros((4, 3))
    params, state = model.init(jax.random.key(0), x)
    variables = interop.to_flax(
        model, x, params, state, names={"dense_0": "a/Dense_0", "batch_norm_0": "a/norm"}
    )
    assert list(tree.flatten(variables)) == [
        "batch_stats/a/norm/mean", "batch_stats/a/norm/var", "params/a/Dense_0/bias", "params/a/Dense_0/kernel",
        "params/a/norm/bias", "params/a/norm/scale",
    ]  # fmt: skip
    same_bits(interop.from_flax(model, x, variables), (params, state))


def test_what_flax_has_not():
    model, x = layers.serial(layers.weight_norm(layers.dense(2))), jnp.zeros((1, 3))
    params, state = model.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"'dense_0' \(dense: bias \(2,\), .*\): nothing that Flax has"):
        interop.to_flax(model, x, params, state)
    with pytest.raises(TypeError, match=r"linen's variables or nnx.state\(module\), got Linear"):
        interop.from_flax(model, x, nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
