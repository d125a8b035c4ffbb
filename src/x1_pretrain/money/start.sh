#!/usr/bin/env bash
# Brings a bare machine to a running, supervised job. Safe to run again at any time: what is done is not redone.
#
#   bash start.sh             every step, then the job: under systemd, else tmux, else nohup;
#                             in the foreground where this is a container's main process
#   bash start.sh prepare     every step, not the job
#   bash start.sh supervise   the job itself, in the foreground
#   bash start.sh step NAME   one step
#
# X1_START_MODE=foreground|systemd|tmux|nohup chooses how the job runs. X1_ALERT_HOOK, an address that takes
# JSON by POST (Slack's kind), is told of a failed start.
set -euo pipefail

# >>> job
RUN_NAME=''
PROVIDER=''
SOURCE=''
WORKSPACE=''
VENV=''
CORPUS=''
CONFIG=''
GPUS=0
DATA_DISK_GIB=0
DATA_TIMEOUT_S=0
DATA_FROM_MIRROR=0
TORCH_AT_LEAST=''
UV_VERSION=''
TORCH_BUILDS=()     # "driver's CUDA, torch, build", newest first
TORCH_CPU=''        # "torch build" without a GPU
PASSED_VARIABLES=() # names; their values come from the environment or from $ENVIRONMENT_FILE
DATA_COMMANDS=()
SUPERVISE=()
config_text() { :; }
unit_text() { :; }
# <<< job

STEPS=(folders gpu tools python torch install check data doctor)
SELF=$(readlink -f "${BASH_SOURCE[0]}")
LOG=$WORKSPACE/logs/start.log
STATE=$WORKSPACE/.start # what one step leaves for the next
FAILED=$WORKSPACE/START_FAILED
MOST_FAILURES=5
ENVIRONMENT_FILE=${X1_ENVIRONMENT_FILE:-/etc/x1/environment}
UNIT_FOLDER=${X1_UNIT_FOLDER:-/etc/systemd/system}
UNIT=x1-$RUN_NAME.service

if [[ -r $ENVIRONMENT_FILE ]]; then
    set -a
    # shellcheck source=/dev/null
    . "$ENVIRONMENT_FILE"
    set +a
fi
export HOME=${HOME:-/root} # cloud-init sets none
export PYTHONUNBUFFERED=1 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off
export HF_HUB_DISABLE_PROGRESS_BARS=1 DEBIAN_FRONTEND=noninteractive

say() { printf '%s\n' "$*"; }

die() {
    printf 'x1 start: %s\n' "$*" >&2
    exit 1
}

limit_s() { # how long a step may take
    if [[ -n ${X1_STEP_LIMIT_S:-} ]]; then
        echo "$X1_STEP_LIMIT_S"
        return
    fi
    case $1 in
    folders) echo 60 ;;
    gpu | check) echo 300 ;;
    doctor) echo 600 ;;
    tools | python) echo 1200 ;;
    torch | install) echo 3600 ;;
    data) echo "$DATA_TIMEOUT_S" ;;
    systemd | tmux | nohup) echo 120 ;;
    *) die "no step $1; the steps are: ${STEPS[*]}" ;;
    esac
}

# ------------------------------------------------------------------------------------------------------------
# The steps. Each runs in a process of its own, under a time limit.

step_folders() {
    mkdir -p "$WORKSPACE"/{data,checkpoints,mlruns,logs,runs}
    config_text >"$CONFIG.new"
    mv "$CONFIG.new" "$CONFIG"
    say "the config is $CONFIG"
}

# The newest CUDA that the driver runs, from nvidia-smi's heading (drivers since 590 call it "CUDA UMD Version").
driver_cuda() { sed -nE 's/.*CUDA( UMD)? Version *: *([0-9]+\.[0-9]+).*/\2/p' <<<"$1" | head -n 1; }

at_least() { # at_least 12.8 12.6: is the first as new as the second?
    [[ $(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1) == "$2" ]]
}

step_gpu() {
    rm -f "$STATE/torch"
    if ((GPUS == 0)); then
        say "this run asks for no GPU: torch's CPU build"
        echo "$TORCH_CPU" >"$STATE/torch"
        return
    fi
    command -v nvidia-smi >/dev/null ||
        die "no nvidia-smi here, and the run needs $GPUS GPU(s): nothing is trained on a rented machine's CPU." \
            "Choose an image with the NVIDIA driver, or set gpus to 0 to mean the CPU"
    local heading='' found cuda waited_s=0
    until heading=$(nvidia-smi 2>&1); do # right after a boot the driver may still be loading
        ((waited_s < ${X1_GPU_WAIT_S:-120})) || die "nvidia-smi fails: ${heading##*$'\n'}. The driver is broken"
        sleep 5
        waited_s=$((waited_s + 5))
    done
    found=$(nvidia-smi -L | grep -c '^GPU ') || die "nvidia-smi lists no GPU, the run needs $GPUS"
    ((found >= GPUS)) || die "$found GPU(s) found, the run needs $GPUS"
    cuda=$(driver_cuda "$heading")
    [[ -n $cuda ]] || die "nvidia-smi does not say which CUDA its driver runs"
    choose_build "$cuda" >"$STATE/torch"
    say "$found GPU(s); the driver runs CUDA $cuda: torch $(<"$STATE/torch")"
}

choose_build() {
    local row needs torch build
    for row in "${TORCH_BUILDS[@]}"; do
        read -r needs torch build <<<"$row"
        if at_least "$1" "$needs"; then
            echo "$torch $build"
            return
        fi
    done
    die "the driver runs CUDA $1; torch >= $TORCH_AT_LEAST needs $needs or newer." \
        "Choose a machine with a newer driver (RunPod: minCudaVersion)"
}

step_tools() {
    local missing=() tool
    for tool in curl:curl cc:build-essential; do
        command -v "${tool%%:*}" >/dev/null || missing+=("${tool##*:}")
    done
    if [[ $SOURCE == *git+* ]] && ! command -v git >/dev/null; then missing+=(git); fi
    if ((${#missing[@]} == 0)); then
        say "curl and a C compiler are there"
        return
    fi
    command -v apt-get >/dev/null || die "missing: ${missing[*]}, and there is no apt-get to install them with"
    ((EUID == 0)) || die "missing: ${missing[*]}. Run: sudo apt-get install ${missing[*]}"
    say "installing ${missing[*]}"
    apt-get -o DPkg::Lock::Timeout=600 -qq update # a fresh machine may be updating itself
    apt-get -o DPkg::Lock::Timeout=600 -qq -y --no-install-recommends install "${missing[@]}"
}

# torch of this machine's own Python (the NGC image has one), if it is new enough and sees the GPUs.
has_good_torch() {
    python3 - "$TORCH_AT_LEAST" "$GPUS" <<'PYTHON'
import importlib.metadata, re, sys

def numbers(text):
    return [int(part) for part in re.findall(r"\d+", text)[:2]]

if sys.version_info < (3, 11):
    sys.exit(f"its Python is {sys.version.split()[0]}, older than 3.11")
try:
    version = importlib.metadata.version("torch")
except importlib.metadata.PackageNotFoundError:
    sys.exit("it has no torch")
if numbers(version) < numbers(sys.argv[1]):
    sys.exit(f"its torch is {version}, older than {sys.argv[1]}")
if int(sys.argv[2]):
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"its torch {version} can't use the GPU")
print(version)
PYTHON
}

# Python.h is for torch.compile, which builds a small C module.
is_good_python() {
    "$1" - 2>/dev/null <<'PYTHON'
import ensurepip, os, sys, sysconfig, venv
header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
sys.exit(not ((3, 11) <= sys.version_info[:2] <= (3, 14) and os.path.exists(header)))
PYTHON
}

step_python() {
    local version why name
    if command -v python3 >/dev/null && version=$(has_good_torch 2>"$STATE/why-not"); then
        say "this machine's own torch $version is used"
        printf 'own %s %s\n' "$(command -v python3)" "$version" >"$STATE/python"
        return
    fi
    why=$(tail -n 1 "$STATE/why-not" 2>/dev/null || true)
    say "this machine's own torch is not used: ${why:-there is no python3}"
    for name in python3.12 python3.13 python3.11 python3.14 python3; do
        if command -v "$name" >/dev/null && is_good_python "$name"; then
            say "Python: $(command -v "$name")"
            printf 'wheel %s\n' "$(command -v "$name")" >"$STATE/python"
            return
        fi
    done
    say "no Python 3.11 to 3.14 with venv and Python.h here: uv brings one"
    printf 'wheel %s\n' "$(uv_python)" >"$STATE/python"
}

# Works from glibc 2.17 on, Ubuntu 20.04 among them, without root.
uv_python() {
    export UV_PYTHON_INSTALL_DIR=$WORKSPACE/python PATH=$WORKSPACE/tools:$PATH
    if ! command -v uv >/dev/null; then
        curl -fsSL --retry 3 -o "$STATE/uv.sh" "https://astral.sh/uv/$UV_VERSION/install.sh"
        UV_INSTALL_DIR=$WORKSPACE/tools UV_NO_MODIFY_PATH=1 sh "$STATE/uv.sh" >&2
    fi
    unset VIRTUAL_ENV # else uv would name that one
    cd "$WORKSPACE"
    uv python install 3.12 >&2
    uv python find --python-preference only-managed 3.12
}

# The NGC image holds pip to the versions it was built with; a torch of our own must not be.
leave_the_image() { unset PIP_CONSTRAINT PYTHONPATH; }

step_torch() {
    local kind python rest torch build want
    read -r kind python rest <"$STATE/python"
    read -r torch build <"$STATE/torch"
    want="$kind $python ${rest:-$torch $build}"
    if [[ -f $VENV/x1-torch && $(<"$VENV/x1-torch") == "$want" ]] && "$VENV/bin/python" -c 'import torch'; then
        say "$VENV has it"
        return
    fi
    rm -rf "$VENV"
    if [[ $kind == own ]]; then
        "$python" -m venv --system-site-packages "$VENV"
    else
        leave_the_image
        "$python" -m venv "$VENV"
        say "fetching torch $torch, build $build"
        "$VENV/bin/python" -m pip install --quiet --retries 5 --index-url \
            "https://download.pytorch.org/whl/$build" "torch==$torch"
    fi
    echo "$want" >"$VENV/x1-torch"
}

torch_version() { "$VENV/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))'; }

step_install() {
    local before after kind
    if [[ -f $VENV/x1-source && $(<"$VENV/x1-source") == "$SOURCE" ]]; then
        say "X1 is installed: $("$VENV/bin/x1" --version)"
        return
    fi
    read -r kind _ <"$STATE/python"
    if [[ $kind == wheel ]]; then leave_the_image; fi
    before=$(torch_version)
    "$VENV/bin/python" -m pip install --quiet --retries 5 "$SOURCE"
    after=$(torch_version)
    [[ $after == "$before" ]] ||
        die "installing X1 replaced torch $before by $after, which may not suit the driver." \
            "Choose an image whose torch is a release of $TORCH_AT_LEAST or newer"
    say "installed $("$VENV/bin/x1" --version)"
    echo "$SOURCE" >"$VENV/x1-source"
}

step_check() {
    "$VENV/bin/python" - "$GPUS" <<'PYTHON'
import sys
import torch

wanted = int(sys.argv[1])
if wanted and torch.cuda.device_count() < wanted:
    sys.exit(f"torch {torch.__version__} sees {torch.cuda.device_count()} GPU(s), {wanted} needed")
if wanted:  # a build without kernels for this GPU fails here, not at the first training step
    assert (torch.ones(2, device="cuda") + 1).sum().item() == 4
print(f"torch {torch.__version__} computes on {f'{wanted} GPU(s)' if wanted else 'the CPU'}")
PYTHON
}

step_data() {
    if [[ -f $CORPUS/manifest.json ]]; then
        say "the corpus is there: $CORPUS"
        return
    fi
    if ((DATA_FROM_MIRROR)); then
        say "the corpus is in the mirror: the trainer fetches it"
        return
    fi
    ((${#DATA_COMMANDS[@]})) || die "no corpus at $CORPUS (no manifest.json), and no command that makes one"
    local free_gib i
    free_gib=$(($(df -Pk "$WORKSPACE" | awk 'NR == 2 { print $4 }') / 1048576))
    ((free_gib >= DATA_DISK_GIB)) ||
        die "$free_gib GiB free at $WORKSPACE, the data needs $DATA_DISK_GIB: rent a larger disk"
    say "$free_gib GiB free, $DATA_DISK_GIB needed"
    export PATH=$VENV/bin:$PATH
    cd "$WORKSPACE"
    for i in "${!DATA_COMMANDS[@]}"; do
        say "data $((i + 1))/${#DATA_COMMANDS[@]}: ${DATA_COMMANDS[i]}"
        bash -euo pipefail -c "${DATA_COMMANDS[i]}"
    done
    [[ -f $CORPUS/manifest.json ]] || die "the data commands ended, and there is no $CORPUS/manifest.json"
}

step_doctor() {
    if "$VENV/bin/x1" --help | grep -E '^ +doctor ' >/dev/null; then
        "$VENV/bin/x1" doctor
    else
        say "this version of X1 has no doctor: skipped"
    fi
}

# ------------------------------------------------------------------------------------------------------------
# Running them

CHILD=''
stop() { # a container being stopped, or Ctrl-C
    say "stopped"
    if [[ -n $CHILD ]]; then kill -TERM "$CHILD" 2>/dev/null || true; fi
    finish_log
    exit 143
}

run_step() {
    local seconds code=0
    seconds=$(limit_s "$1")
    say "== $1"
    timeout --kill-after=10 "$seconds" bash "$SELF" step "$1" </dev/null 3>&- 4>&- 8>&- &
    CHILD=$!
    wait "$CHILD" || code=$?
    CHILD=''
    ((code == 0)) || fail "$1" "$code" "$seconds"
}

fail() {
    local what="step $1 ended with exit code $2"
    if (($2 == 124 || $2 == 137)); then what="step $1 was stopped at its limit of $3 s"; fi
    printf '%s %s; see %s\n' "$(date -u +%FT%TZ)" "$what" "$LOG" >>"$FAILED"
    say "START FAILED: $what. Nothing trains, and the machine still bills."
    say "It is left to the guard off this machine (x1 guard), or to you: x1 teardown $RUN_NAME"
    alert "$RUN_NAME on $PROVIDER: $what. Nothing trains and the machine bills: x1 teardown $RUN_NAME"
    finish_log
    exit 1
}

alert() { # the address holds a secret: it reaches curl by its standard input, not by its arguments
    if [[ -z ${X1_ALERT_HOOK:-} ]]; then
        say "X1_ALERT_HOOK is not set: nobody is told from here"
        return
    fi
    local text
    text=$(tr -d '"\\\n' <<<"$1")
    if curl -fsS -m 20 --retry 3 -o /dev/null -H 'Content-Type: application/json' \
        --data-binary "{\"text\": \"$text\"}" --config - <<<"url = \"$X1_ALERT_HOOK\"" 2>/dev/null; then
        say "told X1_ALERT_HOOK"
    else
        say "X1_ALERT_HOOK could not be reached"
    fi
}

stamped() { # every line with its time, to the log and to where output went before
    export TZ=UTC
    trap '' INT TERM PIPE
    local line
    while IFS= read -r line || [[ -n $line ]]; do
        printf -v line '%(%FT%TZ)T %s' -1 "$line"
        printf '%s\n' "$line" >>"$LOG"
        printf '%s\n' "$line" >&3 2>/dev/null || true # the terminal may be gone
    done
}

LOGGER=''
start_log() {
    exec 3>&1 4>&2
    exec > >(stamped) 2>&1
    LOGGER=$!
}

finish_log() {
    exec >&3 2>&4 3>&- 4>&-
    wait "$LOGGER" || true
}

refuse_after_many_failures() {
    if [[ -f $FAILED ]] && (($(wc -l <"$FAILED") >= MOST_FAILURES)); then
        die "failed $MOST_FAILURES times (see $FAILED): not tried again. Remove that file to try again"
    fi
}

prepare() {
    local tool step
    for tool in flock timeout setsid; do # of every Debian and Ubuntu, also the smallest
        command -v "$tool" >/dev/null || die "$tool is missing: this script needs util-linux and coreutils"
    done
    mkdir -p "$WORKSPACE/logs" "$STATE" || die "$WORKSPACE can't be made: nothing can run here"
    refuse_after_many_failures
    exec 8>"$STATE/start.lock"
    flock -n 8 || die "another start.sh is at work here; see $LOG"
    trap '' HUP # a dropped line, for all that is started from here on
    start_log
    trap stop TERM INT
    say "start of $RUN_NAME on $PROVIDER$([[ -z ${RUNPOD_POD_ID:-} ]] || echo " ($RUNPOD_POD_ID)")"
    for step in "${STEPS[@]}"; do run_step "$step"; done
    if [[ -f $FAILED ]]; then mv -f "$FAILED" "$WORKSPACE/logs/START_FAILED.earlier"; fi
}

# ------------------------------------------------------------------------------------------------------------
# The job

supervised() { # 9: someone holds the lock; anything else is a fault, and none of a running job
    local code=0
    (flock -n -E 9 9) 9>"$STATE/job.lock" || code=$?
    ((code == 9))
}

supervise() { # holds the lock as long as it lives: a second one is not started beside it
    exec 9>"$STATE/job.lock"
    flock -n 9 || die "the job is running already"
    cd "$WORKSPACE"
    local command=("${SUPERVISE[@]}")
    if [[ -n ${RUNPOD_POD_ID:-} ]]; then # the machine's own name for itself; `--` ends our options
        command=("${command[@]:0:2}" --instance-id "$RUNPOD_POD_ID" "${command[@]:2}")
    fi
    exec "${command[@]}"
}

how() {
    if [[ -n ${X1_START_MODE:-} ]]; then
        [[ $X1_START_MODE =~ ^(foreground|systemd|tmux|nohup)$ ]] ||
            die "X1_START_MODE=$X1_START_MODE: expected foreground, systemd, tmux or nohup"
        echo "$X1_START_MODE"
    elif [[ -d /run/systemd/system && -w $UNIT_FOLDER ]]; then
        echo systemd
    elif (($$ == 1 || PPID == 1)); then
        echo foreground
    elif command -v tmux >/dev/null; then
        echo tmux
    else
        echo nohup
    fi
}

# What systemd gives to a unit it does not take from us: the values go where only root reads.
save_environment() {
    local name value
    mkdir -p "$(dirname "$ENVIRONMENT_FILE")"
    (umask 077 && : >"$ENVIRONMENT_FILE.new")
    for name in "${PASSED_VARIABLES[@]}"; do
        [[ -n ${!name+set} ]] || continue
        value=${!name}
        [[ $value != *$'\n'* ]] || die "$name has several lines, which no environment file can hold"
        value=${value//\\/\\\\} value=${value//\"/\\\"} value=${value//\$/\\\$} value=${value//\`/\\\`}
        printf '%s="%s"\n' "$name" "$value" >>"$ENVIRONMENT_FILE.new"
    done
    mv "$ENVIRONMENT_FILE.new" "$ENVIRONMENT_FILE"
}

step_systemd() {
    save_environment
    unit_text >"$UNIT_FOLDER/$UNIT"
    systemctl daemon-reload
    systemctl enable --quiet "$UNIT"
    systemctl start "$UNIT"
    say "the job is $UNIT: systemctl status $UNIT; tail -f $WORKSPACE/logs/supervise.log"
}

step_tmux() { # a server of its own: one that runs already would not pass our environment on
    local line
    printf -v line 'exec bash %q supervise >>%q 2>&1' "$SELF" "$WORKSPACE/logs/supervise.log"
    tmux -L "x1-$RUN_NAME" new-session -d -s job "$line"
    say "the job runs in tmux: tmux -L x1-$RUN_NAME attach; tail -f $WORKSPACE/logs/supervise.log"
}

step_nohup() {
    setsid nohup bash "$SELF" supervise </dev/null >>"$WORKSPACE/logs/supervise.log" 2>&1 &
    say "the job runs as process $!: tail -f $WORKSPACE/logs/supervise.log"
}

launch() {
    local mode=$1
    if supervised; then
        say "the job is running already"
        mode=none
    fi
    case $mode in
    none) ;;
    foreground) say "the job runs in the foreground" ;;
    *) run_step "$mode" ;;
    esac
    finish_log
    trap - TERM INT
    exec 8>&-
    if [[ $mode == foreground ]]; then supervise; fi
}

main() {
    [[ -n $WORKSPACE ]] || die "no job is filled in: x1 launch writes the script that runs"
    case ${1:-all} in
    step)
        limit_s "${2:-}" >/dev/null
        mkdir -p "$STATE"
        "step_$2"
        ;;
    supervise) supervise ;;
    prepare)
        prepare
        finish_log
        ;;
    all)
        local mode
        mode=$(how)
        prepare
        launch "$mode"
        ;;
    *) die "$1: expected nothing, prepare, supervise or step NAME" ;;
    esac
}

main "$@"
