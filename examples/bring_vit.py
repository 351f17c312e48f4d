"""A transformer of images (`pip install transformer-in-transformer-flax`).

LayerNorm, GELU, attention. Each head's features have grids of their own; the products of queries
and keys are of two activations, no kernels.
"""

from digits import DIGITS, train
from transformer_in_transformer_flax import TNTConfig, TransformerInTransformer

import ait_jax

patches = {"image_size": 8, "patch_size": 4, "transformed_patch_size": 2, "depth": 2}
inner = {"inner_dim": 8, "inner_heads": 2, "inner_dim_head": 4}
outer = {"outer_dim": 32, "outer_heads": 4, "outer_dim_head": 8}
model = TransformerInTransformer(TNTConfig(num_classes=10, **patches, **inner, **outer))
variables = train(model)
result = ait_jax.zero_shot_quantize(model, variables, weight_bits=3, activation_bits=4, **DIGITS)
print(result)
