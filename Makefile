# Every target works on a fresh Linux machine with Python 3.11 and pip: it installs what it needs.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
GROUPS := kills sources faults others acceptance contracts several shells

.PHONY: install system run test $(GROUPS:%=test-%) cluster test-cluster test-cluster-pods test-cluster-others test-kubernetes kubernetes-demo check fix crds bench load lock clean
install: $(STAMP)

$(STAMP): requirements/dev.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(STAMP)

system:
	@sh .ci/packages

run: install system
	$(BIN)/dayfly up --data .dayfly --deploy examples

# Side by side, since most of what they spend is waiting, the longest first; each is printed when it ends.
SIDE_BY_SIDE := --no-print-directory --jobs=5 --keep-going --output-sync=target
SEVERAL := $(addprefix tests/faults/test_,brokers.py cluster.py several_servers.py shared.py)
ELSEWHERE := tests/acceptance tests/contract tests/faults tests/integration
test: install
	@sh .ci/packages test
	@echo "the tests run in groups side by side: $(GROUPS); each is printed when it ends"
	@$(MAKE) $(SIDE_BY_SIDE) $(GROUPS:%=test-%)

PYTEST := $(BIN)/python -m pytest -p no:cacheprovider
test-sources: ; $(PYTEST) -m 'waits and not cluster' tests/contract
test-several: ; $(PYTEST) -m 'waits and not cluster' $(SEVERAL)
test-kills: ; $(PYTEST) -m 'waits and not cluster' tests/faults $(SEVERAL:%=--ignore=%)
test-shells: ; $(PYTEST) -m 'waits and not cluster' --ignore=tests/contract --ignore=tests/faults
test-acceptance: ; $(PYTEST) -m 'not waits and not cluster' tests/acceptance tests/integration
test-faults: ; $(PYTEST) -m 'not waits and not cluster' tests/faults
test-contracts: ; $(PYTEST) -m 'not waits and not cluster' tests/contract
test-others: ; $(PYTEST) -m 'not waits and not cluster' $(ELSEWHERE:%=--ignore=%)

# The chart, its images and all that has to do with a cluster; on the one that KUBECONFIG names, else on a node
# of its own if there is a build of Kubernetes: see tests/kubernetes/node.py.
test-kubernetes: install cluster
	@sh .ci/packages test
	$(CLUSTER) sh -c "$(PYTEST) tests/kubernetes && $(PYTEST) -m cluster tests/contract"

# Of all tests only those that need a cluster; without the slowest, which take minutes.
test-cluster: install cluster
	@sh .ci/packages test
	$(CLUSTER) $(MAKE) $(SIDE_BY_SIDE) test-cluster-pods test-cluster-others

PODS := tests/contract tests/kubernetes/test_containers.py
SLOW := $(addprefix tests/kubernetes/test_,examples.py steps.py)
test-cluster-pods: ; $(PYTEST) -m cluster $(PODS)
test-cluster-others: ; $(PYTEST) -m cluster $(PODS:%=--ignore=%) $(SLOW:%=--ignore=%)

CLUSTER := $(BIN)/python -m tests.kubernetes.node run
cluster: install
	@if $(BIN)/python -m tests.kubernetes.node which >/dev/null && [ -z "$$KUBECONFIG" ]; then sh .ci/packages node; fi
	@$(BIN)/python -m tests.kubernetes.tools

# Dayfly on the cluster that KUBECONFIG names, from nothing to an answered request.
kubernetes-demo: install
	@$(BIN)/python -m tests.kubernetes.release

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

crds: install
	$(BIN)/python -m dayfly_pool.cluster.crds charts/dayfly/crds

bench: install .venv/bench/installed
	@sh .ci/packages bench
	for file in cold_start warm burst refill neighbour initialize density many scale_to_zero soak events triggers jobs workflows run_kills handover clone_build gangs shards scale wire; do $(BIN)/python -m bench.$$file || exit 1; done

.venv/bench/installed: requirements/bench.txt
	test -x .venv/bench/bin/python || $(PYTHON) -m venv .venv/bench
	.venv/bench/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bench.txt
	touch $@

load: install
	$(BIN)/locust -f bench/locustfile.py --headless --users 20 --spawn-rate 20 --run-time 30s

lock: install
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-annotate --no-header --python-version 3.11 pyproject.toml -o requirements/run.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-annotate --no-header --python-version 3.11 --group dev --extra brokers --extra kubernetes pyproject.toml -o requirements/dev.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-annotate --no-header --python-version 3.11 --extra brokers --extra kubernetes -c requirements/dev.txt pyproject.toml -o requirements/server.txt
	echo "hatchling>=1.27" | $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-annotate --no-header --python-version 3.11 -c requirements/dev.txt - -o requirements/build.txt
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --no-annotate --no-header --python-version 3.11 --group bench -o requirements/bench.txt

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
