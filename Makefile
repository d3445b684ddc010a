# Needs Python 3.11 or newer and make, nothing else: everything is installed into .venv.
#   make book        execute the notebooks and build the site into _build/html
#   make test        every check: style, types, unit tests, the book and its notebooks, site, browser
#   make test-fast   the same without the browser
#   make serve       show the site at http://localhost:$(PORT)
#   make page PAGE=02-coefficients   one page alone, quickly, into _build/page/<name>
#   make clean       remove what was built (.venv stays)
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
PORT ?= 8000
PY := .venv/bin/python

.PHONY: book test test-fast serve page clean venv
.DEFAULT_GOAL := book

book: venv
	@$(PY) tools/build.py book

page: venv
	@$(PY) tools/build.py page "$(PAGE)"

test: venv
	@$(PY) tools/check.py

test-fast: venv
	@$(PY) tools/check.py --fast

serve: book
	@echo "Serving _build/html at http://localhost:$(PORT), until Ctrl-C"
	@$(PY) -m http.server --directory _build/html $(PORT)

clean:
	@rm -rf _build .mypy_cache .pytest_cache .ruff_cache *.egg-info book/equation-map.md
	@find book diffedu tests tools -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	@echo "Removed _build and the caches. .venv stays; remove it by hand to start afresh."

venv:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found. Name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) tools/environment.py
