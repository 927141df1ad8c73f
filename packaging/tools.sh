#!/usr/bin/env bash
# What a build needs besides Rust: a C compiler (SQLite is built in) with the static C library. And
# what tests need: ip, which makes the network that they call outside, git, which is served there, a
# registry of images, and what reads an image that is not our own writer.
set -euo pipefail

missing=()
command -v cc >/dev/null || missing+=(build-essential)
command -v curl >/dev/null || missing+=(curl)
command -v git >/dev/null || missing+=(git)
PATH=$PATH:/usr/sbin:/sbin command -v ip >/dev/null || missing+=(iproute2)
command -v docker-registry >/dev/null || missing+=(docker-registry)
PATH=$PATH:/usr/sbin:/sbin command -v fsck.erofs >/dev/null || missing+=(erofs-utils)
if [ ${#missing[@]} -gt 0 ]; then
  echo "installing ${missing[*]}" >&2
  as_root=()
  if [ "$(id -u)" != 0 ]; then as_root=(sudo); fi
  "${as_root[@]}" apt-get update
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install --yes --no-install-recommends "${missing[@]}"
fi

if ! command -v cargo >/dev/null; then
  echo "cargo is missing: install Rust (https://rustup.rs), then try again" >&2
  exit 1
fi
