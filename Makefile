# Every target works on a fresh Linux machine with Python 3.11 and pip: it installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: install system run test check fix bench load lock clean
install: $(STAMP)

$(STAMP): requirements/dev.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(STAMP)

system:
	@sh .ci/packages

run: install system
	$(BIN)/dayfly up --data .dayfly --deploy examples

# Tests that mostly wait (for brokers, leases, clocks) run beside the others.
test: install
	@sh .ci/packages test
	@$(BIN)/python -m pytest -p no:cacheprovider -m waits >.venv/waits.log 2>&1 & waits=$$!; \
	$(BIN)/python -m pytest -m 'not waits'; rest=$$?; \
	wait $$waits; waits=$$?; cat .venv/waits.log; exit $$((rest || waits))

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install .venv/bench/installed
	@sh .ci/packages bench
	for file in cold_start warm burst refill neighbour initialize density many scale_to_zero soak events triggers jobs workflows run_kills handover clone_build gangs; do $(BIN)/python -m bench.$$file || exit 1; done

.venv/bench/installed: requirements/bench.txt
	test -x .venv/bench/bin/python || $(PYTHON) -m venv .venv/bench
	.venv/bench/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bench.txt
	touch $@

load: install
	$(BIN)/locust -f bench/locustfile.py --headless --users 20 --spawn-rate 20 --run-time 30s

lock: install
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-annotate --no-header --python-version 3.11 pyproject.toml -o requirements/run.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-annotate --no-header --python-version 3.11 --group dev --extra brokers pyproject.toml -o requirements/dev.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-annotate --no-header --python-version 3.11 --group bench -o requirements/bench.txt

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
