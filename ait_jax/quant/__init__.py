"""Quantization: the grid (`affine`), ranges, policy, and the transforms of Linen models.

`ait_jax.quant.affine` depends on jax alone; import it directly where nothing else is wanted.
"""
