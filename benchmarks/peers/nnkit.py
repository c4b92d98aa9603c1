"""nnkit: ``train.run_epoch``, which is what ``train.fit`` repeats."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.task import Arrays, Task
from nnkit import layers, losses, optim, train, tree

__all__ = ["Nnkit"]


class Nnkit:
    """One call of ``run_epoch`` an epoch, its shuffle and metrics included; ``fit`` checks the data once before."""

    def __init__(self, task: Task):
        self.task, self.data = task, task.on_device
        blocks = []
        if task.channels:
            image = (task.side, task.side, 1)
            blocks += [layers.stateless(lambda x: x.reshape(-1, *image), name="image")]
        for features in task.channels:
            blocks += [layers.conv(features, (3, 3)), layers.relu, layers.max_pool((2, 2))]
        if task.channels:
            blocks += [layers.flatten]
        for width in task.hidden:
            blocks += [layers.dense(width)]
            blocks += [layers.batch_norm()] if task.batch_norm else []
            blocks += [layers.relu]
            blocks += [layers.dropout(task.rate)] if task.rate else []
        model = layers.serial(*blocks, layers.dense(task.classes))
        self.trainer = train.trainer(model, losses.softmax_cross_entropy, optim.adam(task.learning_rate))
        ts = self.trainer.init(jax.random.key(task.seed), self.data[0][:1])
        given = task.first_parameters()
        self.ts = ts._replace(params=tree.map_with_path(lambda path, _: jnp.asarray(given[path]), ts.params))

    def epoch(self, order: np.ndarray | None = None) -> float:
        x, y = self.data
        if order is not None:
            x, y = x[jnp.asarray(order)], y[jnp.asarray(order)]
        self.ts, means = train.run_epoch(
            self.trainer,
            self.ts,
            (x, y),
            batch_size=self.task.batch_size,
            shuffle=order is None,
            drop_last=True,
        )
        jax.block_until_ready(self.ts)
        return means["loss"]

    def parameters(self) -> Arrays:
        return {path: np.array(value) for path, value in tree.flatten(self.ts.params).items()}
