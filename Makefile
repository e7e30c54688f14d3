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
dotenv = $(if $(wildcard .env),$(shell sed -n -E "1s/^\xEF\xBB\xBF//; s/^[[:space:]]*(export[[:space:]]+)?$(1)[[:space:]]*=//p" .env \
	| tail -n 1 | sed -E -e "/^[[:space:]]*['\"]/!s/[[:space:]]+$(hash).*//" -e 's/^[[:space:]]+//; s/[[:space:]]+$$//' \
	-e '/^"/ { s/^"(([^"\\]|\\.)*)".*/\1/; s/\\(["\\])/\1/g; b; }' -e "s/^'([^']*)'.*/\1/"))
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
$(eval $(call setting,REPO,))
$(eval $(call setting,RESTART,))
$(eval $(call setting,RUN,))
$(eval $(call setting,VENV,.venv))
# What the environment was made with holds until something else is asked for.
kept = $(patsubst $(1)=%,%,$(filter $(1)=%,$(file <$(VENV).settings)))
$(eval $(call setting,BACKEND,$(or $(call kept,BACKEND),auto)))
$(eval $(call setting,TORCH_INDEX,$(call kept,TORCH_INDEX)))
$(eval $(call setting,TORCH_VERSION,$(call kept,TORCH_VERSION)))
$(eval $(call setting,PYTHON,$(or $(call kept,PYTHON),python3)))
build_settings := COMPUTE_BACKEND BNB_ROCM_ARCH BNB_TAG BNB_SOURCE JOBS FORCE
$(foreach name,$(build_settings),$(eval $(call setting,$(name),)))
# These stand in commands as they are.
special = $(foreach mark,; & | < > ( ) { } [ ] * ? ! ~ ' " ` $$ $(hash) \ : %,$(findstring $(mark),$(1)))
ifneq ($(strip $(call special,$(RECIPE)$(FROM))),)
$(error RECIPE=$(RECIPE) or FROM=$(FROM) has marks that mean something to a shell. Take others)
endif
ifneq ($(strip $(words $(OUT)) $(words $(VENV)) $(call special,$(OUT)$(VENV))),1 1)
$(error OUT=$(OUT) and VENV=$(VENV) must each be a path without spaces and without marks that mean something to a shell)
endif
ifneq ($(findstring hub_token,$(ARGS)),)
$(error ARGS has a token, which would be shown and kept. Leave it out, and put HF_TOKEN=<token> into .env)
endif
export RUN BASE_MODEL DATASET PROMPT VALIDATION_ROWS REPO BACKEND PYTHON VENV TORCH_INDEX TORCH_VERSION $(build_settings)
export HF_HUB_DISABLE_TELEMETRY ?= 1

PY := $(VENV)/bin/python
# A recipe by its name in env/recipes/, or a .yaml file; none: the scripts' own defaults, which are the tutorial's. Where
# there is a MODEL-NAME.yaml for this base model, it is taken for NAME; where there is a NAME-full.yaml beside NAME.yaml,
# it is the one of the training without LoRA. fast: what would be taken without RECIPE, with settings of this machine.
fast := $(filter fast,$(RECIPE))
recipe_name := $(if $(fast),$(filter embedded,$(BASE_MODEL)),$(RECIPE))
recipe_file := $(if $(recipe_name),$(if $(filter %.yaml,$(recipe_name)),$(recipe_name),$(or \
	$(wildcard env/recipes/$(BASE_MODEL)-$(recipe_name).yaml),env/recipes/$(recipe_name).yaml)))
ifneq ($(recipe_file),$(wildcard $(recipe_file)))
$(error there is no $(recipe_file). Type RECIPE= with one of: fast $(patsubst env/recipes/%.yaml,%,$(wildcard env/recipes/*.yaml)), a .yaml file, or nothing)
endif
recipe_full := $(or $(wildcard $(recipe_file:.yaml=-full.yaml)),$(recipe_file))
ifneq ($(and $(recipe_full),$(filter train-full tutorial,$(MAKECMDGOALS)),$(shell grep -E '^load_in_[48]bit: *true' $(recipe_full))),)
$(error $(recipe_full) quantizes the weights, and train-full trains them. Type: make train-lora RECIPE=$(RECIPE)$(if $(filter-out outputs,$(OUT)), OUT=$(OUT)), or take another RECIPE)
endif
ready := $(VENV)/installed $(OUT)/check/report.json

# The step and the folder in OUT that FROM names.
step_adapter := lora
step_base := base-model
step_full := full
step_merged := merged
folder_lora := lora/adapter
folder_base-model := base-model
folder_full := full/model
folder_merged := merged/model
from_step := $(step_$(FROM))
from_folder := $(OUT)/$(folder_$(from_step))

# Steps that only read results take those that are there, however they were made, unless the step that makes them is
# asked for too: a doubled slash is another name for Make, one without a rule. What is missing is made. A merged model is
# brought up to date with the adapter beside it.
asked_base-model := train-lora train-full
asked_dataset := train-lora train-full
asked_lora := train-lora
asked_full := train-full
asked_merged := merge
asked = $(filter download tutorial $(asked_$(1)),$(MAKECMDGOALS))
follows = $(and $(filter merged,$(1)),$(wildcard $(OUT)/lora/run.json))
result = $(or $(if $(call asked,$(1))$(call follows,$(1)),,$(wildcard $(OUT)//$(1)/run.json)),$(OUT)/$(1)/run.json)

asks := $(filter infer chat pipeline push,$(MAKECMDGOALS))
ifneq ($(asks),)
ifeq ($(from_step),)
$(error FROM=$(FROM) is unknown. Type: make $(asks) FROM=adapter, base, full or merged)
endif
ifeq ($(filter push,$(asks))$(from_step),pushbase-model)
$(error FROM=base is not yours to upload. Type: make push FROM=adapter, full or merged REPO=user/name)
endif
ifeq ($(filter push,$(asks))$(REPO),push)
$(error REPO is not given. Type: make push FROM=$(FROM) REPO=user/name)
endif
# The training that takes most is not begun on the way to something else, and nothing on the way to an upload.
ifneq ($(filter full,$(from_step))$(filter push,$(asks)),)
ifeq ($(call asked,$(from_step))$(wildcard $(OUT)/$(from_step)/run.json),)
$(error there is no $(OUT)/$(from_step) yet. Type: make $(asked_$(from_step))$(if $(filter-out outputs,$(OUT)), OUT=$(OUT)))
endif
endif
endif

# Targets --------------------------------------------------------------------------------------------------------------
.PHONY: help setup check-gpu bitsandbytes download audit train-lora train-full reproduce compare merge infer chat pipeline tutorial \
	evaluate verify verify-tutorial push test test-faults bench bench-steps bench-growth lint lock docker-run clean distclean FORCE
# One accelerator, one step at a time, also under make -j.
.NOTPARALLEL:

help: ## this list
	@echo "make TARGET [VARIABLE=value ...]"
	sed -n -E 's/^([a-z-]+):.*## (.*)/\1:\2/p' Makefile | awk -F: '{ printf "  %-15s %s\n", $$1, $$2 }'
	echo "Variables, on the command line, in the environment or in .env:"
	echo "  OUT=$(OUT) BASE_MODEL=$$BASE_MODEL DATASET=$$DATASET VALIDATION_ROWS=$$VALIDATION_ROWS RECIPE=$(RECIPE)"
	echo "  BACKEND=$$BACKEND TORCH_INDEX=$$TORCH_INDEX TORCH_VERSION=$$TORCH_VERSION PYTHON=$$PYTHON VENV=$(VENV)"
	echo "  FROM=$(FROM) REPO=$$REPO PROMPT=\"...\" ARGS=\"more options for the step\""
	echo "  RESTART=1 begins a training anew that was interrupted; RUN=.../run.json is for reproduce"
	echo "  for bitsandbytes: $(build_settings)"

setup: $(VENV)/installed ## make the Python environment (BACKEND=auto|cpu|cuda|rocm|preinstalled)
	@echo "$(VENV) is up to date"

check-gpu: | $(VENV)/installed ## check the accelerators and the packages
	$(call check,$(OUT)/check/report.json) $(if $(filter embedded,$(BASE_MODEL))$(wildcard $(BASE_MODEL)),,--access "$$BASE_MODEL") \
		$(ARGS) || [ $$? = 2 ] || { mv $(OUT)/check/report.json $(OUT)/check/not-ready.json; exit 1; }

bitsandbytes: | $(VENV)/installed ## build bitsandbytes where the wheel does not work, or FORCE=1
	@PYTHON=$(PY) bash env/build_bitsandbytes.sh

download: $(OUT)/base-model/run.json $(OUT)/dataset/run.json ## fetch base model and data set
	@echo "$(OUT)/base-model and $(OUT)/dataset are up to date"

audit: $(OUT)/dataset/audit.json ## show which tokens will be learned, and stop where the data is wrong
	@echo "$(OUT)/dataset/audit.json is up to date"

train-lora: $(addprefix $(OUT)/lora/,run.json loss.png adapter/README.md) ## fine-tune with LoRA and save the adapter
	@echo "$(OUT)/lora is up to date"

train-full: $(addprefix $(OUT)/full/,run.json loss.png model/README.md) ## fine-tune all parameters and save the model
	@echo "$(OUT)/full is up to date"

reproduce: | $(VENV)/installed ## train again from RUN=.../run.json alone, in another OUT, and compare
	@$(PY) scripts/reproduce_run.py "$$RUN" --output_dir $(OUT)
	mapfile -t of < $(OUT)/reproduce.txt
	again() { $(MAKE) --no-print-directory OUT=$(OUT) RECIPE=$(OUT)/reproduce.yaml BASE_MODEL="$${of[1]}" DATASET="$${of[2]}" \
		VALIDATION_ROWS="$${of[3]}" RESTART= "$$@"; }
	again download ARGS="$${of[4]}"
	again "$${of[0]}" ARGS=
	$(PY) scripts/reproduce_run.py "$$RUN" --compare $(OUT)/$${of[5]}/run.json

compare: $(OUT)/report/comparison.json $(OUT)/report/comparison.png ## set the two trainings side by side
	@cat $(OUT)/report/comparison.md

merge: $(OUT)/merged/run.json $(OUT)/merged/model/README.md ## merge the adapter into the base model
	@echo "$(OUT)/merged is up to date"

infer: $(call result,$(from_step)) | $(ready) ## answer PROMPT="..." with FROM=adapter|base|full|merged
	$(call generate,$(FROM)) $(if $(findstring --prompts_file,$(ARGS)),,--prompt="$$PROMPT") $(ARGS)

chat: $(call result,$(from_step)) | $(ready) ## keep a conversation with FROM=adapter|base|full|merged
	@$(call generate,$(FROM)) --chat $(ARGS)

pipeline: $(call result,$(from_step)) | $(ready) ## answer PROMPT="..." through the pipeline of transformers
	$(PY) scripts/06_pipeline_infer.py --model_name_or_path $(from_folder) $(base_$(FROM)) --prompt="$$PROMPT" $(ARGS)

answers := $(patsubst %,$(OUT)/answers/%.jsonl,adapter base full merged pipeline)
tutorial: $(OUT)/check/report.json download audit train-lora train-full compare merge $(answers) ## all of the above, in order
	@echo "The tutorial is done: $(OUT)/report/comparison.md, $(OUT)/answers"

evaluate: $(OUT)/report/evaluation.json ## held-out loss and answers of the base model and of all that was trained
	@cat $(OUT)/report/evaluation.md

verify: | $(VENV)/installed ## compare the loss curves with those on record
	$(PY) scripts/verify_run.py $$(ls $(OUT)/lora/run.json $(OUT)/full/run.json 2> /dev/null) --curves env/curves $(ARGS)

verify-tutorial: $(VENV)/tested ## check the tutorial's own figures, without its model
	@HF_DATASETS_DISABLE_PROGRESS_BARS=1 $(PY) -m pytest tests/test_tutorial_figures.py -v -s -p no:warnings $(ARGS)

push: $(from_folder)/README.md ## upload FROM=adapter|full|merged to REPO=user/name on the Hub
	$(PY) scripts/push_model.py --folder $(from_folder) --repo_id="$$REPO" $(ARGS)

test: $(VENV)/tested ## run the tests
	@$(PY) -m pytest $(ARGS)

test-faults: $(VENV)/tested ## kill, fill the disk, damage files, and see that nothing is lost (long)
	@FAULTS=full $(PY) -m pytest tests/test_faults.py tests/test_bad_input.py tests/test_security.py -v -s -p no:warnings $(ARGS)

bench: $(call result,base-model) $(call result,dataset) | $(ready) ## compare the training speed with what else could be run, of train-full with FROM=full
	$(PY) bench/train_speed.py --model $(OUT)/base-model --data $(OUT)/dataset --output_dir $(OUT)/bench $(if $(filter full,$(FROM)),--full) $(ARGS)

bench-steps: $(call result,base-model) | $(ready) ## measure start-up, generation, merge and conversion
	$(PY) bench/step_speed.py --model $(OUT)/base-model --output_dir $(OUT)/bench $(ARGS)

bench-growth: $(call result,base-model) | $(ready) ## measure how time and memory grow with rows and length
	$(PY) bench/growth.py --model $(OUT)/base-model --output_dir $(OUT)/bench $(ARGS)

lint: $(VENV)/tested ## check the style of the code
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .

lock: ## pin the packages anew for each backend, after a change of env/requirements*.txt
	@env/lock.sh

docker-run: ## print how to build and to run the Docker image for ROCm
	@env/docker_run.sh

clean: ## remove what the steps left in OUT
	@rm -rf $(addprefix $(OUT)/,.args .lock check answers base-model bench dataset full lora merged report reproduce.txt reproduce.yaml) \
		$(OUT)/base-model.* $(OUT)/dataset.*

distclean: clean ## remove the Python environment too
	@if [ -e $(VENV)/backend ]; then rm -rf $(VENV); fi
	rm -f $(addprefix $(VENV).,settings settings.before lock)

# Arguments ------------------------------------------------------------------------------------------------------------
# What a step was run with is kept in a file that is rewritten only when it differs, so that the step runs again just
# then. ARGS belongs to the step that is asked for, of the tutorial to both trainings; a step that is made on the way
# keeps the ARGS it was made with.
args = $(if $(filter $(1) $(if $(filter train-%,$(1)),tutorial),$(MAKECMDGOALS)),$(ARGS),$(file <$(OUT)/.args/$(1)))
$(VENV).settings: export TEXT = $(foreach name,PYTHON BACKEND TORCH_INDEX TORCH_VERSION,$(name)=$($(name)))
$(OUT)/.args/base-model: export TEXT = $(BASE_MODEL)
$(OUT)/.args/dataset: export TEXT = $(DATASET) $(VALIDATION_ROWS)
$(OUT)/.args/recipe: export TEXT = $(fast) $(recipe_file) $(recipe_full)
$(OUT)/.args/prompt: export TEXT = $(PROMPT)
$(OUT)/.args/evaluated: export TEXT = $(evaluated)
$(OUT)/.args/%: export TEXT = $(call args,$*)
keep_text = @[ -e $@ ] && [ "$$(<$@)" = "$$TEXT" ] || { mkdir -p $(@D) && printf '%s\n' "$$TEXT" > $@; } \
	|| { echo "error: nothing can be written to $(@D). Give another folder: OUT=FOLDER" >&2; exit 1; }
$(VENV).settings: FORCE
	@mkdir -p $(@D)
	cp -p $@ $@.before 2> /dev/null || true
	[ -e $@ ] && [ "$$(<$@)" = "$$TEXT" ] && rm -f $@.before || printf '%s\n' "$$TEXT" > $@
$(OUT)/.args/%: FORCE
	$(keep_text)

# Environment ----------------------------------------------------------------------------------------------------------
# make -n calls the script too, which then only prints its commands; so do -t and -q. What a setup was asked for that did
# not succeed is forgotten.
short_flags = $(filter-out --%,$(firstword -$(MAKEFLAGS)))
dry_run = $(if $(findstring n,$(short_flags))$(findstring t,$(short_flags))$(findstring q,$(short_flags)),--dry-run)
$(VENV)/installed: env/setup.sh $(wildcard env/locks/*.txt) $(VENV).settings
	+@env/setup.sh $(dry_run) || { [ ! -e $(VENV).settings.before ] || mv $(VENV).settings.before $(VENV).settings; exit 1; }

$(VENV)/tested: $(VENV)/installed
	$(PY) -m pip install --no-deps -r env/locks/test.txt
	touch $@

# Exit status 2 of the check: ready, with warnings.
check = $(PY) scripts/00_check_gpu.py --output $(1) --require "$$(sed -E 's/cuda|rocm/gpu/' $(VENV)/backend)"
$(OUT)/check/report.json: scripts/00_check_gpu.py $(VENV)/installed
	$(call check,$@) || [ $$? = 2 ]

# Steps ----------------------------------------------------------------------------------------------------------------
$(OUT)/base-model/run.json: scripts/01_download.py $(wildcard $(addprefix $(BASE_MODEL)/,*.safetensors *.json)) \
		$(OUT)/.args/base-model $(OUT)/.args/download | $(ready)
	$(PY) scripts/01_download.py --only model --model_name_or_path="$$BASE_MODEL" --output_dir $(OUT) $(call args,download)

$(OUT)/dataset/run.json: scripts/01_download.py $(wildcard $(DATASET) $(addprefix $(DATASET)/*.,jsonl json csv parquet)) \
		$(OUT)/.args/dataset $(OUT)/.args/download | $(ready)
	$(PY) scripts/01_download.py --only dataset --dataset_name="$$DATASET" --validation_rows="$$VALIDATION_ROWS" \
		--output_dir $(OUT) $(call args,download)

# Before each training an audit with the options of that training: they may change what is learned.
define audit
	$(PY) scripts/audit_tokens.py --model_name_or_path $(OUT)/base-model --dataset_name $(OUT)/dataset $(addprefix --config ,$(2)) \
		$(call args,$(1)) $(call args,audit) --output $@
endef
$(OUT)/dataset/audit.json: scripts/audit_tokens.py $(OUT)/dataset/run.json $(OUT)/base-model/run.json $(recipe_file) \
		$(addprefix $(OUT)/.args/,recipe audit train-lora)
	$(call audit,train-lora,$(recipe_file))
$(OUT)/dataset/audit-full.json: scripts/audit_tokens.py $(OUT)/dataset/run.json $(OUT)/base-model/run.json $(recipe_full) \
		$(addprefix $(OUT)/.args/,recipe audit train-full)
	$(call audit,train-full,$(recipe_full))

# What a training will take is predicted each time it is to begin, and one that does not fit is not begun, unless FORCE=1.
# The recipe fast is written there: settings that take less memory where it does not fit. It stays as it was for a training
# that was interrupted.
config = $(addprefix --config ,$(if $(fast),$(OUT)/check/fast-$(1).yaml,$(2)))
define predict
	$(if $(fast),$(PY) scripts/choose_fast.py --method $(1) $(addprefix --config ,$(2)) --output $(OUT)/check/fast-$(1).yaml \
		$(if $(filter 1,$(RESTART))$(wildcard $(OUT)/$(1)/run.json),,$(if $(wildcard $(OUT)/$(1)/checkpoints/checkpoint-*),--keep)) -- \
		)$(PY) scripts/00_check_gpu.py --model $(OUT)/base-model --method $(1) --audit $< $(if $(filter 1,$(FORCE)),--force) --output $@ -- \
		$(call config,$(1),$(2)) $(call args,train-$(1))
endef
# What writes the recipe fast is a script of the training too; where that recipe is missing it is written again.
chooser = $(if $(fast),scripts/choose_fast.py)
chosen = $(and $(wildcard $(OUT)/$(1)/run.json),$(if $(fast),$(wildcard $(OUT)/check/fast-$(1).yaml),done))
$(OUT)/check/memory-lora.json: $(OUT)/dataset/audit.json $(chooser) $(if $(call chosen,lora),,FORCE)
	$(call predict,lora,$(recipe_file))
$(OUT)/check/memory-full.json: $(OUT)/dataset/audit-full.json $(chooser) $(if $(call chosen,full),,FORCE)
	$(call predict,full,$(recipe_full))

# A training is begun in the place of the shell, so that it gets the signals.
restart = $(if $(filter 1,$(RESTART)),$(if $(filter tutorial train-$(1),$(MAKECMDGOALS)),$(2)))
data = --dataset_name $(OUT)/dataset $$([ ! -e $(OUT)/dataset/validation.jsonl ] || echo --dataset_test_split validation)
$(OUT)/lora/run.json: scripts/02_train_lora.py $(chooser) $(OUT)/dataset/audit.json $(recipe_file) $(OUT)/.args/recipe $(OUT)/.args/train-lora \
		$(call restart,lora,FORCE) | $(OUT)/check/memory-lora.json
	exec $(PY) scripts/02_train_lora.py --model_name_or_path $(OUT)/base-model $(data) $(call config,lora,$(recipe_file)) \
		--memory_prediction $(OUT)/check/memory-lora.json --output_dir $(OUT)/lora $(call restart,lora,--restart true) \
		$(call args,train-lora)

$(OUT)/full/run.json: scripts/03_train_full.py $(chooser) $(OUT)/dataset/audit-full.json $(recipe_full) $(OUT)/.args/recipe $(OUT)/.args/train-full \
		$(call restart,full,FORCE) | $(OUT)/check/memory-full.json
	exec $(PY) scripts/03_train_full.py --model_name_or_path $(OUT)/base-model $(data) $(call config,full,$(recipe_full)) \
		--memory_prediction $(OUT)/check/memory-full.json --output_dir $(OUT)/full $(call restart,full,--restart true) \
		$(call args,train-full)

$(OUT)/%/loss.png: scripts/plot_loss.py $(OUT)/%/run.json
	$(PY) scripts/plot_loss.py $(OUT)/$*/run.json --output $@

# Two runs are compared as they are there; neither is trained for it, and where one is missing the script says so.
run = $(if $(call asked,$(1)),$(OUT)/$(1)/run.json,$(or $(wildcard $(OUT)//$(1)/run.json),FORCE))
runs := $(call run,lora) $(call run,full)
$(OUT)/report/comparison.json: scripts/compare_runs.py $(runs) $(OUT)/.args/compare | $(VENV)/installed
	$(PY) scripts/compare_runs.py $(OUT)/lora/run.json $(OUT)/full/run.json --output_dir $(OUT)/report $(call args,compare)

$(OUT)/report/comparison.png: scripts/plot_loss.py $(OUT)/report/comparison.json
	$(PY) scripts/plot_loss.py $(OUT)/lora/run.json $(OUT)/full/run.json --output $@

$(OUT)/merged/run.json: scripts/04_merge_adapter.py $(call result,lora) $(OUT)/.args/merge | $(ready)
	$(PY) scripts/04_merge_adapter.py --model_name_or_path $(OUT)/lora/adapter --base_model $(OUT)/base-model \
		--output_dir $(OUT)/merged $(call args,merge)

$(OUT)/lora/adapter/README.md: $(call result,lora)
$(OUT)/full/model/README.md: $(call result,full)
$(OUT)/merged/model/README.md: $(call result,merged)
$(OUT)/%/README.md: scripts/write_card.py | $(VENV)/installed
	$(PY) scripts/write_card.py $(dir $(@D))run.json

base_adapter := --base_model $(OUT)/base-model
generate = $(PY) scripts/05_generate.py --model_name_or_path $(OUT)/$(folder_$(step_$(1))) $(base_$(1))
$(OUT)/answers/adapter.jsonl: $(call result,lora)
$(OUT)/answers/base.jsonl: $(call result,base-model)
$(OUT)/answers/full.jsonl: $(call result,full)
$(OUT)/answers/merged.jsonl: $(call result,merged)
$(OUT)/answers/pipeline.jsonl: scripts/06_pipeline_infer.py $(call result,base-model) $(OUT)/.args/prompt | $(ready)
	$(PY) scripts/06_pipeline_infer.py --model_name_or_path $(OUT)/base-model --prompt="$$PROMPT" --output $@
$(OUT)/answers/%.jsonl: scripts/05_generate.py $(OUT)/.args/prompt | $(ready)
	$(call generate,$*) --prompt="$$PROMPT" --output $@

# The base model and all that was trained or merged so far; the adapter is made where there is nothing.
wanted = $(or $(wildcard $(OUT)/$(1)/run.json),$(filter tutorial $(asked_$(1)) $(if $(filter lora,$(1)),merge),$(MAKECMDGOALS)))
evaluated := $(or $(strip $(foreach step,lora full merged,$(if $(call wanted,$(step)),$(step)))),lora)
$(OUT)/report/evaluation.json: scripts/evaluate.py $(foreach step,$(evaluated),$(call result,$(step))) $(call result,dataset) \
		$(call result,base-model) $(OUT)/.args/evaluate $(OUT)/.args/evaluated | $(ready)
	$(PY) scripts/evaluate.py --base_model $(OUT)/base-model --models $(foreach step,$(evaluated),$(OUT)/$(folder_$(step))) \
		--dataset_name $(OUT)/dataset --output_dir $(OUT)/report $(call args,evaluate)
