"""Initial values of parameters: ``(key, shape, dtype=float32) -> array``.

``zeros`` and ``ones`` are initializers; all others return one: ``he_normal()(key, shape)``. Kernels
have their outputs last, ``(..., in, out)``. Everything equals ``jax.nn.initializers`` (JAX 0.10.2) bit
for bit under the same key and dtype; the other conventions are named:

==========================================  ========================================================
PyTorch's kaiming and xavier normals        ``truncated=False`` (the uniform ones are the same)
PyTorch's Linear and Conv, U(±1/√fan_in)    ``variance_scaling(1 / 3, "fan_in", "uniform")``
the lecture's Xavier, N(0, 1/(in + out))    ``xavier_normal(mode="fan_sum", truncated=False)``
Flax's embedding, N(0, 1/features)          ``lecun_normal(in_axis=1, out_axis=0, truncated=False)``
==========================================  ========================================================

A scale may be a traced value, so that a sweep can map over it; a plain number must be finite and not
negative (ValueError). A dtype must be floating-point, and whatever draws needs a typed key (TypeError).
A shape with a 0 in it gives an empty array.
"""

from nnkit.initializers.fans import fans
from nnkit.initializers.plain import constant, normal, ones, orthogonal, truncated_normal, uniform, zeros
from nnkit.initializers.scaled import (
    glorot_normal,
    glorot_uniform,
    he_normal,
    he_uniform,
    kaiming_normal,
    kaiming_uniform,
    lecun_normal,
    lecun_uniform,
    variance_scaling,
    xavier_normal,
    xavier_uniform,
)

__all__ = [
    "constant",
    "fans",
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "kaiming_normal",
    "kaiming_uniform",
    "lecun_normal",
    "lecun_uniform",
    "normal",
    "ones",
    "orthogonal",
    "truncated_normal",
    "uniform",
    "variance_scaling",
    "xavier_normal",
    "xavier_uniform",
    "zeros",
]
