# The environment is made once, and again when requirements.txt changes.

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/requirements.installed

.PHONY: demo test clean

demo: $(READY)
	$(PYTHON) -m cnn_cases.studies.depth_curves \
		--config=configs/studies/depth_digits.py --workdir=runs/depth_digits --jobs=2

test: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PYTHON) -m pytest --numprocesses=2

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache

$(READY): requirements.txt
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed; python3 is $$(python3 --version)"; exit 1; }
	@python3 -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
