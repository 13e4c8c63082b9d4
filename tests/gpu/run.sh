#!/usr/bin/env bash
# Everything that only a GPU can show, on one NVIDIA GPU, from a bare checkout, without a network, in under ten minutes.
#
# Needs python3 with torch (2.11 or later, CUDA), attrs, msgspec, pytest, pytest-timeout and hypothesis. Packages that are missing there can
# come as wheels in the folder $WHEELS (by default `wheels` in the checkout). What came out is printed at the end, and written to $REPORT.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
wheels=${WHEELS:-wheels}
report=$(realpath -m "${REPORT:-$work/report}")

export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" "$wheels"/*.whl || exit 3
fi
missing=$("$python" - <<'PY'
import importlib.util
print(*[name for name in ("torch", "attrs", "msgspec", "pytest", "pytest_timeout", "hypothesis") if importlib.util.find_spec(name) is None])
PY
)
if [[ -n $missing ]]; then
    echo "tests/gpu/run.sh: $python has no $missing; put wheels into $wheels" >&2
    exit 3
fi

# A copy, so that nothing is built in the checkout; without a compiler it works all the same, on gloo.
mkdir "$work/checkout"
cp -r commgraph tests pyproject.toml setup.py "$work/checkout"
cd "$work/checkout" || exit 3
"$python" setup.py --quiet build_ext --inplace >"$work/build" 2>&1 || tail -5 "$work/build"

"$python" - >"$report" <<'PY'
import datetime
import torch
name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
print(f"{datetime.date.today()}: {name}, torch {torch.__version__}, NCCL {nccl}, several processes on one GPU")
PY
export COMMGRAPH_GPU_REPORT=$report
# torch's own warnings of other versions are no failure of ours.
"$python" -m pytest tests/gpu -m gpu -q -rs -p no:cacheprovider -o addopts= -o filterwarnings=default "$@"
code=$?
echo
cat "$report"
exit "$code"
