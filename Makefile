# Thin on purpose: each target is a few calls of cargo and aegis. `make demo` and `make test` need
# nothing but a Debian or Ubuntu with Rust; what else is missing they install.

TARGET ?= target
DIST   ?= dist
BIN    := $(DIST)/bin
TRIPLE := x86_64-unknown-linux-gnu
# What runs inside: PID 1 starts before there is any shared library, and no image need have one.
STATIC := -C target-feature=+crt-static -C relocation-model=static
# A home with kernel and base image, shared by tests and benchmarks.
export AEGIS_TEST_ASSETS   ?= $(abspath $(TARGET))/assets
export AEGIS_TEST_PROGRAMS ?= $(abspath $(BIN))
# The harness that the tests turn against its host; never installed.
HOSTILE := $(TARGET)/harness/$(TRIPLE)/harness/aegis-hostile
export AEGIS_TEST_HOSTILE  ?= $(abspath $(dir $(HOSTILE)))

# What tests have in the image of machines that call outside.
CLIENTS := python3-pip,bind9-dnsutils,openssl,netcat-openbsd

.PHONY: build hostile setup assets demo test mcp-clients llm-clients bench fmt lint tools

build: tools
	cargo build --release --locked --target-dir $(TARGET) -p aegis-cli -p aegisd -p aegis-images -p aegis-vers -p aegis-worker
	RUSTFLAGS='$(STATIC)' cargo build --profile harness --locked --target $(TRIPLE) --target-dir $(TARGET)/harness -p aegis-harness -p aegis-mcp-guest
	install -C -D -t $(BIN) $(TARGET)/release/aegis $(TARGET)/release/aegisd $(TARGET)/release/aegis-image $(TARGET)/release/aegis-vers-double $(TARGET)/release/aegis-worker
	install -C -D -t $(BIN) $(TARGET)/harness/$(TRIPLE)/harness/aegis-harness $(TARGET)/harness/$(TRIPLE)/harness/aegis-mcp-guest

hostile:
	RUSTFLAGS='$(STATIC)' cargo build --profile harness --locked --target $(TRIPLE) --target-dir $(TARGET)/harness -p aegis-hostile

tools:
	@packaging/tools.sh

setup: build
	$(BIN)/aegis setup --install --yes

assets: build
	$(BIN)/aegis --home $(AEGIS_TEST_ASSETS) setup --install --yes
	$(BIN)/aegis --home $(AEGIS_TEST_ASSETS) setup --image clients --include $(CLIENTS)

demo: build
	packaging/demo.sh $(BIN)

test: assets hostile
	packaging/test.sh --target-dir $(TARGET)

# Clients that are not ours, from PyPI and npm: MCP's, and the LLM vendors' own. Not part of `make
# test`, which needs neither.
mcp-clients: assets
	packaging/mcp-clients.sh $(BIN) $(AEGIS_TEST_ASSETS)

llm-clients: assets
	packaging/llm-clients.sh $(BIN) $(AEGIS_TEST_ASSETS)

bench: assets
	cargo run --release --locked --target-dir $(TARGET) -p aegis-bench

fmt:
	cargo fmt --all

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked --target-dir $(TARGET) -- -D warnings
	if command -v cargo-deny >/dev/null; then cargo deny check; fi
