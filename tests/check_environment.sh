#!/usr/bin/env bash
# Installing the pack's requirements changes no version that is installed: shown with transformers 4.57 and with 5.x.
#
#   tests/check_environment.sh [COMFYUI_CHECKOUT]     (default: $COMFYUI_PATH, then ~/comfy/ComfyUI)
#
# Makes two virtual environments in a temporary folder from ComfyUI's own requirements; takes minutes and several GB.
set -eu
comfy=${1:-${COMFYUI_PATH:-$HOME/comfy/ComfyUI}}
pack=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
status=0
for transformers in 'transformers==4.57.*' 'transformers>=5,<6'; do
    python3 -m venv "$work/venv"
    pip="$work/venv/bin/python -m pip --quiet --disable-pip-version-check"
    $pip install -r "$comfy/requirements.txt" "$transformers"
    $pip freeze | sort > "$work/before"
    $pip install -r "$pack/requirements.txt"
    $pip freeze | sort > "$work/after"
    changed=$(comm -23 "$work/before" "$work/after")
    added=$(comm -13 "$work/before" "$work/after" | tr '\n' ' ')
    if [ -n "$changed" ]; then
        echo "CHANGED with $transformers: $changed"
        status=1
    else
        echo "unchanged with $transformers; added: ${added:-nothing}"
    fi
    $work/venv/bin/python -c "import transformers, torch, numpy; print('imports:', transformers.__version__, torch.__version__, numpy.__version__)"
    rm -rf "$work/venv"
done
exit $status
