#!/usr/bin/env bash
# The quick tests with other versions, for each Python 3.10 .. 3.13 that runs here:
#
#     tests/compatibility.sh [oldest] [triton] [newest]
#
# oldest: the oldest declared of everything but triton, which a torch for CUDA of that age has in its own version;
# triton: the oldest declared triton, whose interpreter fails with NumPy 2.4, and the newest torch that takes it. A set
# that some Python cannot have is named and left out. PIP_INDEX_URL and the like choose the registry; without a torch
# for CPUs alone in it, each set fetches gigabytes.
set -euo pipefail
cd "$(dirname "$0")/.."
names="attention cnn config constructions datasets episodes evaluation features generator kernels parameters tokens"
names+=" training"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
declared=$(grep -oE '"(numpy|pillow|safetensors|torch|triton)>=[0-9.]+' pyproject.toml | tr -d '"' | sort -u)
failed=""

for minor in 10 11 12 13; do
  python=python3.$minor
  $python -c "" 2>/dev/null || { echo "$python: not here"; continue; }
  for kind in ${*:-oldest triton newest}; do
    tests="$names triton"
    case $kind in
      oldest) wanted=$(sed -E '/^triton/d; s/>=(.*)/==\1.*/' <<< "$declared") tests=$names ;;
      triton) wanted="$(sed -E '/^triton/s/>=(.*)/==\1.*/' <<< "$declared") numpy<2.4" ;;
      newest) wanted=$declared ;;
      *) echo "$kind: wanted oldest, triton or newest" >&2; exit 2 ;;
    esac
    home=$work/$minor-$kind
    $python -m venv "$home"
    pip="$home/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all:"
    # shellcheck disable=SC2086
    if ! $pip $wanted 2> "$work/log"; then
      echo "$python $kind: left out: $(grep ERROR "$work/log" | tail -n 1)"
      continue
    fi
    # shellcheck disable=SC2086
    $pip $wanted pytest hypothesis tqdm tensorboard matplotlib
    $home/bin/python -m pip install --quiet --no-deps --editable .
    echo "$python $kind: $("$home"/bin/python -m pip freeze | grep -iE '^(numpy|pillow|safetensors|torch|triton)=' | xargs)"
    # Old versions warn of what newer ones changed; that is no failure.
    # shellcheck disable=SC2086
    "$home"/bin/python -m pytest -q -p no:cacheprovider -W default $(printf 'tests/test_%s.py ' $tests) \
      || failed+=" $minor-$kind"
    rm -rf "$home"
  done
done
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
