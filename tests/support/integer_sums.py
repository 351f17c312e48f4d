"""Sums of products of integer codes, worked out in numpy."""

import numpy as np


def products_by_hand(form, x, w):
    """In float64, exact for integers below 2**53, tap by tap; zeros beyond the edges."""
    x, w = x.astype(float), w.astype(float)
    axes = len(form.strides)
    if not axes:
        return np.tensordot(x, w, form.inputs)
    size = form.output_size(x.shape[1 : 1 + axes], w.shape)
    for axis, apart in enumerate(form.places_apart, start=1):
        zeros = np.repeat(np.arange(1, x.shape[axis]), apart - 1)
        x = np.insert(x, zeros, 0, axis)
    # Negative padding takes away.
    x = np.pad(x, ((0, 0), *((max(a, 0), max(b, 0)) for a, b in form.padding), (0, 0)))
    for axis, (a, b) in enumerate(form.padding, start=1):
        x = x.take(range(max(-a, 0), x.shape[axis] - max(-b, 0)), axis)
    total = 0
    for tap in np.ndindex(w.shape[:axes]):
        seen = x
        for axis, (i, d, n, s) in enumerate(zip(tap, form.dilation, size, form.strides), start=1):
            seen = seen.take(range(i * d, i * d + (n - 1) * s + 1, s), axis)
        groups = np.split(seen, form.groups, -1), np.split(w[tap], form.groups, -1)
        total = total + np.concatenate([a @ b for a, b in zip(*groups)], -1)
    return total
