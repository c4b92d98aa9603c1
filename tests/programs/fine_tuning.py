"""Fine-tuning: a network trained on digits 0 to 4 lends its frozen first layers to 5 to 9."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from nnkit import layers, losses, metrics, optim, train
from tests.programs import digits


def main() -> tuple[float, bool]:
    """Test accuracy on the new classes, and whether the frozen part stayed as it was."""
    x, y, x_test, y_test = digits.arrays()
    backbone = layers.serial(layers.dense(64), layers.batch_norm(momentum=0.9), layers.relu)
    old, new = y < 5, y >= 5

    first = train.trainer(
        layers.serial(backbone=backbone, head=layers.dense(5)), losses.softmax_cross_entropy, optim.adam(3e-3)
    )
    before, _ = train.fit(first, (x[old], y[old]), epochs=10, key=jax.random.key(0))

    model = layers.serial(backbone=layers.frozen(backbone), head=layers.dense(5))
    second = train.trainer(model, losses.softmax_cross_entropy, optim.adam(1e-2))
    start = second.init(jax.random.key(1), x[:1])
    start = start._replace(params={**start.params, "backbone": before.params["backbone"]}, state=before.state)
    after, _ = train.fit(second, (x[new], y[new] - 5), epochs=10, state=start)

    same = jax.tree.map(jnp.array_equal, after.params["backbone"], before.params["backbone"])
    logits = train.predict(model, after.params, after.state, x_test[y_test >= 5])
    accuracy = metrics.accuracy(logits, jnp.asarray(y_test[y_test >= 5] - 5)).mean()
    return float(accuracy), all(jax.tree.leaves(same)) and bool(jax.tree.leaves(same))
