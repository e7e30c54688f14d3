# Fine-tuning and inference on a single accelerator, step by step. Type `make` for the targets.
ifneq (4.2,$(firstword $(sort $(MAKE_VERSION) 4.2)))
$(error GNU Make $(MAKE_VERSION) is too old, 4.2 or newer is needed: apt install make, or brew install make and type gmake)
endif

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help

# Variables ------------------------------------------------------------------------------------------------------------
# Each comes from the command line, else the environment, else .env, else the default given here. Values are taken as
# they stand: nothing in them is expanded by Make.
hash := \#
dotenv = $(if $(wildcard .env),$(shell sed -n -E "s/^[[:space:]]*(export[[:space:]]+)?$(1)[[:space:]]*=[[:space:]]*//p" .env \
	| tail -n 1 | sed -E -e "/^['\"]/!s/(^|[[:space:]]+)$(hash).*//" -e 's/[[:space:]]+$$//' -e "s/^'([^']*)'.*/\1/" -e 's/^"([^"]*)".*/\1/'))
define setting
ifneq ($$(origin $(1)),command line)
override $(1) := $$(or $$(value $(1)),$$(call dotenv,$(1)),$(2))
else
override $(1) := $$(value $(1))
endif
endef
$(eval $(call setting,OUT,outputs))
$(eval $(call setting,BASE_MODEL,embedded))
$(eval $(call setting,DATASET,data))
$(eval $(call setting,VALIDATION_ROWS,0))
$(eval $(call setting,RECIPE,$(if $(filter embedded,$(BASE_MODEL)),embedded)))
$(eval $(call setting,ARGS,))
$(eval $(call setting,PROMPT,What is a large language model?))
$(eval $(call setting,FROM,adapter))
$(eval $(call setting,BACKEND,auto))
$(eval $(call setting,PYTHON,python3))
$(eval $(call setting,VENV,.venv))
ifneq ($(words $(OUT)) $(words $(VENV)),1 1)
$(error OUT=$(OUT) and VENV=$(VENV) must each be a path without spaces)
endif
export BASE_MODEL DATASET PROMPT VALIDATION_ROWS
export HF_HUB_DISABLE_TELEMETRY ?= 1

PY := $(VENV)/bin/python
# A recipe by its name in env/recipes/, or a .yaml file; none: the scripts' own defaults, which are the tutorial's.
recipe_file := $(if $(RECIPE),$(if $(filter %.yaml,$(RECIPE)),$(RECIPE),env/recipes/$(RECIPE).yaml))
ifneq ($(recipe_file),$(wildcard $(recipe_file)))
$(error there is no $(recipe_file). Type RECIPE= with one of: $(patsubst env/recipes/%.yaml,%,$(wildcard env/recipes/*.yaml)), a .yaml file, or nothing)
endif
recipe := $(if $(recipe_file),--config $(recipe_file))
ready := $(VENV)/installed $(OUT)/check/report.json

# Steps that only read results take those that are there, however they were made, and make what is missing.
from_step := $(if $(filter adapter,$(FROM)),lora,base-model)
model_adapter := lora/adapter
model_base := base-model
ifeq ($(filter infer,$(MAKECMDGOALS))$(model_$(FROM)),infer)
$(error FROM=$(FROM) is unknown. Type: make infer FROM=adapter, or FROM=base)
endif
wanted = $(if $(and $(wildcard $(OUT)/$(1)/run.json),$(if $(filter train-% download,$(MAKECMDGOALS)),,yes)),,$(OUT)/$(1)/run.json)

# Targets --------------------------------------------------------------------------------------------------------------
.PHONY: help setup check-gpu download audit train-lora infer evaluate test bench lint clean distclean FORCE

help: ## this list
	@echo "make TARGET [VARIABLE=value ...]"
	sed -n -E 's/^([a-z-]+):.*## (.*)/\1:\2/p' Makefile | awk -F: '{ printf "  %-12s %s\n", $$1, $$2 }'
	echo "Variables, on the command line, in the environment or in .env:"
	echo "  OUT=$(OUT) BASE_MODEL=$(BASE_MODEL) DATASET=$(DATASET) VALIDATION_ROWS=$(VALIDATION_ROWS) RECIPE=$(RECIPE)"
	echo "  BACKEND=$(BACKEND) PYTHON=$(PYTHON) VENV=$(VENV) FROM=$(FROM) PROMPT=\"...\" ARGS=\"more options for the step\""

setup: $(VENV)/installed ## make the Python environment (BACKEND=auto|cpu|cuda|rocm)
	@echo "$(VENV) is up to date"

check-gpu: | $(VENV)/installed ## check the accelerators and the packages
	$(PY) scripts/00_check_gpu.py --output $(OUT)/check/report.json $(ARGS) ||
		{ mv $(OUT)/check/report.json $(OUT)/check/not-ready.json; exit 1; }

download: $(OUT)/base-model/run.json $(OUT)/dataset/run.json ## fetch base model and data set
	@echo "$(OUT)/base-model and $(OUT)/dataset are up to date"

audit: $(OUT)/dataset/audit.json ## show which tokens will be learned, and stop where the data is wrong
	@echo "$(OUT)/dataset/audit.json is up to date"

train-lora: $(OUT)/lora/run.json $(OUT)/lora/loss.png ## fine-tune with LoRA and save the adapter
	@echo "$(OUT)/lora is up to date"

infer: $(call wanted,$(from_step)) | $(ready) ## answer PROMPT="..." with FROM=adapter|base
	$(PY) scripts/05_generate.py --model_name_or_path $(OUT)/$(model_$(FROM)) \
		$(if $(filter adapter,$(FROM)),--base_model $(OUT)/base-model) $(if $(findstring --prompts_file,$(ARGS)),,--prompt="$$PROMPT") $(ARGS)

evaluate: $(OUT)/report/evaluation.json ## held-out loss and answers, before and after training
	@cat $(OUT)/report/evaluation.md

test: $(VENV)/tested ## run the tests
	@$(PY) -m pytest $(ARGS)

bench: $(call wanted,base-model) $(call wanted,dataset) | $(ready) ## compare the training speed with a bare PyTorch loop
	$(PY) bench/train_speed.py --model $(OUT)/base-model --data $(OUT)/dataset $(if $(recipe_file),--recipe $(recipe_file)) $(ARGS)

lint: $(VENV)/tested ## check the style of the code
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

clean: ## remove what the steps left in OUT
	@rm -rf $(addprefix $(OUT)/,.args check base-model base-model.tmp dataset dataset.tmp lora report)

distclean: clean ## remove the Python environment too
	@if [ -e $(VENV)/backend ]; then rm -rf $(VENV); fi
	rm -f $(VENV).settings

# Arguments ------------------------------------------------------------------------------------------------------------
# What a step was run with is kept in a file that is rewritten only when it differs, so that the step runs again just
# then. ARGS belongs to the step that is asked for; a step that is made on the way keeps the ARGS it was made with.
args = $(if $(filter $(1),$(MAKECMDGOALS)),$(ARGS),$(file <$(OUT)/.args/$(1)))
$(VENV).settings: export TEXT = $(PYTHON) $(BACKEND)
$(OUT)/.args/base-model: export TEXT = $(BASE_MODEL)
$(OUT)/.args/dataset: export TEXT = $(DATASET) $(VALIDATION_ROWS)
$(OUT)/.args/recipe: export TEXT = $(recipe_file)
$(OUT)/.args/%: export TEXT = $(call args,$*)
keep_text = @[ -e $@ ] && [ "$$(<$@)" = "$$TEXT" ] || { mkdir -p $(@D) && printf '%s\n' "$$TEXT" > $@; }
$(VENV).settings: FORCE
	$(keep_text)
$(OUT)/.args/%: FORCE
	$(keep_text)

# Environment ----------------------------------------------------------------------------------------------------------
$(VENV)/installed: env/requirements.txt env/requirements-torch.txt $(VENV).settings
	@python="$(PYTHON)"
	command -v "$$python" > /dev/null || {
		echo "error: no $$python. Type: apt install python3 python3-venv, or name a Python: make PYTHON=/path/to/python3" >&2; exit 1; }
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
		echo "error: $$("$$python" --version) is too old, 3.10 or newer is needed. Name one: make PYTHON=python3.12" >&2; exit 1; }
	"$$python" -c 'import venv, ensurepip' 2> /dev/null || {
		echo "error: $$python has no venv module. Type: apt install python3-venv" >&2; exit 1; }
	if [ -e $(VENV) ] && [ ! -e $(VENV)/backend ]; then
		echo "error: VENV=$(VENV) is there and was not made by this Makefile. Remove it, or name another: make VENV=.venv-2" >&2; exit 1; fi
	backend="$(BACKEND)"
	if [ "$$backend" = auto ]; then
		if [ -e /dev/kfd ] && command -v amd-smi rocminfo > /dev/null; then backend=rocm
		elif nvidia-smi -L > /dev/null 2>&1; then backend=cuda
		else backend=cpu; fi
		echo "Found: $$backend (another: make setup BACKEND=cpu|cuda|rocm)"
	fi
	more=""
	case "$$backend" in
		cpu) index="--extra-index-url https://download.pytorch.org/whl/cpu" ;;
		cuda) index="" ;;
		rocm) index="--index-url https://download.pytorch.org/whl/rocm7.2" more="--extra-$${index#--}" ;;
		*) echo "error: BACKEND=$$backend is unknown. Type: make setup BACKEND=auto, cpu, cuda or rocm" >&2; exit 1 ;;
	esac
	set -x
	rm -rf $(VENV)
	mkdir -p $(VENV)
	echo "$$backend" > $(VENV)/backend # first, so that an interrupted setup is known as ours
	"$$python" -m venv $(VENV)
	$(PY) -m pip install --no-deps -r env/requirements-torch.txt $$index
	$(PY) -m pip install -r env/requirements.txt $$more
	{ set +x; } 2> /dev/null
	touch $@

$(VENV)/tested: env/requirements-test.txt $(VENV)/installed
	$(PY) -m pip install -r env/requirements-test.txt
	touch $@

$(OUT)/check/report.json: scripts/00_check_gpu.py | $(VENV)/installed
	$(PY) scripts/00_check_gpu.py --output $@ $$([ "$$(<$(VENV)/backend)" = cpu ] || echo --require gpu)

# Steps ----------------------------------------------------------------------------------------------------------------
$(OUT)/base-model/run.json: scripts/01_download.py $(wildcard $(addprefix $(BASE_MODEL)/,*.safetensors *.json)) \
		$(OUT)/.args/base-model $(OUT)/.args/download | $(ready)
	$(PY) scripts/01_download.py --only model --model_name_or_path="$$BASE_MODEL" --output_dir $(OUT) $(call args,download)

$(OUT)/dataset/run.json: scripts/01_download.py $(wildcard $(DATASET) $(addprefix $(DATASET)/*.,jsonl json csv parquet)) \
		$(OUT)/.args/dataset $(OUT)/.args/download | $(ready)
	$(PY) scripts/01_download.py --only dataset --dataset_name="$$DATASET" --validation_rows="$$VALIDATION_ROWS" \
		--output_dir $(OUT) $(call args,download)

# The audit takes the options of the training too: they may change what is learned.
$(OUT)/dataset/audit.json: scripts/audit_tokens.py $(OUT)/dataset/run.json $(OUT)/base-model/run.json $(recipe_file) \
		$(addprefix $(OUT)/.args/,recipe audit train-lora)
	$(PY) scripts/audit_tokens.py --model_name_or_path $(OUT)/base-model --dataset_name $(OUT)/dataset $(recipe) \
		$(call args,train-lora) $(call args,audit) --output $@

$(OUT)/lora/run.json: scripts/02_train_lora.py $(OUT)/dataset/audit.json $(recipe_file) $(OUT)/.args/recipe $(OUT)/.args/train-lora
	$(PY) scripts/02_train_lora.py --model_name_or_path $(OUT)/base-model --dataset_name $(OUT)/dataset $(recipe) \
		--output_dir $(OUT)/lora $(call args,train-lora)

$(OUT)/lora/loss.png: scripts/plot_loss.py $(OUT)/lora/run.json
	$(PY) scripts/plot_loss.py $(OUT)/lora/run.json --output $@

$(OUT)/report/evaluation.json: scripts/evaluate.py $(call wanted,lora) $(call wanted,dataset) $(OUT)/.args/evaluate \
		$(wildcard $(addprefix $(OUT)/,base-model/config.json lora/adapter/adapter_model.safetensors dataset/validation.jsonl)) | $(ready)
	$(PY) scripts/evaluate.py --base_model $(OUT)/base-model --models $(OUT)/lora/adapter --dataset_name $(OUT)/dataset \
		--output_dir $(OUT)/report $(call args,evaluate)
