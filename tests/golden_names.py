"""The names of the recorded PyTorch modules, and ours."""

import jax
import jax.numpy as jnp
import numpy as np

# The twenty kernels of ResNet-20 in the order of execution.
RESNET20_KERNELS = [
    "stem_conv/kernel",
    *(
        f"stage{stage}_block{block}/conv{conv}/kernel"
        for stage in (1, 2, 3)
        for block in range(3)
        for conv in (1, 2)
    ),
    "classifier/kernel",
]


def conv_kernel(w):
    """[out, in, h, w] -> [h, w, in, out]."""
    return np.transpose(w, (2, 3, 1, 0))


def gdfq_variables(arrays, prefix, image_size):
    """GDFQ's generator (CIFAR form) from a recorded PyTorch state dict."""

    def get(name):
        return arrays[prefix + name]

    side = image_size // 4
    # PyTorch reshapes the dense output to [128, side, side], ours to [side, side, 128].
    stem = get("l1.0.weight").reshape(128, side, side, -1).transpose(3, 1, 2, 0)
    norms = {
        "stem_bn": "conv_blocks0.0",
        "bn1": "conv_blocks1.1",
        "bn2": "conv_blocks2.1",
        "image_bn": "conv_blocks2.5",
    }
    params = {
        "embedding": {"embedding": get("label_emb.weight")},
        "stem": {
            "dense": {
                "kernel": stem.reshape(stem.shape[0], -1),
                "bias": get("l1.0.bias").reshape(128, side, side).transpose(1, 2, 0).reshape(-1),
            }
        },
        "up1": {
            "kernel": conv_kernel(get("conv_blocks1.0.weight")),
            "bias": get("conv_blocks1.0.bias"),
        },
        "up2": {
            "kernel": conv_kernel(get("conv_blocks2.0.weight")),
            "bias": get("conv_blocks2.0.bias"),
        },
        "to_image": {
            "kernel": conv_kernel(get("conv_blocks2.3.weight")),
            "bias": get("conv_blocks2.3.bias"),
        },
    }
    for ours, theirs in norms.items():
        if ours != "image_bn":
            params[ours] = {"scale": get(theirs + ".weight"), "bias": get(theirs + ".bias")}
    batch_stats = {
        ours: {"mean": get(theirs + ".running_mean"), "var": get(theirs + ".running_var")}
        for ours, theirs in norms.items()
    }
    return jax.tree.map(jnp.asarray, {"params": params, "batch_stats": batch_stats})
