.PHONY: demo check test faults fmt bench verify mutants

demo: ; bash scripts/quickstart.sh
test: ; bash scripts/test.sh
faults: ; bash scripts/test.sh -m "slow or not slow"
check: ; .venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy
fmt: ; .venv/bin/ruff check --fix . && .venv/bin/ruff format .
bench: ; .venv/bin/python -m scripts.bench
verify: ; .venv/bin/python -m scripts.verify
mutants: ; .venv/bin/python -m tests.faults.mutants
