# make demo: teach concepts, stack them, write demo_output/.     make test: everything.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test workflows

demo: $(VENV)/.ready
	$(RUN) -m seqlora_core demo --output demo_output

test: $(VENV)/.ready
	$(RUN) -m pytest -q -rs tests

workflows: $(VENV)/.ready
	$(RUN) workflows/build.py

$(VENV)/.ready: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
