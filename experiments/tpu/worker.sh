#!/usr/bin/env bash
# On every host of a TPU slice: installs the wheel once, then runs the program until it has ended.
# Not run on real hardware yet.
#
#     bash worker.sh WHEEL ARGUMENT...     # arguments of `ait-jax main`
set -euo pipefail
wheel=$(realpath "$1")
shift

if [[ ! -x "$HOME/ait/bin/ait-jax" ]]; then
  # The image's own Python may be older than 3.11.
  python3 -m pip install --quiet --user uv
  "$HOME/.local/bin/uv" venv --quiet --python 3.12 "$HOME/ait"
  "$HOME/.local/bin/uv" pip install --quiet --python "$HOME/ait/bin/python" \
    "ait_jax[gcs,tpu] @ file://$wheel"
fi

while true; do
  code=0
  "$HOME/ait/bin/ait-jax" main "$@" || code=$?
  # 134: another process died (docs/reliability.md); all go on from the last checkpoint.
  [[ $code -eq 134 ]] || exit "$code"
  sleep 20
done
