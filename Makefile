# Environments are made once, and again when their requirements change.

PYTHON := python3
VENV := .venv
READY := $(VENV)/requirements.installed
# TFDS needs TensorFlow (over a gigabyte) to prepare its stock sets, and nothing else here does.
DATA_VENV := .venv-data
DATA_READY := $(DATA_VENV)/requirements.installed

.PHONY: demo test data named clean

demo: $(READY)
	$(VENV)/bin/python -m cnn_cases.studies.depth_curves \
		--config=configs/studies/depth_digits.py --workdir=runs/depth_digits --jobs=2

test: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest --numprocesses=2 --dist=worksteal

# make data DATASET="mnist cifar10", with DATA_DIR=... for another place than TFDS's own
data: named $(DATA_READY)
	$(DATA_VENV)/bin/python -m cnn_cases.data.prepare $(DATASET) $(if $(DATA_DIR),--data_dir="$(DATA_DIR)")

named:
	@test -n "$(DATASET)" || { echo 'which data set? make data DATASET=cifar10'; exit 2; }

clean:
	rm -rf $(VENV) $(DATA_VENV) .pytest_cache .ruff_cache

$(READY): requirements.txt
	$(call make_environment,$(VENV),$<,14)
	touch $@

$(DATA_READY): requirements-data.txt requirements.txt
	$(call make_environment,$(DATA_VENV),$<,13)
	touch $@

# The directory, the requirements, and the last Python (3.x) for which all of them exist.
define make_environment
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, $(3)))' \
		|| { echo "Python 3.11 to 3.$(3) is needed, as in PYTHON=python3.13; $(PYTHON) is $$($(PYTHON) --version)"; exit 1; }
	@$(PYTHON) -m venv $(1) \
		|| { rm -rf $(1); echo "On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -r $(2)
endef
