#!/usr/bin/env bash
# One machine with several GPUs:
#
#     recipes/cluster/torchrun.sh papers/simplegpt/1B-simplenorm run.dir=runs/1B
#
# Starts the run, or goes on with it if run.dir holds one: the same line serves after every interruption.
# PROCESSES: how many; default: one per GPU, or 2 where there is none.
set -euo pipefail
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
processes=${PROCESSES:-$((gpus > 0 ? gpus : 2))}

folder=""
for word in "$@"; do
    case $word in run.dir=*) folder=${word#run.dir=} ;; esac
done
if [ -n "$folder" ] && compgen -G "$folder/checkpoints/step-*" >/dev/null; then
    set -- resume "$folder" --auto
elif [ -n "$folder" ] && [ -e "$folder/config.toml" ]; then
    set -- resume "$folder" --step 0
else
    set -- train "$@"
fi
# How long a checkpoint may take after Ctrl-C or SIGTERM; older versions of torchrun know 30 seconds only.
patience=()
if torchrun --help | grep -q -- --shutdown-timeout; then patience=(--shutdown-timeout 110); fi
exec torchrun --standalone --nproc-per-node="$processes" "${patience[@]}" -m gptnorm "$@"
