"""The quantized network as a folder of integers, for other programs to load.

`python -m ait_jax.export --workdir=RUN --out=DIR` writes it, `read_artefact(DIR).network()` runs
it, and docs/format.md describes it byte by byte.
"""

from ait_jax.export.artefact import Artefact, Network
from ait_jax.export.files import read_artefact, write_artefact
from ait_jax.export.manifest import ArtefactError

__all__ = ["Artefact", "ArtefactError", "Network", "read_artefact", "write_artefact"]
