"""Gradient Inundation under FSDP: weights and optimizer state in pieces, one on each device.

python examples/gi_fsdp.py trains a network with 4-bit weights on four virtual CPU devices, and then
on one. It prints how many codes of the whole kernels, all pieces together, change in a step without
Gradient Inundation and with it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

from ait_jax.optim import gradient_inundation
from ait_jax.quant.affine import WeightCodes, fake_quant_weight

IMAGES, LABELS = load_digits(return_X_y=True)
CODES = WeightCodes(bits=4)
FRACTION = 0.01  # T: of every kernel's codes so many are to change in every step
RATE = 1e-4  # too small for most weights to reach a rounding threshold


def fsdp(tree, mesh):
    """Shardings: the first axis of every tensor in pieces, scalars (such as GI's) as they are."""
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, PartitionSpec("data") if leaf.ndim else PartitionSpec()),
        tree,
    )


def loss_fn(params, x, y):
    """Cross entropy of a network with one hidden layer and rounded weights."""
    hidden = jax.nn.relu(x @ fake_quant_weight(params["hidden"], CODES.bits))
    logits = hidden @ fake_quant_weight(params["out"], CODES.bits)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def train(tx, params, devices, steps):
    """Returns the parameters, and the lowest share of codes that each step changed."""
    mesh = jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)
    shardings = fsdp((params, jax.eval_shape(tx.init, params)), mesh)
    params = jax.device_put(params, shardings[0])
    state = jax.jit(tx.init, out_shardings=shardings[1])(params)

    def step(params, state, x, y):
        grads = jax.grad(loss_fn)(params, x, y)
        # No collective of ours: sums over a sharded array are sums over all of it.
        updates, state = tx.update(grads, state, params)
        new = optax.apply_updates(params, updates)
        shares = [jnp.mean(CODES(new[name]) != CODES(params[name])) for name in params]
        return new, state, jnp.min(jnp.stack(shares))

    step = jax.jit(step, out_shardings=(*shardings, NamedSharding(mesh, PartitionSpec())))
    rng, shares = np.random.default_rng(0), []
    for _ in range(steps):
        rows = rng.integers(0, len(LABELS), 256)
        batch = IMAGES[rows].astype(np.float32) / 16, LABELS[rows]
        batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        params, state, share = step(params, state, *batch)
        shares.append(share)
    return params, np.array(shares)


def main(steps=40):
    """Returns, by the number of devices, the shares of each step, without and with."""
    params = {
        "hidden": jax.random.normal(jax.random.key(0), (64, 32)) / 8,
        "out": jax.random.normal(jax.random.key(1), (32, 10)) / 6,
    }
    plain = optax.adam(RATE)
    inundated = optax.chain(optax.adam(RATE), gradient_inundation(FRACTION, CODES))
    results = {}
    for devices in (jax.devices("cpu"), jax.devices("cpu")[:1]):
        name = f"{len(devices)} device(s)"
        shares = []
        for tx in (plain, inundated):
            trained, share = train(tx, params, devices, steps)
            shares.append(share)
        results[name] = tuple(shares)
        without, with_it = (f"{100 * s.min():.2f} to {100 * s.max():.2f} %" for s in shares)
        print(f"{name}: {without} of the codes change in a step, with GI {with_it}")
        piece = trained["hidden"].addressable_shards[0].data
        print(f"    of the kernel {trained['hidden'].shape} each device holds {piece.shape}")
    return results


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    main()
