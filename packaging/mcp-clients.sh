#!/usr/bin/env bash
# The MCP server of a real machine, driven by clients that are not ours: the official Python SDK
# (PyPI) and the MCP inspector's command line (npm). Needs python3 with venv, npm, and both
# registries. Usage: packaging/mcp-clients.sh PROGRAMS ASSETS
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
programs=$(cd "$1" && pwd)
assets=$(cd "$2" && pwd)
work=$(mktemp -d)
export AEGIS_HOME=$work/home
PATH=$programs:$PATH
unset AEGIS_URL AEGIS_TOKEN

finish() {
  code=$?
  trap - EXIT
  aegis down --all >/dev/null 2>&1 || true
  rm -rf "$work"
  exit $code
}
trap finish EXIT

mkdir -m 700 "$AEGIS_HOME"
ln -s "$assets/kernel" "$assets/images" "$AEGIS_HOME"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install mcp
(cd "$work" && npm install --no-audit --no-fund --silent @modelcontextprotocol/inspector)

aegis up --listen 127.0.0.1:0 >/dev/null
aegis instance start --name agent --can-spawn --max-children 3 --max-expose-ports 4 --memory 512M --limit-memory 2G \
  --expose 9000 -- python3 -c "$(cat "$here/mcp/inside.py")"
until address=$(aegis --json instance info agent | python3 -c '
import json, sys
it = json.load(sys.stdin)
assert it["state"] == "running"
print("127.0.0.1:%d" % it["endpoints"][0]["public_port"])' 2>/dev/null); do sleep 0.2; done
# The server listens a moment after its machine runs.
aegis exec agent -- python3 -c '
import socket, time
for _ in range(100):
    try:
        socket.create_connection(("127.0.0.1", 9000)).close()
        break
    except ConnectionRefusedError:
        time.sleep(0.1)
else:
    raise SystemExit("nothing listens on port 9000 inside")'

"$work/venv/bin/python" "$here/mcp/drive.py" "$address"

inspect() {
  "$work/node_modules/.bin/mcp-inspector" --cli python3 "$here/mcp/wire.py" "$address" "$@"
}
call() {
  tool=$1
  shift
  echo "== $tool $*" >&2
  args=()
  for pair in "$@"; do args+=(--tool-arg "$pair"); done
  inspect --method tools/call --tool-name "$tool" "${args[@]}"
}
# Whether the answer on standard input is no error, and holds a word.
holds() { python3 -c '
import json, sys
answer = json.load(sys.stdin)
text = json.dumps(answer)
print("   ", text[:160])
assert not answer.get("isError") and sys.argv[1] in text, text' "$1"; }

test "$(inspect --method tools/list | python3 -c 'import json,sys; print(len(json.load(sys.stdin)["tools"]))')" = 13
call self_info | holds '"running'
call instance_spawn 'command=["sh","-c","echo from the primary process; sleep infinity"]' \
  handle=built vcpus=1 memory_mb=256 disk_gb=0.3 | holds built
call instance_exec id=built 'command=["uname","-sr"]' | holds Linux
call instance_logs id=built | holds 'from the primary process'
call instance_info id=built | holds running
call instance_list | holds built
call instance_stop id=built | holds stopped
call instance_start id=built | holds start
call instance_delete id=built | holds deleted
call keepalive_acquire ttl_ms=30000 reason=driving | holds lease
call keepalive_release | holds '"'
call expose_port guest_port=9100 | holds public_port
call unexpose_port guest_port=9100 | holds unexposed
echo "every tool was used, by the MCP inspector"
