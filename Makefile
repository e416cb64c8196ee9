# make demo: teach concepts, stack them, write demo_output/.     make test: everything.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
# large pages for what torch allocates: training on a processor takes much less time, and comes out the same to the bit.  Linux alone
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: demo test soak docs words workflows

demo: $(VENV)/.ready
	$(RUN) -m seqlora_core demo --output demo_output

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -rs -n 2 --no-loadscope-reorder tests

# the reliability scripts in full, an hour or more; `make test` runs them shortened
soak: $(VENV)/.ready
	$(RUN) -m tests.reliability.kill --count 300 --record
	$(RUN) -m tests.reliability.fuzz --count 20000 --record
	$(RUN) -m tests.reliability.header --count 200000 --record
	$(RUN) -m tests.reliability.server --count 500 --record
	$(RUN) docs/build.py

# figures of the last demo into the docs
docs: $(VENV)/.ready
	cp demo_output/table.json docs/results/demo.json
	cp demo_output/contact_sheet.png demo_output/pairs.png docs/images/
	$(RUN) docs/build.py

# translations and the help pages' tables, from the nodes' own words
words: $(VENV)/.ready
	$(RUN) -m locales.build

workflows: $(VENV)/.ready
	$(RUN) -m workflows.build

$(VENV)/.ready: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
