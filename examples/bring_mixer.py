"""An MLP-Mixer of the package jax-models (`pip install jax-models`): no batch norms.

Its arguments in inference are attributes here: `deterministic=True`.
"""

from digits import DIGITS, train
from jax_models.models.mlp_mixer import MLPMixer

import ait_jax

sizes = {"hidden_size": 32, "channels_dim": 64, "tokens_dim": 32}
model = MLPMixer(2, num_classes=10, attach_head=True, deterministic=True, **sizes)
variables = train(model)
result = ait_jax.zero_shot_quantize(model, variables, weight_bits=3, activation_bits=4, **DIGITS)
print(result)
