"""Variables of our networks from those recorded of PyTorch modules."""

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


class _Recorded:
    """A recorded PyTorch state dict, read in our layouts."""

    def __init__(self, arrays, prefix):
        self._arrays, self._prefix = arrays, prefix

    def get(self, name):
        return jnp.asarray(self._arrays[self._prefix + name])

    def has(self, name):
        return self._prefix + name in self._arrays

    def conv(self, name):
        return {
            "kernel": conv_kernel(self.get(name + ".weight")),
            "bias": self.get(name + ".bias"),
        }

    def dense_to_map(self, name, side):
        """A dense layer whose output PyTorch reshapes to [channels, side, side], ours after it."""
        weight = self.get(name + ".weight")
        channels = len(weight) // side**2
        kernel = weight.reshape(channels, side, side, -1).transpose(3, 1, 2, 0)
        bias = self.get(name + ".bias").reshape(channels, side, side).transpose(1, 2, 0)
        return {"dense": {"kernel": kernel.reshape(len(kernel), -1), "bias": bias.reshape(-1)}}

    def running(self, name):
        return {
            "mean": self.get(name + ".running_mean"),
            "var": self.get(name + ".running_var"),
        }

    def norm(self, name):
        """Scale and bias of a batch norm, or their tables."""
        if self.has(name + ".weights.weight"):
            return {
                "scale": self.get(name + ".weights.weight"),
                "bias": self.get(name + ".biases.weight"),
            }
        return {"scale": self.get(name + ".weight"), "bias": self.get(name + ".bias")}


def trunk_variables(arrays, prefix, image_size):
    """GDFQ's or Qimera's generator, in either form, from a recorded PyTorch state dict."""
    recorded = _Recorded(arrays, prefix)
    conditional = recorded.has("conv_blocks0_0.running_mean")
    dot = "_" if conditional else "."
    norms = {"stem_bn": f"conv_blocks0{dot}0", "bn1": f"conv_blocks1{dot}1"}
    norms["bn2"] = f"conv_blocks2{dot}1"
    params = {
        "stem": recorded.dense_to_map("l1.0", image_size // 4),
        "up1": recorded.conv(f"conv_blocks1{dot}0"),
        "up2": recorded.conv(f"conv_blocks2{dot}0"),
        "to_image": recorded.conv(f"conv_blocks2{dot}3"),
        **{ours: recorded.norm(theirs) for ours, theirs in norms.items()},
    }
    if recorded.has("label_emb.weight"):
        params["embedding"] = {"embedding": recorded.get("label_emb.weight")}
    stats = {ours: recorded.running(theirs) for ours, theirs in norms.items()}
    if conditional:
        stats = {ours: {"norm": running} for ours, running in stats.items()}
    stats["image_bn"] = recorded.running(f"conv_blocks2{dot}5")
    return {"params": params, "batch_stats": stats}


def arc_variables(arrays, prefix, image_size, genotype):
    """ARC's generator from a recorded PyTorch state dict."""
    recorded = _Recorded(arrays, prefix)
    params = {
        f"latent{i}": recorded.dense_to_map(f"l{i + 1}", image_size // scale)
        for i, scale in enumerate((8, 4, 2))
    }
    stats = {}

    def norm_act_conv(norm, conv):
        return (
            {"norm": recorded.norm(norm), "conv": recorded.conv(conv)},
            {"norm": {"norm": recorded.running(norm)}},
        )

    for i in range(3):
        theirs = f"cell{i}."
        edges = {f"up{j}": (f"up{j}.ups.0", "c.1") for j in range(2)}
        edges |= {
            f"op{j}": (f"c{j}.ops.0", "dilconv" if kind[0] == "d" else "conv")
            for j, kind in enumerate(genotype.ops[i])
            if kind != "none"
        }
        if i:
            edges |= {
                f"cross{j}": (f"up{j}_c01.ups_cross.0", "c.1")
                for j, kind in enumerate(genotype.cross[i - 1])
                if kind != "0"
            }
        parts = {
            name: norm_act_conv(f"{theirs}{path}.conditional_bn", f"{theirs}{path}.{conv}")
            for name, (path, conv) in edges.items()
        }
        params[f"cell{i}"] = {name: part[0] for name, part in parts.items()}
        stats[f"cell{i}"] = {name: part[1] for name, part in parts.items()}
    params["head_norm"] = recorded.norm("to_rgb_conditional_bn")
    params["to_image"] = recorded.conv("to_rgb.1")
    stats["head_norm"] = {"norm": recorded.running("to_rgb_conditional_bn")}
    stats["image_bn"] = recorded.running("to_rgb.3")
    return {"params": params, "batch_stats": stats}
