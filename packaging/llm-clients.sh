#!/usr/bin/env bash
# The LLM door, asked from inside a real machine by clients that are not ours: the official OpenAI
# and Anthropic SDKs from PyPI. The vendor behind the door is llm/vendor.py. Needs python3 with venv,
# erofs-utils (`aegis setup` installs them), PyPI and root. Usage: packaging/llm-clients.sh PROGRAMS ASSETS
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
programs=$(cd "$1" && pwd)
assets=$(cd "$2" && pwd)

# Machines get their limits from root alone.
if [ "$(id -u)" != 0 ] && command -v sudo >/dev/null; then
  exec sudo "$0" "$programs" "$assets"
fi
work=$(mktemp -d)
export AEGIS_HOME=$work/home
PATH=$programs:$PATH:/usr/sbin:/sbin
unset AEGIS_URL AEGIS_TOKEN

finish() {
  code=$?
  trap - EXIT
  if [ $code -ne 0 ]; then tail -n 30 "$AEGIS_HOME/data/aegisd.log" >&2 || true; fi
  aegis down --all >/dev/null 2>&1 || true
  if [ -n "${vendor:-}" ]; then kill "$vendor" || true; fi
  rm -rf "$work"
  exit $code
}
trap finish EXIT

# What the host alone knows, and what is found nowhere inside.
key=sk-$(head -c 24 /dev/urandom | base64 | tr '+/' '-_')
python3 "$here/llm/vendor.py" "$key" "$work/port" "$work/spent" &
vendor=$!
until [ -e "$work/port" ]; do sleep 0.1; done
port=$(cat "$work/port")

# The base image with the SDKs in it, for the Python that is in it.
mkdir -p "$work/tree" && mkdir -m 700 "$AEGIS_HOME"
fsck.erofs --extract="$work/tree" --force --overwrite "$assets/images/base/base.erofs" >/dev/null
python=$(basename "$(readlink "$work/tree/usr/bin/python3")")
python3 -m venv "$work/venv"
"$work/venv/bin/pip" -q install --target "$work/tree/opt/llm" --only-binary=:all: \
  --implementation cp --python-version "${python#python}" \
  --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux_2_28_x86_64 \
  openai anthropic
# Else the machine compiles them at every start.
chroot "$work/tree" python3 -m compileall -q /opt/llm
cp "$here/llm/drive.py" "$work/tree/opt/llm/"
mkdir -p "$AEGIS_HOME/images/llm"
mkfs.erofs --quiet "$AEGIS_HOME/images/llm/base.erofs" "$work/tree"
rm -rf "$work/tree"
ln -s "$assets/kernel" "$AEGIS_HOME"
ln -s "$assets/images/base" "$AEGIS_HOME/images/base"

cat > "$AEGIS_HOME/aegis.toml" <<TOML
[llm.providers.openai]
kind = "openai"
base_url = "http://127.0.0.1:$port/v1"
secret = "VENDOR_KEY"
models = ["gpt-*"]

[llm.providers.anthropic]
kind = "anthropic"
base_url = "http://127.0.0.1:$port"
secret = "VENDOR_KEY"
models = ["claude-*"]
TOML
aegis up --listen 127.0.0.1:0 >/dev/null
printf %s "$key" | aegis secret set VENDOR_KEY >/dev/null

# A guest with a budget of tokens; prints its id and that of its machine.
guest() {
  code=$(aegis --json invite create --golden llm --tokens "$1" --memory 512M --disk 1G \
    --internet no --on-limit throttle | python3 -c 'import json, sys; print(json.load(sys.stdin)["code"])')
  aegis --json redeem "$code" --name sdk --wait |
    python3 -c 'import json, sys; it = json.load(sys.stdin)["status"]; print(it["guestId"], it["vmId"])'
}
used() {
  aegis --json guest status "$1" |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["resourceUsage"]["tokensUsed"])'
}
drive() { aegis exec "$1" -- env PYTHONPATH=/opt/llm python3 /opt/llm/drive.py "$2"; }

echo "== both SDKs talk, within a large budget"
read -r id machine < <(guest 1000000)
drive "$machine" talk
test "$(used "$id")" = "$(cat "$work/spent")"
echo "the host counted $(used "$id") tokens, as many as the vendor told of"
if aegis exec "$machine" -- sh -c "grep -raF -- '$key' /proc/[0-9]*/environ /etc /run /opt /workspace 2>/dev/null"; then
  echo "the vendor's key is inside" >&2
  exit 1
fi
aegis guest kill "$id" >/dev/null

echo "== both SDKs raise their own exception when a small budget is used up"
before=$(cat "$work/spent")
read -r id machine < <(guest 2000)
drive "$machine" exhaust
spent=$(($(cat "$work/spent") - before))
echo "spent $spent of 2000 tokens; the host counted $(used "$id")"
test "$spent" -gt 0 && test "$spent" -le 2000 && test "$(used "$id")" -le 2000
aegis guest kill "$id" >/dev/null
echo "both SDKs work unmodified against the door"
