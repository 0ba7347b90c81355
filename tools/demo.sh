#!/usr/bin/env bash
# Teaches SmolLM2-135M the Zen of Python with a Bone and a BAT adapter, folds both into ONNX models and
# lets onnxruntime-genai recite it. Installs what it needs into .venv; writes to build/demo only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

./tools/setup.sh

# The model comes with an installed package; no hub is asked. The bars are the demo's own.
export HF_HUB_OFFLINE=1 TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=error
export BONE_FX_CACHE="$PWD/build/demo/cache"
exec .venv/bin/python tools/demo.py "$@"
