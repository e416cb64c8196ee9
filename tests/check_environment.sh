#!/usr/bin/env bash
# Installing the pack's requirements changes no version that is installed: shown with transformers 4.57 and with 5.x.
#
#   tests/check_environment.sh [--without-torch] [COMFYUI_CHECKOUT]     (default: $COMFYUI_PATH, then ~/comfy/ComfyUI)
#
# Makes two virtual environments in a temporary folder from ComfyUI's own requirements: minutes and several GB, or
# much less --without-torch, which leaves out torch and what depends on it.
set -eu
leave_out='^$'
if [ "${1:-}" = --without-torch ]; then
    leave_out='^(torch|kornia|spandrel|$)'
    shift
fi
comfy=${1:-${COMFYUI_PATH:-$HOME/comfy/ComfyUI}}
pack=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
status=0
grep -Ev "$leave_out" "$comfy/requirements.txt" > "$work/requirements.txt"
for transformers in 'transformers==4.57.*' 'transformers>=5,<6'; do
    python3 -m venv "$work/venv"
    pip="$work/venv/bin/python -m pip --quiet --disable-pip-version-check"
    $pip install -r "$work/requirements.txt" "$transformers"
    $pip freeze | sort > "$work/before"
    $pip install -r "$pack/requirements.txt"
    $pip freeze | sort > "$work/after"
    changed=$(comm -23 "$work/before" "$work/after")
    added=$(comm -13 "$work/before" "$work/after" | tr '\n' ' ')
    if [ -n "$changed" ]; then
        echo "CHANGED with $transformers: $changed"
        status=1
    else
        echo "unchanged with $transformers ($(grep -ci . "$work/before") packages); added: ${added:-nothing}"
    fi
    rm -rf "$work/venv"
done
exit $status
