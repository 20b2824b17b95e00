# make demo: train on real digits, draw new ones.   make test: prove every lesson.   make lab: open them.
PYTHON ?= python3
BIN := .venv/bin
# as many notebooks at a time as there are cores (four at most), one thread each: two threads each would fight over them
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(max(1, min(4, os.cpu_count() or 1)))')

.PHONY: demo test lab .venv clean
demo: .venv
	$(BIN)/miniai demo --out demo

test: .venv
	$(BIN)/ruff check --quiet . miniai/weights/*.py
	cd nbs && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 ../$(BIN)/nbdev_test --n_workers $(WORKERS) --timing
	PYTHONHASHSEED=0 $(BIN)/python -m pytest --quiet --numprocesses $(WORKERS) tests

lab: .venv
	$(BIN)/jupyter lab nbs/index.ipynb

# rebuilt only when what it is made from has changed; a broken build leaves no stamp, so the next run mends it
.venv: .venv/.built
.venv/.built: settings.ini setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv demo build dist *.egg-info
