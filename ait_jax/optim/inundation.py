"""Gradient Inundation (AIT, CVPR 2022, section 4.2): updates that cross rounding thresholds."""

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ait_jax.optim.search import bisect_alphas, select_alphas
from ait_jax.optim.stored import (
    applied,
    as_stored,
    is_plain,
    largest_alpha,
    moved,
    scaled_update,
)

__all__ = ["GradientInundationState", "codes_needed", "gradient_inundation"]

_SEARCHES = ("bisect", "select")

# T * n is counted as an integer when it is one up to float32 rounding: 0.001 of 3,000 is 3.
_FRACTION_SLACK = 5e-7


class GradientInundationState(NamedTuple):
    """State of `gradient_inundation`.

    Attributes:
        count: int32 scalar, the number of updates so far (the argument of a `fraction` schedule).
        alpha: shaped like the params, one float32 scalar per tensor: the last factor applied.
        crossed: shaped like the params, one float32 scalar per tensor: the share of its
            `codes_fn` codes that the last update changed.
    """

    count: jax.Array  # type: ignore[assignment] # optax's name, which hides tuple.count
    alpha: Any
    crossed: Any


def codes_needed(fraction: float | jax.Array, sizes: jax.Array) -> jax.Array:
    """`ceil(fraction * n)` for tensors of n elements: float32 [...] -> int32 [...]."""
    return jnp.ceil(fraction * sizes * (1 - _FRACTION_SLACK)).astype(jnp.int32)


def _check_number(name: str, value: Any, allowed: str, ok: Callable[[float], bool]) -> None:
    # Traced and array values (inject_hyperparams) cannot be checked without a host sync.
    if isinstance(value, numbers.Number) and not ok(float(value)):  # type: ignore[arg-type]
        raise ValueError(f"{name} = {value!r} is not allowed: it must be {allowed}")


def _can_change(codes_fn: Callable[..., Any], shape: tuple[int, ...]) -> bool:
    """Whether codes of a tensor of that shape can change, as far as is known."""
    known = getattr(codes_fn, "can_change", None)
    return bool(known(shape)) if callable(known) else math.prod(shape) > 1


def _named(tree: Any) -> list[tuple[str, Any]]:
    """Tensors with their names, slash-separated."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, node in jax.tree.leaves_with_path(tree, is_leaf=_is_box)
        for leaf in jax.tree.leaves(node)
    ]


def _check_grids(codes_fn: Callable[..., Any], tensors: Iterable[tuple[str, Any]]) -> None:
    """Refuses tensors none of whose codes can change."""
    shapes = [(name or "params", tuple(getattr(w, "shape", ()))) for name, w in tensors]
    bad = []
    for name, shape in shapes:
        try:
            if not _can_change(codes_fn, shape):
                bad.append(f"{name} {shape}")
        except ValueError as error:  # A channel_axis that it has not got.
            raise ValueError(f"gradient_inundation cannot take {name} {shape}: {error}") from error
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            f"gradient_inundation cannot be applied to {', '.join(bad[:5])}{more}: each grid of "
            f"{codes_fn!r} holds a single value there, whose code never changes. Leave biases, "
            "norms and the like out with optax.masked, or choose a channel_axis that puts several "
            "values on a grid (None: one grid for the whole tensor). optax.flatten makes one "
            "vector of all tensors: end it before, as in "
            "optax.chain(optax.flatten(...), gradient_inundation(...))"
        )


# Above, what a tensor costs is its elements, and to stack it one more copy.
_SMALL = 1 << 16


def _grid_of(grids: Mapping[str, Any] | None, name: str) -> tuple[Any, ...]:
    """What `codes_fn` takes beside a tensor: the state of its grid, if there are any."""
    return () if grids is None else (grids.get(name),)


def _stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _alike(ws: list[jax.Array], us: list[jax.Array], grids: list[Any]) -> list[list[int]]:
    """Positions of tensors that can be counted as one: a search of many small ones is all calls."""
    groups: dict[Any, list[int]] = {}
    for i, (w, u, grid) in enumerate(zip(ws, us, grids)):
        shapes = tuple((x.shape, x.dtype) for x in jax.tree.leaves(grid))
        kind = (jax.tree.structure(grid), shapes)
        key = (w.shape, w.dtype, u.dtype, kind) if w.size <= _SMALL else i
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _is_live(u: jax.Array) -> jax.Array:
    """False for updates that no scaling can help: all zero, or not finite."""
    return jnp.all(jnp.isfinite(u)) & jnp.any(u != 0)


def _is_box(node: Any) -> bool:
    """True for what Flax wraps an array in: Linen's `Partitioned`, NNX's variables."""
    return hasattr(node, "unbox") or hasattr(node, "get_metadata")


def _per_tensor(tree: Any, scalars: Iterable[jax.Array]) -> Any:
    """`tree` with a scalar in place of each tensor and of its box, if it has one."""
    # A box may say how its array is sharded, and a scalar that inherits this is refused.
    scalars = iter(scalars)
    return jax.tree.map(
        lambda node: next(scalars) if jax.tree.leaves(node) else node, tree, is_leaf=_is_box
    )


def gradient_inundation(
    fraction: float | optax.Schedule,
    codes_fn: Callable[..., jax.Array],
    *,
    search: str = "bisect",
    bisect_steps: int | jax.Array = 5,
    max_doublings: int | jax.Array = 40,
) -> optax.GradientTransformationExtraArgs:
    """Scales each tensor's update so that a fraction of its integer codes change.

    For a tensor `w` of n elements with proposed update `u`, let `f(alpha)` be the share of codes
    with `c(w + alpha u) != c(w)`, where `c` is `codes_fn`. The update becomes `alpha u`, with alpha
    1 if `f(1) >= T`, and else by:

    - `search="bisect"` (the paper's): the first power of two with `f >= T`, then `bisect_steps`
      bisections of the interval below it, ended early within 1 % of T, on the side that satisfies
      `f(alpha) >= T`. Each `c(w + alpha u)` is taken on the grid of the moved weights, so f need
      not be monotone.
    - `search="select"`: the smallest alpha with which `ceil(T n)` codes change on the *frozen* grid
      of `w`, where f is monotone: the `ceil(T n)`-th smallest of `codes_fn.crossing_scale(w, u)`.
      One selection, no search; exact up to an overshoot of about 1e-4 that rounding demands.

    What is counted is what will be stored: `optax.apply_updates(w, alpha * u)` in the dtype of the
    parameter, bfloat16 and float16 included, under `jax.jit`, in `jax.lax.scan` and under
    `jax.vmap`. The inner state of transformations before it (momentum) never sees alpha.

    Warning:
        This must be the **last** element of a chain: it has to see the update that is really
        applied, learning rate, momentum and sign included. Anything after it breaks the guarantee.

        It holds for parameters that are stored. Inside one compiled program XLA may go on with the
        float32 values that it has not rounded yet: what else reads new bfloat16 or float16
        parameters there should read `jax.lax.optimization_barrier` of them, unless it is
        `WeightCodes`, which does.

    Edge cases, all defined: an all-zero update and one with NaN or inf pass unchanged, with
    alpha 1 and crossed 0. Where the fraction cannot be reached with any alpha up to
    `2**max_doublings`, the alpha (of those tried; for `"select"`, of all) that changes the most
    codes is used, the smallest such one; in float16, whose values end at 65,504, no alpha that
    would make one of them infinite. Tensors each of whose grids holds a single value (biases and
    norms' scales, where each channel has a grid) are refused. Those whose values are merely equal
    can only be seen at run time: their range is 0, whether a code changes is a matter of rounding,
    and alpha stays within its bound.

    Inside `optax.flatten` all tensors are one vector, with one share for all of them: `codes_fn`
    never sees a tensor's own grid. End it before: `optax.chain(optax.flatten(...),
    gradient_inundation(...))`.

    Args:
        fraction: T in (0, 1), a float or an optax schedule (called with the count of updates).
        codes_fn: maps a tensor to its integer codes, of the same shape; for example
            `ait_jax.quant.affine.WeightCodes`. It is applied to every tensor that this
            transformation sees: leave biases out with `optax.masked` or `optax.partition`. Under
            `jax.vmap`, over small tensors of one shape.
            `search="select"` needs a method `crossing_scale(w, u)` on it: for every element
            the smallest alpha > 0 at which its code changes on w's own grid, inf where it never
            does. A method `can_change(shape)`, if it has one, says whether the codes of tensors of
            a shape can change; without it only tensors of one element are refused.

            Where grids do not follow from the weights alone (frozen or learned ones), `update`
            takes their states, by the slash-separated names of the tensors, and hands each on:
            `update(updates, state, params, grids={"stem/kernel": grid, ...})` calls
            `codes_fn(w, grid)` and `crossing_scale(w, u, grid)`, with None for a name that is
            missing. `next_grids` are those that the new weights are put on, if an optimizer moves
            the grids in the same step: a code counts as changed if `codes_fn(w_new, next_grid)`
            differs from `codes_fn(w, grid)`; `search="select"` looks at `grids` alone.
        search: `"bisect"` or `"select"`.
        bisect_steps: bisections after the bracket is found; 0 keeps the power of two.
        max_doublings: alpha is at most `2**max_doublings` (0 to 126). The published code's bound
            is none, which never ends on a dead layer.

    Returns:
        A `GradientTransformationExtraArgs` whose state is a `GradientInundationState`. Other extra
        arguments of `update` than `grids` and `next_grids` are accepted and ignored.

    Raises:
        ValueError: at once, if `fraction`, `search`, `bisect_steps` or `max_doublings` is out of
            range, or if `search="select"` and `codes_fn` has no `crossing_scale`; in `init` and
            `update`, if there are tensors whose codes cannot change, by name and shape; in
            `update`, if `params` is not given.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from ait_jax.optim import gradient_inundation
        >>> from ait_jax.quant.affine import WeightCodes
        >>> tx = optax.chain(
        ...     optax.sgd(1e-4, momentum=0.9, nesterov=True),
        ...     gradient_inundation(0.01, WeightCodes(bits=4)),
        ... )
        >>> w = jax.random.normal(jax.random.key(0), (64, 10))
        >>> state = tx.init(w)
        >>> updates, state = tx.update(jnp.ones_like(w).at[:32].set(-1.0), state, w)
        >>> bool(optax.tree.get(state, "crossed") >= 0.01)
        True

        Biases left out, 8 bits for the first layer and 4 for the rest, by one group for each
        setting:

        >>> params = {
        ...     "stem": {"kernel": w, "bias": jnp.zeros(10)},
        ...     "head": {"kernel": w, "bias": jnp.zeros(10)},
        ... }
        >>> def group(path, leaf):
        ...     if path[-1].key != "kernel":
        ...         return "plain"
        ...     return "w8" if path[0].key == "stem" else "w4"
        >>> tx = optax.chain(
        ...     optax.adamw(1e-4),
        ...     optax.partition(
        ...         {
        ...             "w8": gradient_inundation(0.001, WeightCodes(8), search="select"),
        ...             "w4": gradient_inundation(0.001, WeightCodes(4), search="select"),
        ...             "plain": optax.identity(),
        ...         },
        ...         lambda params: jax.tree_util.tree_map_with_path(group, params),
        ...     ),
        ... )
        >>> state = tx.init(params)

        Under `optax.inject_hyperparams`, which takes every callable for a schedule, name the
        static arguments: `inject_hyperparams(gradient_inundation,
        static_args=("codes_fn", "search"))(fraction=..., codes_fn=...)`.

    References:
        Choi et al., "It's All In the Teacher: Zero-Shot Quantization Brought Closer to the
        Teacher", CVPR 2022, section 4.2 (arXiv 2203.17008).
    """
    if search not in _SEARCHES:
        raise ValueError(f"search = {search!r} is not allowed: it must be one of {_SEARCHES}")
    if not callable(codes_fn):
        raise ValueError(f"codes_fn = {codes_fn!r} is not allowed: it must be callable, w -> codes")
    if search == "select" and not callable(getattr(codes_fn, "crossing_scale", None)):
        raise ValueError(
            f"search = 'select' needs a codes_fn with a method crossing_scale(w, u), and "
            f"{codes_fn!r} has none: use WeightCodes, add the method, or set search = 'bisect'"
        )
    _check_number("fraction", fraction, "in (0, 1)", lambda x: 0 < x < 1)
    _check_number("bisect_steps", bisect_steps, "at least 0", lambda x: x >= 0)
    _check_number("max_doublings", max_doublings, "in 0..126", lambda x: 0 <= x <= 126)

    def init_fn(params):
        _check_grids(codes_fn, _named(params))

        def scalars(value):
            # Each an array of its own: shared ones could not be donated.
            new = [jnp.full((), value, jnp.float32) for _ in jax.tree.leaves(params)]
            return _per_tensor(params, new)

        return GradientInundationState(jnp.zeros((), jnp.int32), scalars(1.0), scalars(0.0))

    def update_fn(updates, state, params=None, *, grids=None, next_grids=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "gradient_inundation needs the parameters: call update(updates, state, params)"
            )
        count = state.count
        share = jnp.asarray(fraction(count) if callable(fraction) else fraction, jnp.float32)
        proposed = jax.tree.leaves(updates)
        treedef: Any = jax.tree.structure(updates)
        ws = treedef.flatten_up_to(params)
        if not proposed:
            return updates, state._replace(count=optax.safe_increment(count))
        _check_grids(codes_fn, ((name, w) for (name, _), w in zip(_named(updates), ws)))

        pairs = [as_stored(w, u) for w, u in zip(ws, proposed)]
        ws, us = [w for w, _ in pairs], [u for _, u in pairs]
        sizes = jnp.asarray([float(w.size) for w in ws], jnp.float32)
        needed = codes_needed(share, sizes)
        live = jnp.stack([_is_live(u) for u in us])
        names = [name for name, _ in _named(updates)]
        old = [_grid_of(grids, name) for name in names]
        new = old if next_grids is None else [_grid_of(next_grids, name) for name in names]
        codes = [codes_fn(w, *grid) for w, grid in zip(ws, old)]

        def count_changed(w, u, code, grid, alpha):
            new = moved(w, u, alpha)
            # A weight that overflows has no code; it must not pass for one that crossed.
            changed = (codes_fn(new, *grid) != code) & jnp.isfinite(new)
            count = jnp.sum(changed, dtype=jnp.int32)
            if is_plain(w, u):
                return count
            # Nor may others on its grid, which is as wide: float16 ends at 65,504.
            return jnp.where(jnp.all(jnp.isfinite(new)), count, 0)

        groups = _alike(ws, us, new)
        stacked = [
            [_stacked([arrays[i] for i in group]) for arrays in (ws, us, codes, new)]
            for group in groups
        ]

        def changed(alphas):
            """int32 [tensors]: codes that change, each counted on the grid of the moved weights."""
            counts: dict[int, jax.Array] = {}
            for group, arrays in zip(groups, stacked):
                own_alphas = jnp.stack([alphas[i] for i in group])
                own = jax.vmap(count_changed)(*arrays, own_alphas)  # type: ignore[call-arg]
                counts |= dict(zip(group, own))
            return jnp.stack([counts[i] for i in range(len(ws))])

        if search == "bisect":
            alphas = bisect_alphas(
                changed, needed, 1.01 * share * sizes, live, bisect_steps, max_doublings
            )
        else:
            crossing_scale = codes_fn.crossing_scale  # type: ignore[attr-defined]

            def changed_frozen(alphas):
                """int32 [tensors]: the same on the frozen grid, of what is really stored."""
                steps = [
                    applied(w, scaled_update(u, alphas[i])).astype(jnp.float32)
                    - w.astype(jnp.float32)
                    for i, (w, u) in enumerate(zip(ws, us))
                ]
                counts = [
                    jnp.sum(crossing_scale(w, step, *grid) <= 1, dtype=jnp.int32)
                    for w, step, grid in zip(ws, steps, old)
                ]
                return jnp.stack(counts)

            scales = [
                crossing_scale(w, u, *grid).astype(jnp.float32) for w, u, grid in zip(ws, us, old)
            ]
            bounds = None
            if not all(map(is_plain, ws, us)):
                bounds = jnp.stack([largest_alpha(w, u) for w, u in zip(ws, us)])
            alphas = select_alphas(
                scales, changed_frozen, needed, live, max_doublings, bounds=bounds
            )

        counts = changed(alphas).astype(jnp.float32)
        crossed = jnp.where(live, counts / jnp.maximum(sizes, 1), 0)
        scaled = [scaled_update(u, alphas[i]) for i, u in enumerate(us)]
        state = GradientInundationState(
            count=optax.safe_increment(count),
            alpha=_per_tensor(updates, alphas),
            crossed=_per_tensor(updates, crossed),
        )
        return treedef.unflatten(scaled), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
