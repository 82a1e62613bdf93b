# Two commands make everything: `make demo` and `make test`. All of it ends up in .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo bench goals serve-load test lint check wide wheel wheel-with gpu-check ort-gpu-check gpu-kit platforms aarch64 mac-check fuzz soak crash matrix ray-check clean

demo: .venv/.base
	$(BIN)/elastic-export demo -o demo --overwrite

# Every packaged sample in every runtime of this machine, then ours in each precision beside the original's fastest ways to run, at a small,
# a middling and a large size; and the tables of docs/performance.md from both. Nothing else should run meanwhile. The second part, `make goals`,
# takes an hour, most of it torch's compiler, and 20 GB of memory.
# Those first that take most memory while they open, when nothing else is open yet.
PEERS := torch-openvino-bf16,torch-openvino,torch-int8,torch-bf16,torch-compile,openvino-bf16,openvino,onnxruntime
B := build/bench
G := build/goals
bench: .venv/.base
	$(INSTALL) --editable '.[torch,ort,openvino,report,peers]'
	for card in elastic_export/pretrained/*.json; do name=$$(basename $$card .json) && \
		$(BIN)/elastic-export onnx $$name -o $(B)/$$name --overwrite || exit 1; done
	$(BIN)/elastic-export bench $$(ls -d $(B)/*/) --quality --overwrite --json build/bench.json --html build/bench.html
	$(BIN)/python samples/speed.py build/bench.json docs/performance.md --plot docs/speed.svg
	$(MAKE) goals

goals: .venv/.base
	$(INSTALL) --editable '.[torch,ort,openvino,report,peers]'
	for precision in fp32 int8 bf16; do \
		$(BIN)/elastic-export onnx elit-mnist -o $(G)/elit-mnist --precision $$precision --overwrite && \
		$(BIN)/elastic-export onnx elit-sit --config samples/elit-b-3-6-3.json --random-weights -o $(G)/elit-b --precision $$precision \
			--verify ends --overwrite && \
		$(BIN)/elastic-export onnx elit-sit-xl-256 --random-weights -o $(G)/elit-xl --precision $$precision --verify ends --overwrite \
		|| exit 1; done
	rm -f $(G)/*.json
	for batch in 1 2; do for name in elit-mnist elit-b elit-xl; do \
		$(BIN)/elastic-export bench $(G)/$$name --runtimes $(PEERS) --budgets 32,64,128,256 --batch $$batch --steps 1 --overwrite \
			--json $(G)/$$name-$$batch.json || test -f $(G)/$$name-$$batch.json || exit 1; done; done  # a peer may fail: the page says how
	$(BIN)/python samples/goals.py $(G)/*.json --bundles $(G) --page docs/performance.md

# A server under load, as docs/serve.md has it: five minutes, in which nothing else should run.
serve-load: .venv/.base
	$(INSTALL) --editable '.[torch,ort,serve,report]'
	$(BIN)/elastic-export onnx elit-mnist -o build/digits --overwrite
	$(BIN)/elastic-export bench build/digits --serve --json build/load.json --html build/load.html --overwrite
	$(BIN)/python samples/serve_load.py build/load.json docs/serve.md --plot docs/serve-load.svg

test: lint check wheel

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

check: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --durations 30 --durations-min 10 -m "not wide"

# The other families, forms and precisions of what `check` covers with one: before a release, and after a change to what they share.
wide: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --durations 30 --durations-min 10 -m wide

# The wheel by itself, away from the sources: torch-free tests and --help in an empty environment of the oldest and the newest Python that
# it is for (INTERPRETERS="3.10 3.11 3.12 3.13": of each that is here). Devices have others than the exporter asks for: JetPack 6 has 3.10.
INTERPRETERS ?= 3.10 3.13
wheel: export PYENV_VERSION = $(shell pyenv versions --bare 2>/dev/null | paste -sd:)
wheel: .venv/.dev
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m build --wheel --outdir build/wheel
	cp -r tests pyproject.toml build/wheel/
	for version in $(INTERPRETERS); do \
		if ! python$$version -c '' 2>/dev/null; then echo "python$$version is not here: the wheel is not tried with it"; continue; fi; \
		echo "the wheel with Python $$version"; \
		$(MAKE) --no-print-directory wheel-with VERSION=$$version || exit 1; \
	done

wheel-with:
	python$(VERSION) -m venv build/wheel/$(VERSION)
	build/wheel/$(VERSION)/bin/pip install --quiet --disable-pip-version-check \
		$(if $(filter 3.10,$(VERSION)),,--constraint constraints.txt) \
		"$$(ls build/wheel/*.whl)" onnxruntime pytest pytest-xdist hypothesis
	cd build/wheel && $(VERSION)/bin/elastic-export --help >/dev/null && \
		OMP_NUM_THREADS=1 $(VERSION)/bin/pytest --quiet -n 2 --dist loadfile tests/runtime tests/house

# On a machine with an NVIDIA GPU (BUILDER=trt on a Jetson or a data-centre GPU): the sample's engine against ONNX Runtime.
BUILDER ?= rtx
gpu-check: .venv/.base
	$(INSTALL) --editable '.[torch,ort,$(BUILDER)]'
	$(BIN)/elastic-export trt -o build/gpu-check --builder $(if $(filter trt,$(BUILDER)),tensorrt,rtx) --overwrite
	$(BIN)/python samples/gpu_check.py build/gpu-check

# The same through ONNX Runtime's CUDA provider, in an environment of its own: its package takes the place of the one for the CPU.
ort-gpu-check: .venv/.base
	$(BIN)/elastic-export onnx -o build/ort-gpu-check/bundle --overwrite
	$(PYTHON) -m venv build/ort-gpu-check/venv
	build/ort-gpu-check/venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt '.[ort-gpu]'
	build/ort-gpu-check/venv/bin/elastic-export bench build/ort-gpu-check/bundle --runtimes onnxruntime-cuda,onnxruntime

# What a GPU machine without network needs, in parts: see samples/checks/gpu/README.md.
gpu-kit: .venv/.base
	$(INSTALL) --editable '.[torch,ort]'
	PYTHON=$(BIN)/python bash samples/checks/gpu/pack.sh

# Which wheels the runtime would be installed from on devices that are not here, as the package index has them.
platforms: .venv/.base
	$(INSTALL) packaging
	$(BIN)/python samples/platforms.py

# The wheel under emulation of Linux aarch64: a digit from a bundle made here, and verify.
aarch64: .venv/.dev
	PYTHON=$(BIN)/python bash samples/checks/aarch64/run.sh

# On a Mac: the sample's package on each compute unit, against the recorded outputs of the original.
mac-check: .venv/.base
	$(INSTALL) --editable '.[torch,ort,coreml]'
	$(BIN)/elastic-export coreml -o build/mac-check --overwrite
	$(BIN)/python samples/mac_check.py build/mac-check

# Long runs, whose figures are in docs/reliability.md; CI runs a short form of each.
SECONDS ?= 3600
fuzz: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/stress/fuzz.py --seconds $(SECONDS)
soak: .venv/.dev
	$(BIN)/python tests/stress/soak.py --pictures 10000
	$(BIN)/python tests/stress/soak_serve.py --pictures 10000
crash: .venv/.dev
	$(BIN)/python tests/stress/crash.py --kills 200

# The server on a real Ray cluster of this machine: replicas that share the work, and one that is killed.
ray-check: .venv/.dev
	$(INSTALL) --editable '.[ray]'
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/serve/test_ray.py

# Every family on every target: how far each artifact is from its original (half an hour).
matrix: .venv/.dev
	$(BIN)/python tests/stress/matrix.py --rows build/matrix.json

clean:
	rm -rf .venv build dist demo

.venv/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) --editable '.[torch,ort,flux]'
	touch $@

.venv/.dev: .venv/.base
	$(INSTALL) --editable '.[dev]'
	touch $@
