"""Every layer of the catalog, and a trainer, with its batch split over 8 virtual devices.

A process has as many devices as it started with, so test_properties.py starts this one beside its own:

    python -m tests.layers.on_a_mesh
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import pytest

from nnkit.testing import ConformanceError
from nnkit.testing.layer import mesh
from nnkit.testing.trainer import mesh as trainer_mesh


def main(only: list[str]) -> int:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    assert len(jax.devices()) == 8
    # These make arrays when they are imported, which starts the devices.
    from tests.catalog import LAYERS
    from tests.testing.test_check_others import BATCH, RIGHT
    from tests.testing.wrong_layers import ON_A_MESH

    wrong, rows = [], [row for row in LAYERS if not only or row.name in only]
    for row in rows:
        try:
            result = mesh(row.layer, row.x, random=row.random, mixes_batch=row.mixes_batch)
            if result.status != "passed":
                wrong.append(f"{row.name}: {result}")
        except ConformanceError as error:
            wrong.append(f"{row.name}: {error}")
    trainer_mesh(RIGHT, BATCH)
    with pytest.raises(ConformanceError, match="on 8 devices with train=True differs"):
        mesh(ON_A_MESH, BATCH[0][:, :1] * jnp.arange(4.0))
    print("\n\n".join(wrong) or f"{len(rows)} layers agree on 8 devices")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
