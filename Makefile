# Two commands make everything: `make demo` and `make test`. All of it ends up in .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo bench test lint check wheel gpu-check ort-gpu-check mac-check fuzz soak crash clean

demo: .venv/.base
	$(BIN)/elastic-export demo -o demo

# Every packaged sample in every runtime of this machine, and the figures of docs/performance.md from it. Nothing else should run meanwhile.
bench: .venv/.base
	$(INSTALL) --editable '.[torch,ort,openvino,report]'
	for card in elastic_export/pretrained/*.json; do name=$$(basename $$card .json) && \
		$(BIN)/elastic-export onnx $$name -o build/bench/$$name --overwrite || exit 1; done
	$(BIN)/elastic-export bench $$(ls -d build/bench/*/) --quality --overwrite --json build/bench.json --html build/bench.html
	$(BIN)/python samples/speed.py build/bench.json docs/performance.md --plot docs/speed.svg

test: lint check wheel

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

check: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# The wheel by itself, away from the sources: torch-free tests and --help in an empty environment.
wheel: .venv/.dev
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m build --wheel --outdir build/wheel
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		"$$(ls build/wheel/*.whl)" onnxruntime pytest hypothesis
	cp -r tests pyproject.toml build/wheel/
	cd build/wheel && venv/bin/elastic-export --help >/dev/null && venv/bin/pytest tests/runtime tests/house

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
crash: .venv/.dev
	$(BIN)/python tests/stress/crash.py --kills 200

clean:
	rm -rf .venv build dist demo

.venv/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) --editable '.[torch,ort,flux]'
	touch $@

.venv/.dev: .venv/.base
	$(INSTALL) --editable '.[dev]'
	touch $@
