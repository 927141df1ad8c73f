#!/usr/bin/env bash
# All tests. Machines get their limits only from root, so test programs are started by sudo where
# one is not root; cargo itself is not.
set -euo pipefail

if [ "$(id -u)" != 0 ] && command -v sudo >/dev/null; then
  export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="sudo -E"
fi
if command -v cargo-nextest >/dev/null; then
  # Whatever fails: the rest is worth knowing too.
  exec cargo nextest run --workspace --locked --no-fail-fast "$@"
fi
exec cargo test --workspace --locked --no-fail-fast "$@"
