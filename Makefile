# Two commands do everything: `make demo` shows the appliance at work, `make test` passes its tests.
# Nothing here needs a GPU. Environments are made once and again when their lock file changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CLIENTS := .clients
# Stock clients, each in an environment of its own from requirements/<name>.txt.
ENVIRONMENTS := sdk-12 sdk-11 sdk-10 openai triton
# Stock clients of npm; what makes dashboards, and the types by which they are checked.
TOOLS := node grafana schema
# Other servers that the benchmarks measure beside ours; bench/peers makes their environments when it needs them.
PEERS := clarifai kserve litserve triton
APT := python3-venv gcc pkg-config libsystemd-dev libnghttp2-dev iproute2 curl
# Stock clients that are no Python: the programs they run on. Whoever lacks some sees those tests skipped, with a reason.
STOCK := chromium libnss3-tools php-cli php-curl php-google-protobuf protobuf-compiler protobuf-compiler-grpc \
  default-jdk-headless protobuf-compiler-grpc-java-plugin libgrpc-java libprotobuf-java libnetty-java \
  libnetty-tcnative-java libguava-java libperfmark-java libgeronimo-annotation-1.3-spec-java
# What packages are made and looked through with.
PACKAGES_APT := mmdebstrap debian-archive-keyring debhelper dpkg-dev rpm zstd xz-utils binutils lintian rpmlint
# Much of a run is waiting for processes, so that even two CPUs have time for two tests; ARGS="-n 0" runs one at a time.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal
PIP := --quiet --disable-pip-version-check --require-hashes

.DEFAULT_GOAL := help
.PHONY: help demo test stock check gpu-check bench fuzz fuzz-api sanitize protos dashboards format lock lock-sources clean system
.PHONY: packages packages-cuda release

help: ## What there is.
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/built $(CLIENTS)/sdk-12/ready ## Dev CA, key, daemon, and a stock SDK that classifies digits over TLS.
	$(BIN)/python demo/run.py --sdk $(CLIENTS)/sdk-12/bin/python

test: $(VENV)/built $(ENVIRONMENTS:%=$(CLIENTS)/%/ready) $(TOOLS:%=$(CLIENTS)/%/ready) check ## All tests; the exit code is kept in build/.
	@mkdir -p build
	@$(BIN)/python -m pytest $(PARALLEL) $(ARGS); code=$$?; echo $$code > build/pytest-exit-code; exit $$code

stock: ## Install what the tests of Java, PHP and browser clients run on (as root; else name it).
	@$(MAKE) --no-print-directory system APT="$(STOCK)"

check: $(VENV)/built ## Lint and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu-check: $(VENV)/built ## The tests that need an NVIDIA GPU, alone.
	$(BIN)/python -m pytest -m gpu $(ARGS)

bench: $(VENV)/built ## All that the bars stand on, two hours; ARGS=--quick: half an hour; bench/README.md has the parts.
	$(BIN)/python -m bench all $(ARGS)

# VERSION=1.2.3 names them otherwise than the code does; docs/packages.md has more to choose, and how they are signed.
PACKAGES = $(MAKE) --no-print-directory system APT="$(PACKAGES_APT)" && $(BIN)/python packaging/build.py
packages: $(VENV)/ready ## deb, rpm, SBOM and checksums into dist/, as root; ten minutes the first time, then one.
	$(PACKAGES) packages --version "$(VERSION)" $(ARGS)

packages-cuda: $(VENV)/ready ## The same of inference-appliance-cuda13, the libraries for NVIDIA GPUs: 1.5 GB.
	$(PACKAGES) cuda --version "$(VERSION)" $(ARGS)

release: $(VENV)/built ## Packages at their smallest, made twice and compared, looked through, and run in a virtual machine.
	$(PACKAGES) release --version "$(VERSION)" $(ARGS)
	PACKAGES=dist RELEASE=1 $(BIN)/python -m pytest tests/packaging
	@$(MAKE) --no-print-directory limits

# Emulated, so that it needs no /dev/kvm: some minutes.
LIMITS_APT := qemu-system-x86 cpio mmdebstrap debian-archive-keyring
.PHONY: limits
limits: $(VENV)/built ## dist/ in a virtual machine with an old CPU: limits of memory, tasks and CPU time, as root.
	@$(MAKE) --no-print-directory system APT="$(LIMITS_APT)"
	PACKAGES=dist $(BIN)/python -m pytest tests/e2e/limits $(ARGS)

# clang, with its runtime for fuzzers, is asked for here only: apt-get install clang-14 libclang-rt-14-dev
FUZZ := -g -O1 -std=gnu11 -DH2_FAULTS -Iappliance/wire/native -fno-sanitize-recover=all
SECONDS := 120
fuzz: ## The HTTP/2 core under libFuzzer for SECONDS; findings and corpus stay in build/fuzz/.
	@mkdir -p build/fuzz/corpus
	clang $(FUZZ) -fsanitize=fuzzer,address,undefined -o build/fuzz/h2 tests/fuzz/h2_target.c appliance/wire/native/h2.c -lnghttp2
	$(PYTHON) tests/fuzz/seeds.py build/fuzz/corpus
	cd build/fuzz && ./h2 -max_len=2048 -timeout=20 -max_total_time=$(SECONDS) -print_final_stats=1 corpus

fuzz-api: $(VENV)/built ## A daemon under any requests, REST and media files for SECONDS (SEED=… again); findings in build/fuzz-api/.
	PYTHONPATH=.:tests $(BIN)/python -W ignore -m fuzz.api $(SECONDS) $(ARGS)

sanitize: $(VENV)/built ## The wire's unit tests with the native part under AddressSanitizer, UBSan and a search for leaks.
	@mkdir -p build/sanitize
	gcc -shared -fPIC -g -O1 -std=gnu11 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined \
	  -I$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))') \
	  -o build/sanitize/_h2.abi3.so appliance/wire/native/module.c appliance/wire/native/h2.c -lnghttp2
	H2_MODULE=build/sanitize/_h2.abi3.so PYTHONPATH=tests/fuzz PYTHONMALLOC=malloc \
	  LD_PRELOAD=$$(gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=1:malloc_context_size=4 \
	  LSAN_OPTIONS=suppressions=tests/fuzz/leaks.supp:print_suppressions=0 \
	  $(BIN)/python -m pytest -p sanitized --capture=sys tests/unit/wire $(ARGS)

# Debian's protoc, whose code every protobuf runtime that we allow takes: apt-get install protobuf-compiler
protos: ## Python of our own .proto files; what comes out is committed.
	protoc --python_out=. --pyi_out=. appliance/api/inference.proto

# What boots machines with a systemd of their own, and makes their roots. Packages come from the cache when nothing that goes
# into them has changed.
E2E_APT := systemd-container mmdebstrap debian-archive-keyring iproute2 util-linux binutils zstd xz-utils
.PHONY: e2e
e2e: $(VENV)/built $(CLIENTS)/sdk-12/ready ## deb and rpm on machines with a booted systemd, as root; UPDATE_DOCS=1 writes docs/install.md.
	@case "$$E2E_SYSTEMD" in skip*) ;; *) \
	  $(MAKE) --no-print-directory system APT="$(E2E_APT)" && $(MAKE) --no-print-directory packages ARGS= && \
	  PYTHONPATH=tests $(BIN)/python -m support.machines.packages && \
	  PYTHONPATH=tests $(BIN)/python -m support.machines.roots ;; esac
	@mkdir -p build
	@case "$$E2E_SYSTEMD" in skip*) ;; *) export PACKAGES=dist ;; esac; \
	  $(BIN)/python -m pytest tests/e2e/systemd tests/packaging $(ARGS); code=$$?; echo $$code > build/e2e-exit-code; exit $$code

.PHONY: e2e-cold
e2e-cold: $(VENV)/built $(CLIENTS)/sdk-12/ready ## The same with nothing in the cache, and how long that took: the most that CI pays.
	@rm -rf build/cold build/e2e; begun=$$(date +%s); \
	APPLIANCE_CACHE=$(CURDIR)/build/cold $(MAKE) --no-print-directory e2e; code=$$?; rm -rf build/cold; \
	echo "packages and e2e tests from nothing: $$(($$(date +%s) - begun)) s on $$(nproc) CPUs" | tee build/e2e-cold; exit $$code

dashboards: $(CLIENTS)/grafana/ready ## Grafana's dashboards, from packaging/grafana; what comes out is committed.
	$(CLIENTS)/grafana/bin/python packaging/grafana/generate.py

.PHONY: drill
drill: $(VENV)/built ## Seven faults, each seen in metric, alert, log and page, and mended, as root: 17 minutes; UPDATE_DOCS=1 writes docs/drill.md.
	@$(MAKE) --no-print-directory system APT="gcc prometheus"
	$(BIN)/python -m pytest tests/drill $(ARGS)

FLEET_APT := haproxy iproute2 util-linux
.PHONY: fleet
fleet: $(VENV)/built $(if $(findstring haproxy,$(FLEET_PARTS)),,$(CLIENTS)/envoy/ready) ## Three appliances behind balancers, a day of a flapping link; as root; UPDATE_DOCS=1 writes docs/fleet.md.
	@$(MAKE) --no-print-directory system APT="$(FLEET_APT)"
	@mkdir -p build
	@FLAPPING_HOURS=$${FLAPPING_HOURS-24} $(BIN)/python -m pytest tests/fleet $(if $(FLEET_PARTS),,tests/orchestrator/test_flapping.py) $(ARGS); \
	  code=$$?; echo $$code > build/fleet-exit-code; exit $$code

format: $(VENV)/ready ## Put the code into shape.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Debian keeps venv in a package of its own; systemd-python is compiled. As root they are installed, else named.
system:
	@missing=$$(for name in $(APT); do dpkg-query -W -f '$${Status}' $$name 2>/dev/null | grep -q 'ok installed' || echo $$name; done); \
	if [ -z "$$missing" ] || ! command -v apt-get >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ]; then \
	  echo "installing: $$missing"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; \
	else \
	  echo "These packages are missing; ask for: apt-get install" $$missing >&2; \
	fi

$(VENV)/ready: requirements/dev.txt requirements/systemd.txt | system
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/pip install $(PIP) -r requirements/dev.txt
	@# With an NVIDIA driver the GPU build of onnxruntime takes the CPU build's place: they are the same module.
	if [ -e /proc/driver/nvidia/version ]; then \
	  $(BIN)/pip uninstall --quiet --yes onnxruntime && $(BIN)/pip install $(PIP) -r requirements/run-gpu.txt; \
	fi
	$(BIN)/pip install $(PIP) --no-build-isolation -r requirements/systemd.txt \
	  || echo "systemd-python cannot be built here: tests that need it will be skipped" >&2
	touch $@

# The package itself, with its native part, which is compiled anew when its source changes.
NATIVE := $(wildcard appliance/wire/native/*.[ch])
$(VENV)/built: $(VENV)/ready pyproject.toml setup.py $(NATIVE)
	rm -rf appliance/wire/_h2*.so
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@test -e appliance/wire/_h2.abi3.so || echo "the native wire cannot be built here: grpcio serves instead" >&2
	touch $@

# The stock clients for Node and browsers, and Grafana's types, where npm is; their tests say so where it is not.
$(CLIENTS)/node/ready $(CLIENTS)/schema/ready: $(CLIENTS)/%/ready: requirements/%/package.json requirements/%/package-lock.json | system
	@mkdir -p $(@D) && cp requirements/$*/* $(@D)/
	@cd $(@D) && npm ci --silent --ignore-scripts --no-audit --no-fund \
	  || echo "what npm brings cannot be installed here: their tests will be skipped" >&2
	touch $@

$(CLIENTS)/%/ready: requirements/%.txt | system
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install $(PIP) -r $<
	touch $@

COMPILE = $(BIN)/pip-compile --generate-hashes --strip-extras --allow-unsafe --no-emit-index-url \
  --no-emit-find-links --no-emit-trusted-host --no-emit-options --no-header --quiet
# The packages' own Python is not the one that runs here, so another tool resolves for it. Versions are those that the
# tests run with. What only downloads from model hubs or colours source code is not shipped.
NOT_SHIPPED := huggingface-hub hf-xet fsspec filelock httpx2 httpcore2 truststore tqdm pygments markdown-it-py mdurl
COMPILE_SHIPPED = $(CLIENTS)/uv/bin/uv pip compile --generate-hashes --no-header --quiet --python-version 3.13 \
  --python-platform x86_64-manylinux_2_28
lock: $(VENV)/ready $(CLIENTS)/uv/ready ## Pin and hash every requirement anew.
	$(COMPILE) --extra cpu --extra traces -o requirements/run-cpu.txt pyproject.toml
	$(COMPILE) --extra gpu --extra traces -o requirements/run-gpu.txt pyproject.toml
	$(COMPILE) --extra cpu --extra traces --extra dev -o requirements/dev.txt pyproject.toml
	for name in $(ENVIRONMENTS) envoy grafana draw systemd uv bench-pyspy $(PEERS:%=bench-%); do $(COMPILE) -o requirements/$$name.txt requirements/$$name.in || exit 1; done
	$(COMPILE_SHIPPED) --extra cpu --extra systemd --extra traces $(NOT_SHIPPED:%=--no-emit-package %) \
	  -c requirements/run-cpu.txt -c requirements/systemd.txt -o requirements/package.txt pyproject.toml
	$(COMPILE_SHIPPED) -c requirements/package.txt -o requirements/package-build.txt requirements/package-build.in
	$(COMPILE_SHIPPED) -c requirements/package.txt -c requirements/run-gpu.txt \
	  -o requirements/package-cuda13.txt requirements/package-cuda13.in

lock-sources: ## Lock the newest of Debian's sources that the packages' runtime is compiled from.
	$(PYTHON) packaging/runtime/sources.py lock

clean: ## Remove what was made.
	rm -rf $(VENV) $(CLIENTS) .demo build dist
