"""`jit` for tests: compiled at once, or as users' programs are."""

import functools

import jax
import jax.numpy as jnp

__all__ = ["fast_jit", "users_jit"]


def _jit_with(**options):
    """`jax.jit` with such options of XLA; without them on another jax, another platform."""
    try:
        jax.jit(jnp.negative, compiler_options=options)(1.0)
    except jax.errors.JaxRuntimeError:
        return jax.jit
    return functools.partial(jax.jit, compiler_options=options)


# For programs that run for milliseconds: compiling is all that takes time.
fast_jit = _jit_with(xla_backend_optimization_level=0, xla_cpu_use_fusion_emitters=False)
# For numbers that must be the same however a program is compiled; see `quick_xla`.
users_jit = _jit_with(
    xla_backend_optimization_level=3,
    xla_cpu_use_fusion_emitters=True,
    xla_llvm_disable_expensive_passes=False,
)
