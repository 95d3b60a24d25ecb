# Every target does its own set-up into .venv; it needs Python >= 3.11 with headers, a C compiler and make.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
SOURCES := $(wildcard ext/*) setup.py pyproject.toml
SECONDS ?= 60
KIND ?= thread
MINUTES ?= 10
TARGET ?= scan

.PHONY: demo test bench bench-growth bench-compaction bench-compare proof soak fuzz market docs freethreaded sanitize annotate \
	dist clean

demo: $(VENV)/installed			## live prices from a writer and two readers, a kill, a recovery, a report
	$(RUN) -m logkv demo

test: $(VENV)/tools			## types, stubs, tests
	$(RUN) -m mypy
	$(RUN) -m mypy.stubtest logkv._core
	$(RUN) -m pytest

bench: $(VENV)/bench			## beside the dict and the pure-Python baseline: page and charts; ARGS="--keys 100000"
	$(RUN) -m benchmarks --json build/benchmarks.json --markdown docs/benchmarks/README.md --chart docs/benchmarks $(ARGS)

bench-growth: $(VENV)/bench		## 20,000,000 keys: every put timed, opening, rebuilding, readers; ARGS="--keys 1000000"
	$(RUN) -m benchmarks.growth --json build/growth.json --markdown docs/benchmarks/growth.md --chart docs/benchmarks $(ARGS)
	$(RUN) -m benchmarks.sharing --json build/sharing.json --markdown docs/benchmarks/sharing.md $(ARGS)

bench-compaction: $(VENV)/bench		## disk use, bytes copied and throughput while a store compacts; ARGS="--operations 300000"
	$(RUN) -m benchmarks.compaction --json build/compaction.json --markdown docs/benchmarks/compaction.md --chart docs/benchmarks \
	    $(ARGS)

bench-compare: $(VENV)/bench		## pytest-benchmark against the last saved run; ARGS="--shapes 8+20"
	$(RUN) -m pytest benchmarks --benchmark-enable --benchmark-only --benchmark-autosave --benchmark-compare $(ARGS)

proof: $(VENV)/tools			## every check of durability within MINUTES=10 on two cores, as one table
	$(RUN) -m tests.proof --minutes $(MINUTES) $(ARGS)

soak: $(VENV)/tools			## a store beside a dict through merges, kills and power cuts: SECONDS=60
	$(RUN) -m tests.proof.soak --seconds $(SECONDS)

fuzz: $(VENV)/tools			## any bytes, under sanitizers: MINUTES=10 TARGET=scan|manifest|open|repair|import; GUIDED=1
	$(RUN) -m tests.proof.fuzz --target $(TARGET) --seconds $$(($(MINUTES) * 60)) $(if $(GUIDED),--guided) $(ARGS)

docs: $(VENV)/installed			## docs/api.md from the docstrings
	$(RUN) docs/reference.py

freethreaded:				## the tests without the GIL, on a CPython built for it once; ARGS="tests/test_store.py"
	.ci/freethreaded $(ARGS)

sanitize: $(VENV)/tools		## all tests with the core under gcc's sanitizers: KIND=thread|address|undefined|leak
	PYTHON=$(RUN) .ci/sanitize $(KIND) $(ARGS)

annotate:				## build/ext/_core.html: where Cython touches Python
	LOGKV_ANNOTATE=1 $(RUN) setup.py -q build_ext --inplace --force

dist: $(VENV)/tools			## an sdist, a wheel built from it, and both installed and tried
	rm -rf dist build/try
	$(RUN) -m build
	for file in dist/*.tar.gz dist/*.whl; do \
	    $(RUN) -m venv build/try && build/try/bin/pip install --quiet --disable-pip-version-check $$file && \
	    (cd build && try/bin/logkv demo --seconds 1) || exit 1; rm -rf build/try; done

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "LogKV needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python $(SOURCES)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[cli]'
	touch $@

$(VENV)/tools: $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

$(VENV)/bench: $(VENV)/tools
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info logkv/*.so
