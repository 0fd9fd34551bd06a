# Omerta's commands. Each says what it does and ends in a summary; its exit status tells.
#
#   make setup    install what is missing (deploy/setup.sh)
#   make build    target/release/{omerta,omertad,omerta-demo}
#   make image    the guest image, in target/image, or make image IMAGE=DIR
#   make demo     setup, build, image, then the demonstration
#   make test     setup, image, then every test; all of it built once, for testing
#   make fuzz     every fuzz target for SECONDS=N (60)
#   make soak     a guest that means no harm, for two hours or SECONDS=N; then parity, policy flips and kills under
#                 traffic, until Ctrl-C or as long again
#   make prove    proof, by a solver, of what the compiled kernel programs allow (tests/prove)
#   make lint     formatting, clippy, dependencies, scripts, deploy files
#   make clean    remove target/
#   make bench    what a guard costs, against no filter and nftables; BENCH="tap --rounds 31" chooses
#   make bench-readme  all benches, and the README's table of their results
#   make lab      not built yet: it says so and fails

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# cargo, rustup and bpf-linker may not be on PATH (sudo, services).
export PATH := $(or $(CARGO_HOME),$(HOME)/.cargo)/bin:$(PATH)

.PHONY: help setup build image demo test bench bench-readme fuzz soak lab prove lint clean

help:
	@sed -n 's/^#   make/  make/p' Makefile

setup:
	@deploy/setup.sh

build:
	@echo "build: omerta, omertad, omerta-demo (release)"
	@cargo build --release --locked -p omerta-cli -p omerta-daemon -p omerta-demo
	@echo "build: done, in target/release"

image:
	@vm-launcher/image/build.sh $(or $(IMAGE),target/image)

demo: setup
	@$(MAKE) --no-print-directory build image
	@target/release/omerta-demo

test: setup
	@$(MAKE) --no-print-directory image
	@tests/run.sh

fuzz:
	@tests/fuzz/run.sh $(or $(SECONDS),60)

soak: image
	@OMERTA_HONEST_SECONDS=$(or $(SECONDS),7200) cargo test --workspace --locked --test omertad -- --nocapture honest_traffic
	@cargo build --release --locked -p omerta-soak
	@target/release/omerta-soak $(if $(SECONDS),--seconds $(SECONDS))
prove:
	@tests/prove/run.sh

lint:
	@deploy/setup.sh --lint
	@tests/lint.sh

bench:
	@deploy/setup.sh --bench
	@cargo build --release --locked -p omerta-bench -p omerta-cli -p omerta-daemon
	@target/release/omerta-bench $(BENCH)

bench-readme:
	@$(MAKE) --no-print-directory bench
	@target/release/omerta-bench --readme README.md
	@echo "bench-readme: wrote the table in README.md"

lab:
	@echo "make $@: not built yet" >&2
	@exit 1

clean:
	@cargo clean
	@rm -rf ebpf/programs/target
	@echo "clean: done"
