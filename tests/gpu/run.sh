#!/usr/bin/env bash
# Everything that only a machine with a GPU can check, in at most 8 minutes and without a network: builds, runs the
# operators on the device (CUDA C++ and Triton), compute-sanitizer, what emulation has to assume, and benchmarks.
#
#   bash tests/gpu/run.sh [--out FOLDER] [--seconds N]
#
# PYTHON names another interpreter than python3. What must be there: README.md; the first step says what is not.
# Writes run.json, run.md and log.txt, by default into build/gpu. Goes on when a step fails, says at the end which did,
# and then returns 1.
set -euo pipefail
cd "$(dirname "$0")/../.."
exec "${PYTHON:-python3}" tests/gpu/run.py "$@"
