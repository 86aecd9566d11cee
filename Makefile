PYTHON ?= python3
# The tested release of torch. It is not installed if PYTHON has a torch with CUDA.
TORCH ?= torch==2.13.0
CONSTRAINTS ?= tests/constraints.txt

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --quiet --disable-pip-version-check
SOURCES := setup.py pyproject.toml MANIFEST.in $(CONSTRAINTS) $(wildcard csrc/*)
# This file exists if torch with CUDA comes from PYTHON. Its packages, among them those of the build, are then used too.
BORROWED := $(VENV)/borrowed

.PHONY: nightly test quick demo gpu gpu-bench gpu-check gpu-sanitize sanitize lint clean types docs wheel matrix

test: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m mypy & types=$$!; $(RUN) -m pytest -q -rs -n auto --dist worksteal && wait $$types

quick: $(VENV)/.test
	$(RUN) -m ruff check .
	$(RUN) -m pytest -q -n auto --dist worksteal -m "not slow and not nightly"

demo: $(VENV)/.hf
	$(VENV)/bin/adept-fast demo

# On a GPU. Each part goes on after failures, which it reports at its end, takes under GPU_SECONDS, and leaves JSON in OUT.
OUT ?= build/gpu
GPU_SECONDS ?= 470
GPU_BENCHES := gradient_sums linear_cross_entropy scoring
GPU_PARTS := gpu-bench gpu-check gpu-sanitize
SANITIZER ?= compute-sanitizer
gpu:
	failed=; for part in $(GPU_PARTS); do $(MAKE) --no-print-directory $$part || failed="$$failed $$part"; done; \
		[ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

gpu-bench: $(VENV)/.test
	mkdir -p $(OUT); failed=; half=$$(( $(GPU_SECONDS) / 2 )); \
	timeout $$half $(RUN) -m bench adamw --seconds=$$(( half - 10 )) --save > $(OUT)/adamw.json || failed=" adamw"; \
	for bench in $(GPU_BENCHES); do \
		timeout $$(( half / 3 )) $(RUN) -m bench $$bench --save > $(OUT)/$$bench.json || failed="$$failed $$bench"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

gpu-check: $(VENV)/.test
	$(RUN) -m tests.gpu $(OUT)/check.json --seconds=$(GPU_SECONDS) -- -m gpu $$(grep -l 'mark\.gpu' -r tests --include=test_*.py)

# Some virtual machines do not support it.
gpu-sanitize: $(VENV)/.test
	failed=; for tool in memcheck racecheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(RUN) -m tests.gpu $(OUT)/$$tool.json --seconds=$$(( $(GPU_SECONDS) / 2 )) \
			--under "$(SANITIZER) --tool $$tool --kernel-name kns=adept_fast --report-api-errors no --error-exitcode 1" \
			-- -m gpu tests/gpu/test_adamw_cuda_gpu.py -k reference_bits || failed="$$failed $$tool"; \
	done; [ -z "$$failed" ] || { echo "failed:$$failed"; exit 1; }

# Runs the tests of the C++ extension with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the tree.
SANITIZED := build/sanitized
# Newer setuptools compile C++ with CXXFLAGS, older ones with CFLAGS.
SANITIZING := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined
SANITIZED_TESTS := $(addprefix tests/,$(addsuffix .py,ops/test_adamw_cpu optim/test_adamw_units ops/test_linear_cross_entropy ops/test_gradient_sums models/test_cpu_layers scoring/test_unit_importance))
sanitize: $(VENV)/.test
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -rL adept_fast csrc tests setup.py pyproject.toml README.md LICENSE $(SANITIZED) && rm -f $(SANITIZED)/adept_fast/_C*.so
	cd $(SANITIZED) && ADEPT_FAST_BUILD_CUDA=0 CXXFLAGS="$(SANITIZING)" CFLAGS="$(SANITIZING)" LDFLAGS="-fsanitize=address,undefined" \
		../../$(RUN) setup.py -q build_ext --inplace
	nm $(SANITIZED)/adept_fast/_C*.so | grep -q __asan_report_load
	cd $(SANITIZED) && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
		../../$(RUN) -m pytest -q -p no:cacheprovider $(SANITIZED_TESTS) -k "not forked and not memory_does_not_grow"
	cd $(SANITIZED) && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
		../../$(RUN) -m tests.crash --count 500 --seconds 120

# Random cases that must end in right numbers or in one clear line. The date is the seed; SEED=2026334 repeats day 334 of 2026.
COUNT ?= 3000
SEED ?= $(shell date +%Y%j)
nightly: $(VENV)/.test
	$(RUN) -m pytest -q -n auto --dist worksteal -m nightly
	$(RUN) -m tests.crash --count $(COUNT) --seed $(SEED)000
	$(RUN) -m tests.fuzz --seed $(SEED) --cases 1500
	$(RUN) -m tests.reliability.campaign --seed $(SEED)

# The sdist and wheels in dist/ for all Pythons that are found, or for PYTHONS="3.11 3.12"; each is tried where there is no compiler.
wheel: $(VENV)/.test
	$(RUN) -m tests.installing.wheels --torch $(TORCH) $(PYTHONS)

# These wheels under the releases of torch and transformers that pyproject.toml allows, one combination a core: 3 GB of downloads, 5 GB of disk each.
matrix: wheel
	$(RUN) -m tests.installing.matrix --torch $(TORCH)

lint: $(VENV)/.test
	$(RUN) -m ruff check .

types: $(VENV)/.test
	$(RUN) -m mypy

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build dist *.egg-info adept_fast/_C.*.so adept_fast/_CUDA.*.so .mypy_cache .pytest_cache .ruff_cache .benchmarks .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.torch:
	$(PYTHON) -m venv --clear $(VENV) || $(PYTHON) -m venv --clear --without-pip $(VENV)
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
		$(PIP) uninstall --yes setuptools; \
		$(PYTHON) -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' > $(BORROWED); \
		cp $(BORROWED) "$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"; \
	else \
		$(PIP) install --no-compile $(TORCH); \
	fi
	@touch $@

$(VENV)/.test $(VENV)/.hf: $(VENV)/.%: $(VENV)/.torch $(SOURCES)
	@if [ -e $(BORROWED) ]; then \
		$(PIP) install --no-build-isolation --no-deps --config-settings editable_mode=compat --editable . && \
		{ $(PIP) install --retries 0 'adept-fast[$*]' || echo "not everything of [$*] can be installed here: going on with what there is"; }; \
	else \
		$(PIP) install --no-compile --constraint $(CONSTRAINTS) --config-settings editable_mode=compat --editable '.[$*]'; \
	fi
	@touch $@
