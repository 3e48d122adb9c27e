# Every command a developer needs. `make help` lists them.
.DEFAULT_GOAL := help
PY := .venv/bin/python
PROTOS := $(sort $(wildcard protos/agentiad/v1/*.proto))

protos: ## Generate the Python contracts from protos/
	@rm -rf protos/python && mkdir -p protos/python
	@$(PY) -m grpc_tools.protoc -Iprotos --python_out=protos/python --grpc_python_out=protos/python \
	  --plugin=protoc-gen-mypy=.venv/bin/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=.venv/bin/protoc-gen-mypy_grpc \
	  --mypy_out=quiet:protos/python --mypy_grpc_out=quiet:protos/python $(PROTOS)
	@touch protos/python/agentiad/__init__.py protos/python/agentiad/v1/__init__.py protos/python/agentiad/py.typed
.PHONY: protos
