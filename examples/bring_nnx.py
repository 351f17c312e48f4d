"""Mamba-2 in Flax NNX (`pip install mamba2-jax`), reading an image row by row: no batch norms.

The module is left as it is; what is quantized is a copy in inference mode (`model.eval()`).
"""

from digits import DIGITS, train_nnx
from flax import nnx
from mamba2_jax import Mamba2Forecaster

import ait_jax

sizes = {"d_model": 32, "n_layers": 2, "d_state": 8, "headdim": 8}
mamba = Mamba2Forecaster(8, output_dim=10, forecast_horizon=1, **sizes, rngs=nnx.Rngs(0))
model = train_nnx(nnx.Sequential(lambda x: x[..., 0], mamba, lambda y: y[:, 0]))
result = ait_jax.zero_shot_quantize(model, weight_bits=3, activation_bits=4, **DIGITS)
print(result)
