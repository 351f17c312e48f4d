"""A `jit` for tests that run a program for milliseconds: compiling is all that takes time."""

import functools

import jax
import jax.numpy as jnp

_OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
try:
    jax.jit(jnp.negative, compiler_options=_OPTIONS)(1.0)
except jax.errors.JaxRuntimeError:  # another jax, another platform
    _OPTIONS = {}
fast_jit = functools.partial(jax.jit, compiler_options=_OPTIONS)
