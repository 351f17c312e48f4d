"""The program, whose teacher becomes NaN in the memory of this process in mid-run.

    python -m experiments.faults.poisoned --config=configs/quickstart.py --workdir=/tmp/poisoned

Files, fingerprints and the other processes are sound.
"""

if __name__ == "__main__":
    from ait_jax.cpu.huge_pages import restart_with_huge_pages

    restart_with_huge_pages()  # Before anything heavy is imported.

from typing import Any

import jax
import numpy as np

from ait_jax import main as program
from ait_jax.training import loop
from ait_jax.training.state import AITState

__all__ = ["PoisonedRun"]

_STEP = 13


class PoisonedRun(loop.Run):
    """A run whose teacher has statistics of NaN after step 13, on this process's devices."""

    def compiled_step(self, state: AITState, step: int) -> Any:
        """As the run's own."""
        compiled = super().compiled_step(state, step)
        if step >= _STEP:
            teacher = self.frozen.teacher
            sound = jax.tree.map(np.asarray, teacher["batch_stats"])
            poison = jax.tree.map(lambda x: np.full_like(x, np.nan), sound)
            poisoned = teacher | {"batch_stats": self.layout.replicate(poison)}
            self.frozen = self.frozen._replace(teacher=poisoned)
        return compiled


if __name__ == "__main__":
    loop.Run = PoisonedRun  # type: ignore[misc]
    program.run()
