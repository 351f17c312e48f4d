"""A disk that fills up while checkpoints are written: `python -m experiments.faults.disk_full`.

Needs Linux and root, for a tmpfs of five megabytes; trains the quickstart's teacher first. Prints
what the program said, which checkpoints are left, and what the same line does once there is room.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["main"]

_MEGABYTES = 5
_SETTINGS = {
    "data.name": "none",
    "quant.weight_bits": 4,
    "quant.calibration_steps": 6,
    "train.batch_size": 16,
    "train.warmup_steps": 6,
    "train.steps": 18,
    "train.checkpoint_every": 2,
    "train.keep_checkpoints": 50,
    "log.images_every": 0,
}


def _run(workdir: Path, weights: Path) -> tuple[int, str]:
    flags = [f"--config.{key}={value}" for key, value in _SETTINGS.items()]
    command = [sys.executable, "-m", "ait_jax.main", "--config=quickstart", f"--workdir={workdir}"]
    done = subprocess.run(
        [*command, *flags, f"--config.teacher.weights={weights}"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


def main() -> int:
    """Fills the disk, makes room, and goes on; returns 0 if the run came to its end."""
    from ait_jax.teacher_training import ensure_teacher
    from configs.quickstart import get_config

    with tempfile.TemporaryDirectory() as folder:
        weights = ensure_teacher(get_config(), Path(folder) / "teacher.safetensors")
        disk = Path(folder) / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={_MEGABYTES}m", "tmpfs", str(disk)]
        subprocess.run(mount, check=True)
        try:
            code, said = _run(disk / "run", weights)
            kept = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
            print(f"full: exit code {code}, {said.count('Traceback')} tracebacks, left: {kept}")
            print(said.strip().splitlines()[-1])
            subprocess.run(["mount", "-o", "remount,size=500m", str(disk)], check=True)
            code, said = _run(disk / "run", weights)
            resumed = next((line for line in said.splitlines() if "resuming" in line), "no resume")
            print(f"with room: exit code {code}; {resumed}")
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
