from ait_jax.zero_shot import GeneratorOutputs as GeneratorOutputs
from ait_jax.zero_shot import QuantizedTensor as QuantizedTensor
from ait_jax.zero_shot import StudentOutputs as StudentOutputs
from ait_jax.zero_shot import ZeroShotResult as ZeroShotResult
from ait_jax.zero_shot import load_result as load_result
from ait_jax.zero_shot import zero_shot_quantize as zero_shot_quantize

__version__: str
__all__: list[str]
