#!/usr/bin/env bash
# Runs all sites of a [decentral] run on this machine, and the coordinator through which they find each other.
#
#   launch/sites.sh CONFIG [--set key=value ...]
#
# Environment:
#   NPROC     processes of each site (default: 1); with more, each site has a torchrun of its own
#   RESTARTS  times that a site is started again after it failed (default: 0)
#
# What the sites print is in run.directory/site_<i>/log.txt, and in run.directory/coordinator.txt. Ends when all sites
# have ended, or with the first one that failed and is not started again: the others save and end then, too.
set -euo pipefail

readonly SAVED=75 USER_ERROR=2 # exit codes of `pretrain`

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source-path=SCRIPTDIR source=env.sh
source "$here/env.sh"

if (($# == 0)); then
    echo "usage: [NPROC=...] [RESTARTS=...] launch/sites.sh CONFIG [--set key=value ...]" >&2
    exit 2
fi

nproc="${NPROC:-1}"
restarts="${RESTARTS:-0}"
arguments=("$@")

# Says what is wrong with the configuration before anything starts.
plan="$(pretrain plan "$@" --world-size "$nproc" --json)"
decentral="$(python3 -c '
import json, sys
plan = json.load(sys.stdin)["decentral"] or sys.exit("launch/sites.sh: the configuration has no section [decentral]")
print(plan["sites"], plan["transport"], plan["directory"])' <<<"$plan")"
read -r sites transport directory <<<"$decentral"

declare -a running left   # by site: its process; how often it may be started again
coordinator=""
stopping=false
status=0

start_site() { # site
    local command=(pretrain train "${arguments[@]}" --set "decentral.site=$1") folder="$directory/site_$1"
    if ((nproc > 1)); then
        # torchrun dies of SIGUSR1 unless it is told to pass it on.
        command=(torchrun --standalone --nproc-per-node="$nproc"
            "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --no-python "${command[@]}")
    fi
    mkdir -p "$folder"
    "${command[@]}" >>"$folder/log.txt" 2>&1 &
    running[$1]=$!
    echo "site $1: process $!, $folder/log.txt"
}

start_coordinator() {
    mkdir -p "$directory"
    # In the background it does not hear Ctrl-C, and so is there for the sites' last votes.
    pretrain coordinator "${arguments[@]}" >>"$directory/coordinator.txt" 2>&1 &
    coordinator=$!
    echo "coordinator: process $!, $directory/coordinator.txt"
}

signal_sites() { # signal
    local site
    stopping=true
    for site in "${!running[@]}"; do
        kill "-$1" "${running[$site]}" 2>/dev/null || true
    done
}

code_of() { # process that has ended; sets `code`
    code=0
    wait "$1" || code=$?
}

site_ended() { # site
    code_of "${running[$1]}"
    unset "running[$1]"
    if ((code == 0)); then
        echo "site $1: done"
    elif [[ $stopping == true ]] || ((code == SAVED)); then
        echo "site $1: ended with $code"
        if ((status == 0)); then status=$code; fi
    elif ((code != USER_ERROR && left[$1] > 0)); then
        left[$1]=$((left[$1] - 1))
        echo "site $1: failed with $code, starting it again"
        start_site "$1"
    else
        echo "site $1: failed with $code, ending the others: see $directory/site_$1/log.txt" >&2
        status=$code
        signal_sites TERM
    fi
}

coordinator_ended() {
    code_of "$coordinator"
    coordinator=""
    if ((code == USER_ERROR)); then
        echo "coordinator: failed, ending the sites: see $directory/coordinator.txt" >&2
        status=$code
        signal_sites TERM
    elif [[ $stopping == false ]]; then
        echo "coordinator: ended with $code, starting it again"
        start_coordinator
    fi
}

# SIGTERM for Ctrl-C, too: a terminal sends that to all processes, and a second one would end them without a save.
trap 'signal_sites TERM' TERM INT HUP
trap 'signal_sites USR1' USR1

if [[ $transport == torchft ]]; then start_coordinator; fi
for ((site = 0; site < sites; site++)); do
    left[site]=$restarts
    start_site "$site"
done
echo "to follow: tail -f $directory/site_*/log.txt"
while ((${#running[@]} > 0)); do
    for site in "${!running[@]}"; do
        if ! kill -0 "${running[$site]}" 2>/dev/null; then site_ended "$site"; fi
    done
    if [[ -n $coordinator ]] && ! kill -0 "$coordinator" 2>/dev/null; then coordinator_ended; fi
    sleep 0.5
done
if [[ -n $coordinator ]]; then
    kill "$coordinator" 2>/dev/null || true
    wait "$coordinator" || true
fi
exit "$status"
