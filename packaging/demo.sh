#!/usr/bin/env bash
# The whole couch flow on a real machine, step by step: a host lends a guest a VM, the guest uses
# it, the host ends it and gets a receipt. Usage: packaging/demo.sh [DIRECTORY_OF_PROGRAMS]
set -euo pipefail

programs=$(cd "${1:-dist/bin}" && pwd)

# Limits are enforced by cgroups, and each VMM gets a user of its own: both need root.
if [ "$(id -u)" != 0 ] && command -v sudo >/dev/null; then
  echo "The daemon runs as root, so that limits can be enforced: asking sudo."
  exec sudo AEGIS_DEMO_HOME="${AEGIS_DEMO_HOME:-}" "$0" "$programs"
fi

# A home of its own: nothing of yours is touched. Kernel and base image stay there for next time.
export AEGIS_HOME=${AEGIS_DEMO_HOME:-$HOME/.aegis-demo}
unset AEGIS_URL AEGIS_TOKEN
PATH=$programs:$PATH

step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
# Shows a command, then runs it.
show() { printf '\033[2m$ %s\033[0m\n' "$*"; "$@"; }
# The value behind "Name:" in an answer.
value() { sed -n "s/^$1: *//p" | head -n 1; }

finish() {
  code=$?
  trap - EXIT
  if [ $code -ne 0 ]; then
    printf '\nThe demo failed. Last words of the daemon:\n' >&2
    tail -n 30 "$AEGIS_HOME/data/aegisd.log" >&2 || true
  fi
  aegis down --all >/dev/null 2>&1 || aegis down || true
  exit $code
}
trap finish EXIT
trap 'exit 130' INT TERM

step "What machines need: tools, a guest kernel, a base image"
aegis setup --install --yes
# Every guest's machine starts this process, and shows its port 8080 to the host.
cat > "$AEGIS_HOME/aegis.toml" <<'TOML'
[guest]
command = ["sh", "-c", "mkdir -p /srv/agent && (echo 'Hello from inside:'; uname -a) > /srv/agent/index.html && cd /srv/agent && exec python3 -m http.server 8080"]
TOML
aegis doctor

step "The daemon"
aegis down >/dev/null 2>&1 || true
url=$(aegis up --listen 127.0.0.1:0)
echo "listens on $url"
show aegis status

step "The host invites somebody: 1 CPU, 512 MB memory, 2 GB disk, 1 hour"
invite=$(show aegis invite create --label demo --cpus 1 --memory 512M --disk 2G --hours 1)
echo "$invite"
code=$(value Code <<<"${invite}")

step "The guest redeems the code, over HTTP and without any token, and waits for its machine"
guest=$(show aegis --url "$url" redeem "$code" --name ty --wait)
echo "$guest"
guest_id=$(value Guest <<<"$guest")
machine=$(value Machine <<<"$guest")
agent=$(value Agent <<<"$guest")
token=$(value Token <<<"$guest")

step "The guest's agent answers at its endpoint"
show curl --fail --silent --show-error --max-time 30 "$agent/"

step "Inside is another kernel than outside, and what was promised: CPU, memory, disk"
echo "outside: $(uname -a)"
show aegis exec "$machine" -- uname -a
show aegis exec "$machine" -- sh -c 'echo "$(nproc) CPU"; free -m | head -n 2; df -h / | tail -n 1'
echo "a command's exit code comes out as its own:"
show aegis exec "$machine" -- sh -c 'echo to stdout; echo to stderr >&2; exit 3' || echo "exit code $?"

step "What the guest sees of itself"
printf '\033[2m$ curl -H "Authorization: Bearer guest_…" %s/couch/status\033[0m\n' "$url"
curl --fail --silent --show-error --max-time 30 -H "Authorization: Bearer $token" "$url/couch/status"
echo

step "What the host sees: who is here, and what they used"
show aegis guest list
show aegis guest status "$guest_id"

step "The host ends it: revoked, destroyed, proven gone"
show aegis guest kill "$guest_id"

step "Nothing of it answers any more"
if curl --silent --output /dev/null --max-time 5 "$agent/"; then
  echo "the agent still answers" >&2
  exit 1
fi
echo "agent endpoint: refused"
status=$(curl --silent --output /dev/null --write-out '%{http_code}' --max-time 5 \
  -H "Authorization: Bearer $token" "$url/couch/status")
echo "guest token: HTTP $status"
test "$status" = 404
show aegis instance list
show aegis guest list

step "Done. Kernel and base image stay in $AEGIS_HOME for next time"
