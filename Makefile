.PHONY: demo check test faults fmt bench verify mutants templates

demo: ; bash scripts/quickstart.sh
test: ; bash scripts/test.sh
faults: ; bash scripts/test.sh -m "slow or not slow"
check: ; .venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy
fmt: ; .venv/bin/ruff check --fix . && .venv/bin/ruff format .
bench: ; .venv/bin/python -m scripts.bench
verify: ; .venv/bin/python -m scripts.verify
mutants: ; .venv/bin/python -m tests.faults.mutants

# templates and vocabularies of real models, from the source package of llama-cpp-python (77 MB, once)
LLAMA := .cache/llama-cpp-python-0.3.36
templates: $(LLAMA)/templates
	.venv/bin/python -m scripts.templates --templates $(LLAMA)
$(LLAMA)/templates:
	mkdir -p $(LLAMA)
	.venv/bin/pip download -q --no-deps --no-binary :all: -d $(LLAMA) llama-cpp-python==0.3.36
	tar -xzf $(LLAMA)/llama_cpp_python-0.3.36.tar.gz -C $(LLAMA) --strip-components=4 --wildcards '*/llama.cpp/models/ggml-vocab-*.gguf' '*/llama.cpp/models/templates/*.jinja'
