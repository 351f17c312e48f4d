#!/usr/bin/env bash
# A TPU slice of Google Cloud from this machine, with gcloud. Not run on real hardware yet.
#
#     export PROJECT=my-project ZONE=us-west4-a NAME=ait BUCKET=my-bucket
#     export ACCELERATOR=v5litepod-4     # one TPU VM; v5litepod-16 is a slice of several hosts
#     bash slice.sh create
#     bash slice.sh copy resnet50.pth    # a wheel of this checkout, and the teacher's weights
#     bash slice.sh run                  # again after an interruption: goes on
#     bash slice.sh delete
#
# With several hosts every command goes to all of them (--worker=all); JAX finds its processes by
# itself. SPOT=--spot asks for a slice that can be taken away.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${PROJECT:?}" "${ZONE:?}" "${NAME:?}"
where=(--project="$PROJECT" --zone="$ZONE")

case "${1:?create, copy, run or delete}" in
  create)
    gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --node-id="$NAME" \
      --accelerator-type="${ACCELERATOR:?}" --runtime-version="${RUNTIME:-v2-alpha-tpuv5-lite}" \
      ${SPOT:-}
    # Repeat until its state is ACTIVE.
    gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format="value(state.state)"
    ;;
  copy)
    rm -rf dist
    pip wheel --quiet --no-deps --wheel-dir=dist .
    gcloud compute tpus tpu-vm scp dist/ait_jax-*.whl experiments/tpu/worker.sh "${2:?weights}" \
      "$NAME:" "${where[@]}" --worker=all
    ;;
  run)
    # 16 images a chip. docs/scaling.md says what else to change with the batch.
    gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="bash worker.sh \
      ait_jax-*.whl --config=imagenet_resnet50:gdfq,ait,w4a4 \
      --workdir=gs://${BUCKET:?}/r50_w4a4 --config.teacher.weights=resnet50.pth \
      --config.data.name=none --config.train.compute_dtype=bfloat16 \
      --config.train.batch_size=${BATCH:-64}"
    ;;
  delete)
    gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
    ;;
  *)
    echo "error: '$1' is not allowed: it must be create, copy, run or delete" >&2
    exit 2
    ;;
esac
