#!/usr/bin/env bash
# Everything in README.md that waits for a GPU, in at most 8 minutes on one H100 or H200:
#
#     benchmarks/gpu.sh                                  results go to benchmarks/results
#     benchmarks/gpu.sh --size toy --device cpu          a trial of every part on a CPU; measures nothing
#     benchmarks/gpu.sh --list                           prints the commands and runs none
#
#   --budget SECONDS    for all parts (480)
#   --only NAME         this part (may be given several times)
#   --results FOLDER    where the results go
#   --python PROGRAM    a Python with torch (default: $PYTHON, the .venv of this repository, python3)
#   --wheels FOLDER     where to install missing packages from, instead of the package index
#   --no-install        install nothing
#
# Each part is a process of its own with a bound, in the order of what it is worth, and writes its result as it ends, so
# that a cut leaves what was done. The package need not be installed. A CUDA build of torch must be there already, since
# it is most of a download: pip install torch. TRL's environment is created by uv in the background meanwhile; without
# a network, that part says so and the others do not mind.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
size=full device=cuda budget=480 results= python=${PYTHON:-} wheels= install=1 list=0 only=()

usage() { sed -n '2,/^set /p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; }

while [ $# -gt 0 ]; do
    case $1 in
    --size | --device | --budget | --results | --python | --wheels | --only)
        [ $# -ge 2 ] || { echo "$1 needs a value" >&2; exit 2; }
        if [ "$1" = --only ]; then only+=("$2"); else printf -v "${1#--}" %s "$2"; fi
        shift
        ;;
    --list) list=1 ;;
    --no-install) install=0 ;;
    -h | --help) usage; exit 0 ;;
    *) echo "$1: unknown; see benchmarks/gpu.sh --help" >&2; exit 2 ;;
    esac
    shift
done
case $size in full | toy) ;; *) echo "--size $size: full or toy" >&2; exit 2 ;; esac
case $device in cuda | cpu) ;; *) echo "--device $device: cuda or cpu" >&2; exit 2 ;; esac
[[ $budget =~ ^[0-9]+$ ]] || { echo "--budget $budget: a whole number of seconds" >&2; exit 2; }

# ---- the parts: NAME SECONDS SCRIPT ARGUMENTS, in the order of what they are worth -------------------------
newer="z_image qwen_image flux sana flux_2"
parts() {
    if [ "$size" = full ]; then
        local steps="--dtype bfloat16 --device $device --warmup 1 --repeats 3"
        local agsm="agsm_step.py --size sd15 --device $device"
        echo "agsm 150 $agsm --warmup 3 --repeats 15"
        echo "sd3 75 full_size.py sd3 --terms agsm --terms flow_grpo --terms diffusion_nft $steps"
        echo "sdxl 75 full_size.py sdxl --terms agsm --terms ddpo --terms diffusion_nft $steps"
        echo "sd15 60 full_size.py sd15 --terms agsm --terms ddpo --terms diffusion_nft $steps"
        echo "regional 100 $agsm --compile regional --tag _regional --no-memory" \
            "--warmup 4 --repeats 9"
        echo "sampling 75 sampling.py --size sd15 --device $device --warmup 1 --repeats 7"
        echo "ddpo 90 ddpo_step.py --device $device --repeats 5"
        echo "graphs 150 $agsm --compile reduce-overhead --tag _graphs --no-memory" \
            "--warmup 6 --repeats 9"
        echo "negatives 60 $agsm --agsm negatives=1 --tag _negatives_1 --no-memory" \
            "--warmup 2 --repeats 9"
        echo "ceiling 60 ceiling.py --size sd15 --device $device --dtype bfloat16 --repeats 5"
        echo "newer 150 full_size.py $newer --layers 2 --resolution 512 --terms agsm" \
            "--terms flow_grpo $steps"
    else
        local once="--repeats 1 --warmup 1" toy="--toy --device $device --warmup 1 --allocator"
        local agsm="agsm_step.py --size embedded --device $device --images 4"
        [ "$device" = cuda ] && toy="--toy --device $device --warmup 1"
        echo "agsm 3000 $agsm $once"
        echo "sd3 3000 full_size.py sd3 --terms agsm --terms flow_grpo --terms diffusion_nft $toy"
        echo "sdxl 3000 full_size.py sdxl --terms agsm --terms ddpo --terms diffusion_nft $toy"
        echo "sd15 3000 full_size.py sd15 --terms agsm --terms ddpo --terms diffusion_nft $toy"
        echo "regional 3000 $agsm --compile regional --tag _regional --no-memory" \
            "--half $once"
        echo "sampling 3000 sampling.py --device $device --images 1 --num-steps 2 $once"
        echo "ddpo 3000 ddpo_step.py --device $device --images 2 --num-steps 2 $once"
        echo "graphs 3000 $agsm --compile reduce-overhead --tag _graphs --no-memory" \
            "$once"
        echo "negatives 3000 $agsm --agsm negatives=1 --tag _negatives_1" \
            "--no-memory $once"
        echo "ceiling 3000 ceiling.py --device $device --dtype bfloat16 --repeats 1"
        echo "newer 3000 full_size.py $newer --terms agsm --terms flow_grpo $toy"
    fi
}
names=" $(parts | cut -d' ' -f1 | tr '\n' ' ')"
for name in ${only[@]+"${only[@]}"}; do
    [[ $names == *" $name "* ]] || { echo "--only $name: one of$names" >&2; exit 2; }
done
wanted() {
    [ ${#only[@]} -eq 0 ] && return 0
    local each
    for each in "${only[@]}"; do [ "$each" = "$1" ] && return 0; done
    return 1
}
if [ $list = 1 ]; then
    parts | while read -r name seconds command; do
        wanted "$name" && echo "$name $seconds $command"
    done
    exit 0
fi

# ---- a Python with torch and the packages, and the package itself through links --------------------------------------
began=$SECONDS
work=$(mktemp -d)
[ -n "$results" ] || { [ "$size" = toy ] && results=$work/results || results=$here/results; }
mkdir -p "$results" "$work/site"
results=$(cd "$results" && pwd)
if [ -z "$python" ]; then
    python=python3
    [ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python
fi
command -v "$python" >/dev/null || { echo "$python: not found; name one: --python PROGRAM" >&2; exit 1; }
"$python" - "$device" <<'P' || exit 1
import sys
if sys.version_info < (3, 11):
    sys.exit(f"Python {sys.version.split()[0]} is too old: 3.11 or newer, --python PROGRAM")
try:
    import torch
except ImportError:
    sys.exit(f"{sys.executable} has no torch; install it: {sys.executable} -m pip install torch (2.5 GB, for CUDA)")
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit(f"torch {torch.__version__} sees no GPU; a build for CUDA is needed, and nvidia-smi must see the GPU")
where = torch.cuda.get_device_name() if sys.argv[1] == "cuda" else f"{torch.get_num_threads()} CPU threads"
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {where}")
P
ln -s "$root/agsm_rl" "$work/site/agsm_rl"
ln -s "$root/rewards" "$work/site/agsm_rl_rewards"
ln -s "$root/recipes" "$work/site/agsm_rl_recipes"
export PYTHONPATH=$work/site:$work/packages${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
missing() { # what the package needs and what that needs in turn, as far as it is not installed; never torch
    "$python" - "$root" <<'P'
import pathlib, re, sys, tomllib
from importlib.metadata import PackageNotFoundError, requires
try:
    from packaging.markers import Marker
except ImportError:
    from pip._vendor.packaging.markers import Marker
root = pathlib.Path(sys.argv[1])
pins = dict(re.findall(r"^([\w.-]+)==(\S+)", (root / "constraints.txt").read_text(), re.M))
seen, found = {"torch"}, []
waiting = list(tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"])
while waiting:
    words, _, condition = waiting.pop().partition(";")
    name = re.match(r"[\w.-]+", words.strip())[0].lower().replace("_", "-")
    if name in seen or condition and not Marker(condition).evaluate({"extra": ""}):
        continue
    seen.add(name)
    try:
        waiting += requires(name) or []
    except PackageNotFoundError:
        found.append(f"{name}=={pins[name]}" if name in pins else re.sub(r"[()\s]|\[.*?\]", "", words))
print(*found)
P
}
source=(${wheels:+--no-index --find-links "$wheels"})
for round in 1 2 3 4 5 6; do # each brings to light what the packages of the one before it need
    lacking=$(missing) || exit 1
    [ -n "$lacking" ] || break
    echo "missing: $lacking"
    # Into a folder of its own and without what they need, so that what is installed stays as it is, torch above all.
    # shellcheck disable=SC2086 # a list of words
    if [ $install = 0 ] || ! timeout 120 "$python" -m pip install --quiet --disable-pip-version-check --no-deps \
        ${source[@]+"${source[@]}"} --upgrade --target "$work/packages" $lacking; then
        echo "they could not be installed here; where there is a network, put their wheels and those of what they need" >&2
        echo "into a folder (pip download --dest wheels ...), and run benchmarks/gpu.sh --wheels wheels" >&2
        exit 1
    fi
done

# ---- TRL's environment, made while other parts run -------------------------------------------------------------------
if wanted ddpo; then
    export PATH=$PATH:$work/packages/bin
    (
        cd "$here" || exit
        command -v uv >/dev/null || [ -x "$(dirname "$python")/uv" ] || [ $install = 0 ] ||
            timeout 100 "$python" -m pip install --quiet --no-deps ${source[@]+"${source[@]}"} \
                --target "$work/packages" uv
        exec timeout 400 "$python" -c 'from pathlib import Path
from agsm_rl_rewards.worker.environment import python_for
print(python_for(Path("trl_worker.py").absolute()))'
    ) >"$work/trl.txt" 2>&1 &
    trl=$!
    trap 'kill $trl 2>/dev/null' EXIT
fi

# ---- run them --------------------------------------------------------------------------------------------------------
failed=0
note() { # NAME SECONDS STATUS WORDS: a line, and the same for programs
    echo "$1: $4, $2 s"
    printf '{"part": "%s", "seconds": %d, "status": %d}\n' "$1" "$2" "$3" >>"$results/gpu_parts.jsonl"
}
while read -r name seconds command <&3; do
    wanted "$name" || continue
    left=$((budget - (SECONDS - began)))
    [ "$left" -gt 5 ] || { note "$name" 0 124 "left out, no time left"; failed=1; continue; }
    bound=$((seconds < left ? seconds : left))
    if [ "$name" = ddpo ]; then
        for _ in $(seq "$bound"); do kill -0 $trl 2>/dev/null && sleep 1; done
        if kill -0 $trl 2>/dev/null || ! wait $trl; then
            note ddpo 0 1 "TRL's environment could not be made: $(tail -1 "$work/trl.txt")"
            failed=1
            continue
        fi
    fi
    start=$SECONDS
    touch "$work/$name.began"
    # shellcheck disable=SC2086 # the words of the command
    (cd "$root" && exec timeout -k 5 "$bound" "$python" "benchmarks/${command%% *}" ${command#* } \
        --results "$results") >"$work/$name.txt" 2>&1
    status=$?
    took=$((SECONDS - start))
    case $status in
    0) how=done ;;
    124 | 137) how="cut after $bound s" ;;
    *) how="failed ($status): $(grep -v '^ ' "$work/$name.txt" | tail -1 | cut -c1-200)" ;;
    esac
    [ $status = 0 ] || failed=1
    note "$name" "$took" "$status" "$how"
    for file in "$results"/*.json; do
        [ "$file" -nt "$work/$name.began" ] && "$python" "$here/table.py" "$file"
    done
done 3< <(parts)
echo "$((SECONDS - began)) s in all; results in $results, output in $work"
if [ "$results" = "$here/results" ]; then "$python" "$here/table.py"; fi
exit $failed
