"""Angles, Hessians and directions of functions of a pytree of parameters, networks aside.

Sources: Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1990); Lanczos
with full reorthogonalisation, as in Golub and Van Loan, "Matrix Computations", chapter 10; filter
normalisation from Li et al., "Visualizing the Loss Landscape of Neural Nets" (NeurIPS 2018),
section 4.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "Eigenvalue",
    "Estimate",
    "cosine",
    "curvature_along",
    "dot",
    "estimate",
    "filter_normalise",
    "hutchinson",
    "hvp",
    "lanczos",
    "random_like",
]


def dot(a: Any, b: Any) -> jax.Array:
    """The inner product of two pytrees of the same structure: a float32 scalar."""
    products = jax.tree.map(lambda x, y: jnp.vdot(x, y).astype(jnp.float32), a, b)
    return jnp.sum(jnp.stack(jax.tree.leaves(products)))


def cosine(product: float, first: float, second: float) -> float:
    """The cosine of an angle, from inner products.

    Args:
        product: of the two vectors.
        first: of the first one with itself.
        second: of the second one with itself.

    Returns:
        A number in [-1, 1]; NaN where a vector is zero.
    """
    norms = math.sqrt(first) * math.sqrt(second)
    return max(-1.0, min(1.0, product / norms)) if norms > 0 else math.nan


def hvp(fn: Callable[..., jax.Array], params: Any, vector: Any, *args: Any) -> Any:
    """The Hessian of `fn(params, *args)` in `params`, times a vector: forward over reverse.

    Args:
        fn: returns a scalar. It must be differentiable twice: no custom_vjp on the way.
        params: where.
        vector: a pytree like `params`.
        *args: of `fn`, constants.

    Returns:
        A pytree like `params`.
    """
    gradient = jax.grad(lambda p: fn(p, *args))
    return jax.jvp(gradient, (params,), (vector,))[1]


def curvature_along(
    fn: Callable[..., jax.Array], params: Any, vector: Any, *args: Any
) -> jax.Array:
    """`v^T H v` of every output of `fn(params, *args)`: forward over forward.

    Without a backward pass it costs a third of `hvp`, and several functions that share most of
    their work, such as the losses of the same logits, cost no more than one.

    Args:
        fn: returns an array; differentiable twice, as for `hvp`.
        params: where.
        vector: v, a pytree like `params`.
        *args: of `fn`, constants.

    Returns:
        The second derivative along v, of the shape of what `fn` returns.
    """

    def slope(p):
        return jax.jvp(lambda q: fn(q, *args), (p,), (vector,))[1]

    return jax.jvp(slope, (params,), (vector,))[1]


def random_like(tree: Any, key: jax.Array, draw: Callable[..., jax.Array]) -> Any:
    """A pytree like `tree` of random numbers, each leaf with a key of its own.

    Args:
        tree: arrays.
        key: of all of it.
        draw: such as `jax.random.normal` or `jax.random.rademacher`.
    """
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    drawn = [draw(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves)]
    return jax.tree.unflatten(structure, drawn)


class Estimate(NamedTuple):
    """A mean and how far it can be trusted.

    Attributes:
        mean: of the samples.
        standard_error: of that mean; NaN of a single sample.
    """

    mean: float
    standard_error: float


def estimate(samples: np.ndarray) -> Estimate:
    """Mean and standard error of independent samples, [N]."""
    spread = np.std(samples, ddof=1) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
    return Estimate(float(np.mean(samples)), float(spread))


def hutchinson(
    quadratic: Callable[[Any], Any], like: Any, probes: int, key: jax.Array
) -> np.ndarray:
    """Samples of `v^T H v` for Rademacher vectors v; their mean estimates the trace of H.

    The variance of a sample is `2 * sum of H_ij^2 over i != j`: of a diagonal H each sample is the
    trace itself. The loop is Python's: XLA on CPU has no fast convs within loops.

    Args:
        quadratic: `v -> v^T H v`, a scalar, or an array of them for several H.
        like: the pytree that v looks like.
        probes: how many vectors.
        key: of all of them.

    Returns:
        float64 [probes, ...].

    Raises:
        ValueError: if `probes` is less than 1.
    """
    if probes < 1:
        raise ValueError(f"probes = {probes} is not allowed: it must be at least 1")
    keys = jax.random.split(key, probes)
    samples = [quadratic(random_like(like, k, jax.random.rademacher)) for k in keys]
    return np.asarray(jax.device_get(samples), np.float64)


class Eigenvalue(NamedTuple):
    """An eigenvalue of a symmetric matrix.

    Attributes:
        value: the largest one that was found (the largest, not the largest in size).
        residual: `|H v - value v|` for its unit vector: an eigenvalue lies within it.
        smallest: the smallest that was found on the way, with no claim of its being exact.
        iterations: products with the matrix.
    """

    value: float
    residual: float
    smallest: float
    iterations: int


def lanczos(
    matvec: Callable[[np.ndarray], np.ndarray],
    size: int,
    key: jax.Array,
    *,
    max_iterations: int,
    tolerance: float = 1e-3,
) -> Eigenvalue:
    """The top eigenvalue of a symmetric matrix that is known by its products alone.

    Args:
        matvec: `v -> H v`, float [size] each.
        size: rows of H.
        key: of the first vector.
        max_iterations: at most so many products.
        tolerance: ends as soon as the residual is that share of the eigenvalue's size.

    Returns:
        The eigenvalue; where `max_iterations` are not enough, its residual says so.

    Raises:
        ValueError: if `max_iterations` is less than 1.
    """
    if max_iterations < 1:
        raise ValueError(f"max_iterations = {max_iterations} is not allowed: at least 1")
    vector = np.asarray(jax.random.normal(key, (size,)), np.float64)
    basis = [vector / np.linalg.norm(vector)]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        image = np.asarray(matvec(basis[-1]), np.float64)
        diagonal.append(float(basis[-1] @ image))
        known = np.stack(basis)
        for _ in range(2):  # Once loses digits to cancellation, twice is enough.
            image = image - known.T @ (known @ image)
        rest = float(np.linalg.norm(image))
        values, vectors = np.linalg.eigh(
            np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        )
        residual = rest * abs(float(vectors[-1, -1]))
        found = Eigenvalue(float(values[-1]), residual, float(values[0]), len(diagonal))
        done = residual <= tolerance * abs(found.value)
        if done or len(diagonal) in (max_iterations, size):
            return found
        beside.append(rest)
        basis.append(image / rest)


def filter_normalise(direction: Any, params: Any) -> Any:
    """A direction whose every filter is as long as the network's (Li et al. 2018, section 4).

    Args:
        direction: a pytree like `params`.
        params: the network's; a filter is what leads to one output: an index of the last axis.

    Returns:
        The scaled direction; zero for what is no kernel (biases, batch norms; rank below 2), which
        is left where it is, and for filters that are zero in the network.
    """

    def scaled(d, p):
        if p.ndim < 2:
            return jnp.zeros_like(d)
        axes = tuple(range(p.ndim - 1))
        wanted = jnp.sqrt(jnp.sum(jnp.square(p), axes))
        has = jnp.sqrt(jnp.sum(jnp.square(d), axes))
        return d * jnp.where(has > 0, wanted / jnp.where(has > 0, has, 1), 0)

    return jax.tree.map(scaled, direction, params)
