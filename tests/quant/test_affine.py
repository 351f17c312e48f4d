"""The quantizer's grid, its straight-through gradients, and the activation ranges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ait_jax.quant import affine, ranges
from ait_jax.quant.affine import WeightCodes
from tests.support.fast_jit import users_jit

ALL_BITS = range(2, 9)
BAD_BITS = [1, 9, 0, -4, 2.5, 4.0, "4", None]
CODE_TOLERANCE = 1e-4  # of a code: what float32 may do to a value that lies on a threshold


def normal(seed, shape, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def positions(x, scale, zero_point):
    """Where `x` lies on a grid, in codes, in float64."""
    x, scale, zero_point = (np.asarray(a, np.float64) for a in (x, scale, zero_point))
    return scale * x - zero_point


def codes_at(position, bits):
    return np.clip(np.rint(position), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def assert_codes(actual, position, bits):
    """Codes are those of `position`, except that one on a threshold may fall on either side."""
    actual = np.asarray(actual)
    assert actual.dtype == np.int8
    off_threshold = np.abs(position - np.floor(position) - 0.5) > CODE_TOLERANCE
    assert off_threshold.mean() > 0.9
    np.testing.assert_array_equal(actual[off_threshold], codes_at(position, bits)[off_threshold])
    assert np.abs(actual - np.clip(position, *affine.code_limits(bits))).max() <= 0.5001


@pytest.mark.parametrize("bits", ALL_BITS)
def test_grid_follows_the_pinned_formulas(bits):
    lo, hi = np.float32([-1.3, 0.2, -5, 0, -2]), np.float32([2.1, 0.9, -4, 6, -1])
    scale, zero_point = affine.affine_params(lo, hi, bits)
    assert scale.dtype == zero_point.dtype == jnp.float32 and scale.shape == (5,)
    np.testing.assert_allclose(scale, (2**bits - 1) / (hi - lo), rtol=1e-6)
    np.testing.assert_array_equal(zero_point, np.rint(np.asarray(scale) * lo) + 2 ** (bits - 1))
    x = np.linspace(-7, 8, 60, dtype=np.float32)[:, None]
    codes = affine.quantize(x, scale, zero_point, bits)
    assert_codes(codes, positions(x, scale, zero_point), bits)
    assert affine.code_limits(bits) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert (codes.min(), codes.max()) == affine.code_limits(bits)


def test_rounds_half_to_even():
    scale, zero_point = affine.affine_params(-1.0, 2.0, 2)
    assert (float(scale), float(zero_point)) == (1.0, 1.0)
    codes = affine.quantize(jnp.array([-9, -1, -0.5, 0.5, 1.5, 2, 9]), scale, zero_point, 2)
    assert codes.tolist() == [-2, -2, -2, 0, 0, 1, 1]
    assert affine.dequantize(codes, scale, zero_point).tolist() == [-1, -1, -1, 1, 1, 2, 2]


@pytest.mark.parametrize("bits", ALL_BITS)
def test_codes_are_the_same_however_a_program_is_compiled(bits):
    # Weights within a few floats of a threshold, where one rounding or two decide.
    rng = np.random.default_rng(bits)
    lo, hi = -rng.uniform(0.5, 2, 500).astype(np.float32), rng.uniform(0.5, 2, 500)
    scale, zero_point = (np.asarray(part) for part in affine.affine_params(lo, hi, bits))
    low, high = affine.code_limits(bits)
    edges = (rng.integers(low, high, (60, 500)) + np.float64(0.5) + zero_point) / scale
    w = edges.astype(np.float32)
    for _ in range(2):
        w = np.where(rng.random(w.shape) < 0.5, np.nextafter(w, np.float32(9)), w)
        w = np.where(rng.random(w.shape) < 0.5, np.nextafter(w, np.float32(-9)), w)
    # One rounding, of the product; what follows is exact.
    by_numpy = np.clip(np.rint(np.float64(scale * w) - zero_point), low, high)
    one_by_one = affine.quantize(w, scale, zero_point, bits)
    compiled = users_jit(lambda w: affine.quantize(w, scale, zero_point, bits))(w)
    np.testing.assert_array_equal(one_by_one, by_numpy)
    np.testing.assert_array_equal(compiled, by_numpy)


def test_zero_is_not_forced_into_the_range():
    x = jnp.array([0.0, 1, 2, 3, 4])
    assert affine.fake_quant(x, 1.0, 4.0, 2).tolist() == [1, 1, 2, 3, 4]
    assert affine.affine_params(1.0, 4.0, 2)[1] == 3


@pytest.mark.parametrize("bits", ALL_BITS)
def test_steps_are_those_of_the_values(bits):
    x = normal(3, (50, 7), 3.0)
    values, steps = users_jit(lambda x: affine.fake_quant_steps(x, -1.1, 2.3, bits))(x)
    scale, zero_point = affine.affine_params(-1.1, 2.3, bits)
    np.testing.assert_array_equal(values, affine.fake_quant(x, -1.1, 2.3, bits))
    np.testing.assert_array_equal(steps, affine.steps(values, scale))
    np.testing.assert_array_equal(steps, affine.quantize(x, scale, zero_point, bits) + zero_point)
    # Of narrow values too, which are no exact multiples of the step any more.
    narrow, of_narrow = affine.fake_quant_steps(x.astype(jnp.bfloat16), -1.1, 2.3, bits)
    assert narrow.dtype == jnp.bfloat16 and of_narrow.dtype == jnp.float32
    assert float(jnp.max(jnp.abs(of_narrow - jnp.round(of_narrow)))) == 0


def test_steps_have_no_gradient():
    x = normal(4, (20,))
    gradient = jax.grad(lambda x: affine.fake_quant_steps(x, -1.0, 1.0, 4)[1].sum())(x)
    assert not gradient.any()


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize(
    ("shape", "channel_axis", "reduced"),
    [
        ((60, 5), -1, (0,)),
        ((60, 5), 0, (1,)),
        ((60, 5), (-1,), (0,)),
        ((60, 5), None, (0, 1)),
        ((6, 10, 5), (0, -1), (1,)),
    ],
)
def test_weight_grid_per_channel(bits, shape, channel_axis, reduced):
    w = normal(0, shape) * np.linspace(0.1, 3, 5, dtype=np.float32) + 0.2
    lo, hi = w.min(reduced, keepdims=True), w.max(reduced, keepdims=True)
    scale, zero_point = affine.weight_params(w, bits, channel_axis)
    assert scale.shape == zero_point.shape == lo.shape
    np.testing.assert_allclose(scale, (2**bits - 1) / (hi - lo), rtol=1e-6)
    np.testing.assert_array_equal(zero_point, np.rint(np.asarray(scale) * lo) + 2 ** (bits - 1))
    codes = affine.weight_codes(w, bits, channel_axis)
    assert_codes(codes, positions(w, scale, zero_point), bits)
    np.testing.assert_array_equal(WeightCodes(bits, channel_axis)(w), codes)
    values = (np.asarray(codes) + np.float64(zero_point)) / np.float64(scale)
    fake = affine.fake_quant_weight(w, bits, channel_axis)
    np.testing.assert_allclose(fake, values, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", ALL_BITS)
def test_error_is_at_most_half_a_step_inside_the_range(bits):
    x = np.random.default_rng(bits).uniform(-0.7, 1.9, (60, 5)).astype(np.float32)
    scale, zero_point = affine.affine_params(-0.7, 1.9, bits)
    fake = affine.dequantize(affine.quantize(x, scale, zero_point, bits), scale, zero_point)
    error = np.abs(np.asarray(fake) - x) * np.asarray(scale)
    # The ends of the range lie up to half a step outside the (rounded) grid.
    assert 0.45 < error.max() <= 0.5 + CODE_TOLERANCE


@pytest.mark.parametrize("value", [0.0, 0.7, -123.4, 1e-12])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_constant_channel_keeps_its_value(bits, value):
    w = normal(1, (60, 5))
    w[:, 1] = value
    scale, _ = affine.weight_params(w, bits)
    np.testing.assert_allclose(scale[0, 1], (2**bits - 1) / 1e-8, rtol=1e-6)
    fake = np.asarray(affine.fake_quant_weight(w, bits))
    np.testing.assert_allclose(fake[:, 1], value, rtol=3e-7, atol=1e-8)
    others = np.delete(fake, 1, 1)
    w[:, 1] = w[:, 0]
    np.testing.assert_array_equal(np.delete(affine.fake_quant_weight(w, bits), 1, 1), others)


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_use_the_float32_grid(bits, dtype):
    x = jnp.asarray(normal(2, (60, 5)), dtype)
    wide = x.astype(jnp.float32)
    fake = affine.fake_quant(x, -1.1, 0.9, bits)
    assert fake.dtype == dtype
    np.testing.assert_array_equal(fake, affine.fake_quant(wide, -1.1, 0.9, bits).astype(dtype))
    grid = affine.affine_params(-1.1, 0.9, bits)
    np.testing.assert_array_equal(
        affine.quantize(x, *grid, bits), affine.quantize(wide, *grid, bits)
    )
    for a, e in zip(affine.weight_params(x, bits), affine.weight_params(wide, bits), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a, e)
    np.testing.assert_array_equal(affine.weight_codes(x, bits), affine.weight_codes(wide, bits))
    assert affine.fake_quant_weight(x, bits).dtype == dtype


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_jit_equals_eager(bits):
    w = normal(3, (60, 5))
    eager = affine.weight_codes(w, bits)
    position = positions(w, *affine.weight_params(w, bits))
    assert_codes(eager, position, bits)
    assert_codes(users_jit(WeightCodes(bits))(w), position, bits)
    fake = users_jit(affine.fake_quant_weight, static_argnums=1)(w, bits)
    np.testing.assert_allclose(fake, affine.fake_quant_weight(w, bits), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fake_quant_gradient_is_straight_through(dtype):
    x = jnp.asarray([[-50.0, -1, 0.3], [0.9, 1.0, 70]], dtype)
    cotangent = jnp.asarray(normal(4, x.shape), dtype)
    lo, hi = jnp.array([-1.0, -1, 0]), jnp.array([1.0, 1, 2])
    fake, pullback = jax.vjp(lambda *a: affine.fake_quant(*a, 4), x, lo, hi)
    assert fake.dtype == dtype and (fake != x).any()
    grad_x, grad_lo, grad_hi = pullback(cotangent)
    assert grad_x.dtype == dtype
    np.testing.assert_array_equal(grad_x, cotangent)
    np.testing.assert_array_equal(grad_lo, np.zeros(3))
    np.testing.assert_array_equal(grad_hi, np.zeros(3))


@pytest.mark.parametrize("channel_axis", [-1, (0, 1), None])
def test_fake_quant_weight_gradient_is_identity(channel_axis):
    w, cotangent = normal(5, (9, 4)), normal(6, (9, 4))
    loss = lambda w: jnp.sum(cotangent * affine.fake_quant_weight(w, 3, channel_axis))  # noqa: E731
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(w), cotangent)


@pytest.mark.parametrize("bits", BAD_BITS)
@pytest.mark.parametrize(
    "call",
    [
        affine.check_bits,
        affine.code_limits,
        WeightCodes,
        lambda bits: affine.affine_params(0.0, 1.0, bits),
        lambda bits: affine.quantize(jnp.ones(2), 1.0, 0.0, bits),
        lambda bits: affine.fake_quant(jnp.ones(2), 0.0, 1.0, bits),
        lambda bits: affine.weight_params(jnp.ones(2), bits),
        lambda bits: affine.weight_codes(jnp.ones(2), bits),
        lambda bits: affine.fake_quant_weight(jnp.ones(2), bits),
    ],
)
def test_bad_bits_are_refused_by_value(call, bits):
    with pytest.raises(ValueError) as error:
        call(bits)
    assert f"bits = {bits!r} " in str(error.value) and "2..8" in str(error.value)


@pytest.mark.parametrize("channel_axis", [2, -3, (0, 5)])
@pytest.mark.parametrize("function", [affine.weight_params, affine.fake_quant_weight])
def test_bad_channel_axis_is_refused_by_value(function, channel_axis):
    with pytest.raises(ValueError) as error:
        function(jnp.ones((2, 3)), 4, channel_axis)
    assert repr(channel_axis) in str(error.value) and "-2..1" in str(error.value)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("channel_axis", [-1, None])
@pytest.mark.parametrize("size", [1e-7, 1e-3, 1.0, 1e4])
def test_crossing_scale_is_where_the_code_changes(bits, channel_axis, size):
    w, u = normal(bits, (60, 5)), normal(bits + 50, (60, 5), size)
    u[:4] = 0
    scale, zero_point = affine.weight_params(w, bits, channel_axis)
    start = positions(w, scale, zero_point)
    velocity = positions(u, scale, 0)
    codes = codes_at(start, bits)
    alpha = np.asarray(WeightCodes(bits, channel_axis).crossing_scale(w, u))
    assert alpha.dtype == np.float32 and (alpha > 0).all()

    crosses = codes_at(start + 1e30 * velocity, bits) != codes
    assert 0.6 < crosses.mean() < 1
    np.testing.assert_array_equal(np.isfinite(alpha), crosses)
    start, velocity, codes, alpha = (a[crosses] for a in (start, velocity, codes, alpha))
    assert (codes_at(start + alpha * (1 + 1e-3) * velocity, bits) != codes).all()
    before = alpha * (1 - 1e-3) - CODE_TOLERANCE / np.abs(velocity)
    still = before > 0
    assert still.mean() > 0.9
    assert (codes_at(start + before * velocity, bits) == codes)[still].all()


@pytest.mark.parametrize("bits", ALL_BITS)
def test_crossing_scale_overshoots_float32_rounding(bits):
    w, u = normal(bits, (60, 5)) + 0.5, normal(bits + 20, (60, 5), 1e-3)
    codes_fn = WeightCodes(bits)
    alpha = codes_fn.crossing_scale(w, u)
    moved = affine.quantize(w + alpha * u, *affine.weight_params(w, bits), bits)
    assert bool(((moved != codes_fn(w)) | jnp.isinf(alpha)).all())


def test_crossing_scale_on_ties():
    # Positions -2, -1.5, -0.5, 1 of a grid of unit steps: codes -2, -2, 0, 1.
    w = np.tile(np.float32([[0], [0.5], [1.5], [3]]), (15, 5))
    codes_fn = WeightCodes(2)
    for direction, expected in [(1, [0.5, 0, 1, np.inf]), (-1, [np.inf, np.inf, 0, 0.5])]:
        alpha = np.asarray(codes_fn.crossing_scale(w, np.full_like(w, direction)))
        np.testing.assert_allclose(alpha, np.tile(np.array(expected)[:, None], (15, 5)), atol=1e-5)
        assert (alpha > 0).all()
    assert np.isinf(codes_fn.crossing_scale(w, np.zeros_like(w))).all()


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_crossing_scale_of_a_direction_that_is_not_finite_is_inf(value):
    w, u = normal(7, (60, 5)), normal(8, (60, 5))
    u[3, 1] = value
    alpha = WeightCodes(4).crossing_scale(w, u)
    u[3, 1] = 0
    np.testing.assert_array_equal(alpha, WeightCodes(4).crossing_scale(w, u))
    assert alpha[3, 1] == np.inf and np.isfinite(alpha).mean() > 0.5


@pytest.mark.parametrize("value", [0.0, 0.7, -3.0])
def test_crossing_scale_of_a_constant_tensor(value):
    w, u = np.full((60, 5), value, np.float32), normal(8, (60, 5), 1e-3)
    codes_fn = WeightCodes(4)
    alpha = codes_fn.crossing_scale(w, u)
    assert bool((alpha > 0).all()) and bool(jnp.isfinite(alpha).any())
    moved = affine.quantize(w + alpha * u, *affine.weight_params(w, 4), 4)
    assert bool(((moved != codes_fn(w)) | jnp.isinf(alpha)).all())
    if value == 0:  # code -8 of a grid of 1e-8: only upwards, half a step
        expected = np.where(u > 0, 0.5e-8 / 15 / u, np.inf)
        np.testing.assert_allclose(alpha, expected, rtol=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.99])
def test_ranges_are_the_plain_weighted_mean(decay):
    history = np.stack([normal(9, (40, 3)) - 1, normal(10, (40, 3)) + 4])

    def step(state, batch):
        state = ranges.updated_bounds(state, batch[0], batch[1], decay)
        return state, (ranges.range_bounds(state), state.weight)

    _, (bounds, weight) = jax.lax.scan(step, ranges.init_ranges(3), history.swapaxes(0, 1))
    t = np.arange(1, 41)
    np.testing.assert_allclose(weight, 1 - decay**t, rtol=1e-5)
    for n in t:
        weights = np.float64(decay) ** np.arange(n - 1, -1, -1)
        mean = np.einsum("i,kij->kj", weights / weights.sum(), history[:, :n])
        np.testing.assert_allclose([b[n - 1] for b in bounds], mean, rtol=1e-4, atol=1e-5)
    first = [b[0] for b in bounds]
    np.testing.assert_allclose(first, history[:, 0], rtol=3e-7)  # x * 0.1 / 0.1 may round


def test_ranges_of_a_constant_input_never_inflate():
    state = ranges.init_ranges(1)
    assert np.isnan(ranges.range_bounds(state)).all()
    for _ in range(25):  # the published code is 3,900 times too wide around the 21st
        state = ranges.updated_bounds(state, jnp.array([0.5]), jnp.array([6.0]), 0.9)
        np.testing.assert_allclose(np.ravel(ranges.range_bounds(state)), [0.5, 6], rtol=1e-5)
    lo, hi = ranges.range_bounds(ranges.fixed_ranges([0.5, -1], [6.0, 3]))
    assert lo.tolist() == [0.5, -1] and hi.tolist() == [6, 3]


def test_scales_of_ranges_are_the_same_in_every_program():
    # One after another as a network reads its sites, all at once, and without jit.
    sites = 100
    lo, hi = -np.exp(normal(11, (sites,))), np.exp(normal(12, (sites,)))
    state = ranges.ActivationRanges(jnp.asarray(lo), jnp.asarray(hi), jnp.float32(0.1))

    def at_once(state):
        return affine.affine_params(*ranges.range_bounds(state), 8)

    def one_by_one(state):
        each = [at_once(ranges.ActivationRanges(*at, state.weight)) for at in zip(*state[:2])]
        return [jnp.stack(part) for part in zip(*each)]

    bounds = [np.asarray(bound) for bound in ranges.range_bounds(state)]
    expected = np.asarray(affine.affine_params(*bounds, 8))
    np.testing.assert_array_equal(users_jit(at_once)(state), expected)
    np.testing.assert_array_equal(users_jit(one_by_one)(state), expected)
