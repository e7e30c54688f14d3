# Fine-tuning and inference on a single accelerator, step by step. Type `make` for the targets.
$(if $(filter 4.2,$(firstword $(sort $(MAKE_VERSION) 4.2))),,$(error GNU Make $(MAKE_VERSION) is too old, \
	4.2 or newer is needed: apt install make, or brew install make and type gmake))

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help

# Variables ------------------------------------------------------------------------------------------------------------
# Each comes from the command line, else the environment, else .env, else the default here, and is not expanded by Make.
hash := \#
dotenv = $(if $(wildcard .env),$(shell sed -n -E "1s/^\xEF\xBB\xBF//; s/^[[:space:]]*(export[[:space:]]+)?$(1)[[:space:]]*=//p" .env \
	| tail -n 1 | sed -E -e "/^[[:space:]]*['\"]/!s/[[:space:]]+$(hash).*//" -e 's/^[[:space:]]+//; s/[[:space:]]+$$//' \
	-e '/^"/ { s/^"(([^"\\]|\\.)*)".*/\1/; s/\\(["\\])/\1/g; b; }' -e "s/^'([^']*)'.*/\1/"))
typed = $(filter command,$(firstword $(origin $(1))))
setting = override $(1) := $$(if $$(call typed,$(1)),$$(value $(1)),$$(or $$(value $(1)),$$(call dotenv,$(1)),$(2)))
build_settings := COMPUTE_BACKEND BNB_ROCM_ARCH BNB_TAG BNB_SOURCE JOBS FORCE
# COLUMNS may be the width of the terminal, a mere number; its name belongs to the shells of the commands.
override MAPPING := $(or $(if $(call typed,COLUMNS)$(findstring :,$(value COLUMNS)),$(value COLUMNS)),$(if $(call typed,COLUMNS),,$(call dotenv,COLUMNS)))
$(foreach name,OUT-outputs BASE_MODEL-embedded DATASET-data VALIDATION_ROWS-0 FROM-adapter VENV-.venv ARGS REPO RESTART RUN DEVICE PRICE \
	DATASET_CONFIG DATASET_SPLIT DATASET_TEST_SPLIT ROWS $(build_settings),\
	$(eval $(call setting,$(firstword $(subst -, ,$(name))),$(word 2,$(subst -, ,$(name))))))
$(eval $(call setting,PROMPT,What is a large language model?))
$(eval $(call setting,RECIPE,$(if $(filter embedded,$(BASE_MODEL)),embedded)))
# What the environment was made with holds until something else is asked for; .old is there after an interrupted setup.
kept = $(patsubst $(1)=%,%,$(filter $(1)=%,$(or $(file <$(VENV)/installed),$(file <$(VENV).old/installed))))
$(foreach name,BACKEND TORCH_INDEX TORCH_VERSION PYTHON,$(eval $(call setting,$(name),$(call kept,$(name)))))
override BACKEND := $(or $(BACKEND),auto)
override PYTHON := $(or $(PYTHON),python3)
special = $(strip $(foreach mark,; & | < > ( ) { } [ ] * ? ! ~ ' " ` $$ $(hash) \ : %,$(findstring $(mark),$(1))))
$(if $(call special,$(RECIPE)$(FROM)),$(error RECIPE=$(RECIPE) or FROM=$(FROM) has marks that mean something to a shell. Take others))
$(if $(filter-out 1 1,$(words $(OUT)) $(words $(VENV)))$(call special,$(OUT)$(VENV))$(filter . ./,$(OUT)),$(error OUT=$(OUT) and VENV=$(VENV) \
	must each be a path without spaces and without marks that mean something to a shell, and OUT not this folder itself))
$(if $(findstring hub_token,$(subst -,_,$(ARGS))),$(error ARGS has a token, which would be shown and kept. Leave it out, and put HF_TOKEN=<token> into .env))
export RUN DEVICE PRICE BASE_MODEL DATASET PROMPT VALIDATION_ROWS REPO BACKEND PYTHON VENV TORCH_INDEX TORCH_VERSION $(build_settings) DATASET_CONFIG DATASET_SPLIT DATASET_TEST_SPLIT ROWS MAPPING
export HF_HUB_DISABLE_TELEMETRY ?= 1

PY := $(VENV)/bin/python
other_out := $(if $(filter-out outputs,$(OUT)), OUT=$(OUT))
STEP := $(PY) scripts/chain/run_step.py
# A recipe by its name in env/recipes/, or a .yaml file; none: the scripts' own defaults, which are the tutorial's. Where
# there is a MODEL-NAME.yaml for this base model, it is taken for NAME; where there is a NAME-full.yaml beside NAME.yaml,
# it is for train-full. fast: what would be taken without RECIPE. It and those named here get settings of this machine.
fast := $(or $(filter fast throughput qwen3 smollm3 gemma3,$(RECIPE)),$(if $(filter embedded,$(BASE_MODEL)),,$(filter qlora,$(RECIPE))))
recipe_name := $(if $(filter fast,$(RECIPE)),$(filter embedded,$(BASE_MODEL)),$(RECIPE))
recipe_lora := $(if $(recipe_name),$(if $(filter %.yaml,$(recipe_name)),$(recipe_name),$(or \
	$(wildcard env/recipes/$(BASE_MODEL)-$(recipe_name).yaml),env/recipes/$(recipe_name).yaml)))
$(if $(filter-out $(wildcard $(recipe_lora)),$(recipe_lora)),$(error there is no $(recipe_lora). Type RECIPE= with one of: \
	fast $(patsubst env/recipes/%.yaml,%,$(wildcard env/recipes/*.yaml)), a .yaml file, or nothing))
recipe_full := $(or $(wildcard $(recipe_lora:.yaml=-full.yaml)),$(recipe_lora))
$(if $(and $(recipe_full),$(filter train-full tutorial,$(MAKECMDGOALS)),$(shell grep -E '^(load_in_[48]bit|use_peft): *true' $(recipe_full))),$(error \
	$(recipe_full) is for LoRA, or quantizes the weights that train-full trains. Type: make train-lora RECIPE=$(RECIPE)$(other_out), or take another RECIPE))

# What is made again ---------------------------------------------------------------------------------------------------
# Each result has a note of what it was made of: script, settings, and what is in its inputs. Its recipe always runs, and
# ends at once where all of that is still the same, whatever the clocks say.
quote = '$(subst ','\'',$(1))'
sums = $(shell cat $(1) 2> /dev/null | cksum)
given = $(1) $(shell find -L $(call quote,$(1)) -maxdepth 3 -type f -printf '%p %s %T@\n' 2> /dev/null | sort | cksum)
inside = $(foreach step,$(1),$(step) $(shell { grep -vE ' (run|step).json$$' $(OUT)/$(step)/SHA256SUMS || find -L $(OUT)/$(step) -type f -printf '%p %s %T@\n' | sort; } 2> /dev/null | cksum))
script = $(wildcard scripts/*_train_$(1).py)
training = $(if $(fast),fast $(call sums,scripts/chain/choose_fast.py)) $(call sums,$(script) $(recipe_$(1)) $(filter %.jinja %.j2,$(subst =, ,$(call args,$(1))) $(shell cat $(recipe_$(1)) /dev/null))) $(call inside,base-model dataset)
made_check = $(call sums,scripts/00_check_gpu.py) $(shell stat -c %y $(VENV)/installed 2> /dev/null)
made_base-model = $(call given,$(BASE_MODEL)) $(call sums,scripts/01_download.py)
made_dataset = $(call given,$(DATASET)) $(VALIDATION_ROWS) $(DATASET_CONFIG) $(DATASET_SPLIT) $(DATASET_TEST_SPLIT) $(ROWS) $(MAPPING) $(call sums,scripts/01_download.py scripts/chain/read_rows.py scripts/chain/find_rows.py)
made_lora = $(call training,lora)
made_full = $(call training,full)
made_merged = $(call sums,scripts/04_merge_adapter.py) $(call inside,lora)
made_evaluation = $(call sums,scripts/chain/evaluate.py scripts/02_train_lora.py scripts/05_generate.py) $(call inside,base-model dataset $(evaluated))
made_comparison = $(call sums,scripts/chain/compare_runs.py $(OUT)/lora/run.json $(OUT)/full/run.json)
made_answers = $(PROMPT) $(call sums,scripts/05_generate.py scripts/06_pipeline_infer.py) $(call inside,base-model lora full merged)
# ARGS belongs to the step that is asked for, of the tutorial to both trainings; one made on the way keeps its own.
goals := base-model=download dataset=download lora=train-lora full=train-full merged=merge evaluation=evaluate comparison=compare
goal = $(patsubst $(1)=%,%,$(filter $(1)=%,$(goals)))
asks = $(filter $(1),$(MAKECMDGOALS))
args = $(if $(call asks,$(goal) $(if $(filter lora full,$(1)),tutorial)),$(ARGS),$(shell sed -n 's/.*; ARGS //p' $(OUT)/.notes/$(1) 2> /dev/null))
restart = $(if $(filter 1,$(RESTART)),$(if $(filter lora full,$(1)),$(call asks,$(goal) tutorial)))
step = $(firstword $(subst /, ,$(patsubst report/%.json,%,$(patsubst $(OUT:./%=%)/%,%,$@))))
note = $(OUT)/.notes/$(step)
$(OUT:./%=%)/%: export NOTE = $(made_$(step)); ARGS $(call args,$(step))
check-gpu: export NOTE = $(made_check); ARGS $(empty)
define unless_same
@[ ! -e $@ ] || [ "$$NOTE" != "$$(cat $(note) 2> /dev/null)" ] || [ "$(call restart,$(step))" ] || exit 0
set -x
endef
keep_note = mkdir -p $(OUT)/.notes && printf '%s\n' "$$NOTE" > $(OUT)/.notes/$(step:check-gpu=check)
# What only reads results takes those that are there, unless the step that makes them is asked for too; what is missing
# is made. A merged model is brought up to date with the adapter beside it.
makes = $(call asks,$(goal) tutorial $(if $(filter base-model dataset,$(1)),train-lora train-full))
there = $(wildcard $(OUT)/$(1)/run.json)
result = $(if $(or $(call makes,$(1)),$(and $(filter merged,$(1)),$(call there,lora)),$(if $(call there,$(1)),,no)),$(OUT)/$(1)/run.json)
wanted = $(or $(call there,$(1)),$(call makes,$(1)),$(if $(filter lora,$(1)),$(call asks,merge)))
evaluated := $(or $(strip $(foreach step,lora full merged,$(if $(call wanted,$(step)),$(step)))),lora)
# FROM: its step, the folder of its model, and the options to load it with.
step_of = $(patsubst adapter,lora,$(patsubst base,base-model,$(1)))
folder_of = $(OUT)/$(1:lora=lora/adapter)$(if $(filter full merged,$(1)),/model)
# On an accelerator answers are in bfloat16 where the training was; a merged model's record has that of its adapter.
trained_type = $(if $(filter-out cpu,$(file <$(VENV)/backend)),$(shell grep -qs '"bf16": true' $(OUT)/$(1)/run.json && echo --dtype bfloat16))
reads = --reads $(OUT)/$(step_of) $(if $(filter adapter,$(1)),$(OUT)/base-model)
model = --model_name_or_path $(call folder_of,$(step_of)) $(if $(filter adapter,$(1)),--base_model $(OUT)/base-model)
from := $(call step_of,$(FROM))
asking := $(call asks,infer chat pipeline push serve serve-check export export-check)
ifdef asking
$(if $(filter adapter base full merged,$(FROM)),,$(error FROM=$(FROM) is unknown. Type: make $(asking) FROM=adapter, base, full or merged))
$(if $(filter push,$(asking)),$(if $(filter base,$(FROM)),$(error FROM=base is not yours to upload. Type: make push FROM=adapter, full or \
	merged REPO=user/name))$(if $(REPO),,$(error REPO is not given. Type: make push FROM=$(FROM) REPO=user/name)))
# The training that takes most is not begun on the way to something else, and nothing on the way to an upload or a server.
$(if $(filter full,$(FROM))$(filter push serve% export%,$(asking)),$(if $(call makes,$(from))$(call there,$(from)),,$(error \
	there is no $(OUT)/$(from) yet. Type: make $(call goal,$(from))$(other_out))))
endif

# Targets --------------------------------------------------------------------------------------------------------------
.PHONY: help setup check-gpu bitsandbytes try download audit train-lora train-full reproduce compare merge infer chat pipeline tutorial \
	evaluate verify verify-tutorial test test-faults gpu-check bench bench-steps bench-growth lint lock docker-run clean distclean FORCE
.NOTPARALLEL: # one accelerator, one step at a time
ready := $(VENV)/installed $(OUT)/check/report.json

help: ## this list
	@echo "make TARGET [VARIABLE=value ...]"
	sed -n -E 's/^([a-z-]+):.*## (.*)/\1:\2/p' Makefile env/use.mk | awk -F: '{ printf "  %-15s %s\n", $$1, $$2 }'
	echo "Variables (README), on the command line, in the environment or in .env:"
	echo "  OUT=$(OUT) BASE_MODEL=$$BASE_MODEL DATASET=$$DATASET VALIDATION_ROWS=$$VALIDATION_ROWS RECIPE=$(RECIPE) FROM=$(FROM) ARGS= RESTART="
	echo "  COLUMNS=$$MAPPING DATASET_CONFIG=$$DATASET_CONFIG DATASET_SPLIT=$$DATASET_SPLIT DATASET_TEST_SPLIT=$$DATASET_TEST_SPLIT ROWS=$$ROWS REPO=$$REPO RUN=$$RUN DEVICE=$$DEVICE PRICE=$$PRICE PROMPT=$$PROMPT HOST=$(HOST) PORT=$(PORT) API_KEY= FORMAT=$(FORMAT) QUANT=$(QUANT) TASKS=$$TASKS BACKEND=$$BACKEND TORCH_INDEX=$$TORCH_INDEX PYTHON=$$PYTHON VENV=$(VENV) $(build_settings:%=%=)"

setup: $(VENV)/installed ## make the Python environment (BACKEND=auto|cpu|cuda|rocm|preinstalled)
	@echo "$(VENV) is up to date"
check-gpu: | $(VENV)/installed ## check the accelerators and the packages
	$(check) $(if $(filter embedded,$(BASE_MODEL))$(wildcard $(BASE_MODEL)),,--access "$$BASE_MODEL") $(ARGS) || [ $$? = 2 ] || \
		{ mv $(OUT)/check/report.json $(OUT)/check/not-ready.json; exit 1; }
	$(keep_note)
bitsandbytes: | $(VENV)/installed ## build bitsandbytes where the wheel does not work, or FORCE=1
	@PYTHON=$(PY) bash env/build_bitsandbytes.sh

try: | $(VENV)/installed ## say in two minutes what train-lora would do, without the weights: rows, lengths, memory, disk, time
	@$(PY) scripts/chain/try_out.py --model_name_or_path="$$BASE_MODEL" $(asked_rows) $(call recipe,lora) $(if $(fast),--fast) --out $(OUT) --output $(OUT)/check/try.json $(ARGS)
download: $(OUT)/base-model/run.json $(OUT)/dataset/run.json ## fetch base model and data set
	@echo "$(OUT)/base-model and $(OUT)/dataset are up to date"
audit: $(OUT)/base-model/run.json $(OUT)/dataset/run.json ## show which tokens will be learned, and stop where the data is wrong
	$(call audit,lora,$(ARGS))
train-lora: $(OUT)/lora/run.json ## fine-tune with LoRA and save the adapter
train-full: $(OUT)/full/run.json ## fine-tune all parameters and save the model
reproduce: | $(VENV)/installed ## train again from RUN=.../run.json alone, in another OUT, and compare
	@$(PY) scripts/chain/reproduce_run.py "$$RUN" --output_dir $(OUT)
	mapfile -t of < $(OUT)/reproduce.txt
	again() { $(MAKE) --no-print-directory OUT=$(OUT) RECIPE=$(OUT)/reproduce.yaml BASE_MODEL="$${of[1]}" DATASET="$${of[2]}" \
		VALIDATION_ROWS="$${of[3]}" "$${of[@]:6}" RESTART= "$$@"; }
	again download ARGS="$${of[4]}"; again "$${of[0]}" ARGS=
	$(PY) scripts/chain/reproduce_run.py "$$RUN" --compare $(OUT)/$${of[5]}/run.json
compare: $(OUT)/report/comparison.json ## set the two trainings side by side
	@cat $(OUT)/report/comparison.md
merge: $(OUT)/merged/run.json ## merge the adapter into the base model
train-lora train-full merge:
	@$(call finish,$(patsubst train-%,%,$(@:merge=merged)))
infer: $(call result,$(from)) | $(ready) ## answer PROMPT="..." with FROM=adapter|base|full|merged
	$(call answer,$(FROM)) $(if $(findstring --prompts_file,$(ARGS)),,--prompt="$$PROMPT") $(ARGS)
chat: $(call result,$(from)) | $(ready) ## keep a conversation with FROM=adapter|base|full|merged
	@$(call answer,$(FROM)) --chat $(ARGS)
pipeline: $(call result,$(from)) | $(ready) ## answer PROMPT="..." through the pipeline of transformers
	$(STEP) $(call reads,$(FROM)) -- scripts/06_pipeline_infer.py $(call model,$(FROM)) $(call trained_type,$(from)) --prompt="$$PROMPT" $(ARGS)
tutorial: $(OUT)/check/report.json download train-lora train-full compare merge $(OUT)/answers/pipeline.jsonl ## all of the above, in order
	@echo "The tutorial is done: $(OUT)/report/comparison.md, $(OUT)/answers"

evaluate: $(OUT)/report/evaluation.json ## held-out loss and answers of the base model and of all that was trained
	@cat $(OUT)/report/evaluation.md
verify: | $(VENV)/installed ## compare the loss curves with those on record
	$(PY) scripts/chain/verify_run.py $$(ls $(OUT)/lora/run.json $(OUT)/full/run.json 2> /dev/null) --curves env/curves $(ARGS)
verify-tutorial: $(VENV)/tested ## check the tutorial's own figures, without its model
	@HF_DATASETS_DISABLE_PROGRESS_BARS=1 $(PY) -m pytest tests/test_tutorial_figures.py -v -s -p no:warnings $(ARGS)
test: $(VENV)/tested $(VENV)-export/installed ## run the tests
	@$(PY) -m pytest -n 2 --dist loadfile $(ARGS)
test-faults: $(VENV)/tested ## kill, fill the disk, damage files, cut the power, and see that nothing is lost (long)
	@FAULTS=full $(PY) -m pytest $(foreach name,faults resume runner bad_input security,tests/test_$(name).py) -v -s -p no:warnings $(ARGS)
gpu-check: ## prove each path on the accelerator in 8 minutes, and measure it; without setup in PYTHON, which needs torch
	@$(if $(wildcard $(VENV)/installed),$(PY),$(PYTHON)) bench/gpu_check.py --output_dir $(OUT)/check $(ARGS)
bench: $(if $(filter gpu,$(DEVICE)),,$(call result,base-model) $(call result,dataset)) | $(ready) ## compare the training speed with what else could be run, of train-full with FROM=full, in minutes with DEVICE=gpu
	$(PY) bench/train_speed.py $(if $(filter gpu,$(DEVICE)),,--model $(OUT)/base-model --data $(OUT)/dataset) --output_dir $(OUT)/bench \
		$(if $(DEVICE),--device="$$DEVICE") $(if $(PRICE),--price="$$PRICE") $(if $(filter full,$(FROM)),--full) $(ARGS)
bench-steps: $(call result,base-model) | $(ready) ## measure start-up, generation, merge and conversion
bench-growth: $(call result,base-model) | $(ready) ## measure how time and memory grow with rows and length
bench-steps bench-growth:
	$(PY) bench/$(if $(filter %-steps,$@),step_speed,growth).py --model $(OUT)/base-model --output_dir $(OUT)/bench $(ARGS)
lint: $(VENV)/tested ## check the style of the code
	@$(PY) -m ruff check . && $(PY) -m ruff format --check .
lock: ## pin the packages anew for each backend, after a change of env/requirements*.txt
	@env/lock.sh
docker-run: ## print how to build and to run the Docker image for ROCm
	@env/docker_run.sh
clean: ## remove what the steps left in OUT
	@rm -rf $(foreach step,base-model dataset lora full merged,$(addprefix $(OUT)/,$(step) $(step).part .$(step).old)) \
		$(addprefix $(OUT)/,.notes check answers bench export report reproduce.txt reproduce.yaml)
distclean: clean ## remove the Python environments too
	@env/setup.sh --remove
	rm -rf $(foreach engine,serve export benchmark,$(VENV)-$(engine) $(VENV)-$(engine).lock)

# Environment ----------------------------------------------------------------------------------------------------------
# make -n calls the script too, which then only prints its commands; so do -t and -q. The script takes the place of the
# shell, so that it gets the signals, and writes what was asked for into `installed`, which Make must not remove.
short_flags = $(filter-out --%,$(firstword -$(MAKEFLAGS)))
dry_run = $(if $(findstring n,$(short_flags))$(findstring t,$(short_flags))$(findstring q,$(short_flags)),--dry-run)
settings := $(foreach name,PYTHON BACKEND TORCH_INDEX TORCH_VERSION,$(name)=$($(name)))
.PRECIOUS: $(VENV)/installed $(foreach step,base-model dataset lora full merged,$(OUT)/$(step)/run.json)
$(VENV)/installed: env/setup.sh $(patsubst %,env/locks/%.txt,cpu cuda rocm packages) $(if $(findstring |$(settings)|,|$(file <$(VENV)/installed)|),,FORCE)
	+@exec env/setup.sh $(dry_run)
$(VENV)/tested: $(VENV)/installed env/locks/test.txt
	$(PY) -m pip install --no-deps -r env/locks/test.txt
	touch $@
# Exit status 2 of the check: ready, with warnings.
check = $(PY) scripts/00_check_gpu.py --output $(OUT)/check/report.json --require "$$(sed -E 's/cuda|rocm/gpu/' $(VENV)/backend)"
$(OUT)/check/report.json: FORCE | $(VENV)/installed
	$(unless_same)
	$(check) || [ $$? = 2 ]
	$(keep_note)

# Steps ----------------------------------------------------------------------------------------------------------------
asked_rows = --dataset_name="$$DATASET" --validation_rows="$$VALIDATION_ROWS" $${DATASET_CONFIG:+--dataset_config="$$DATASET_CONFIG"} $${DATASET_SPLIT:+--dataset_train_split="$$DATASET_SPLIT"} \
	$${DATASET_TEST_SPLIT:+--dataset_test_split="$$DATASET_TEST_SPLIT"} $${ROWS:+--rows="$$ROWS"} $${MAPPING:+--columns="$$MAPPING"}
sealed = $(if $(shell ls $(call quote,$(1)/SHA256SUMS) 2> /dev/null),--reads $(call quote,$(1)))
$(OUT)/base-model/run.json: FORCE | $(ready)
	$(unless_same)
	$(STEP) $(@D) $(call sealed,$(BASE_MODEL)) --note $(note) -- scripts/01_download.py --only model --model_name_or_path="$$BASE_MODEL" $(call args,$(step))
$(OUT)/dataset/run.json: FORCE | $(ready)
	$(unless_same)
	$(STEP) $(@D) $(call sealed,$(DATASET)) --note $(note) -- scripts/chain/read_rows.py $(asked_rows) $(call args,$(step))

# Before each training an audit with its options, which writes into .options what the model needs besides, and a prediction
# of the memory: one that does not fit is not begun, unless FORCE=1. The recipe fast is written then, with settings that take
# less where it does not fit; for a training that was interrupted it stays. The training replaces the shell, to get the signals.
data = --model_name_or_path $(OUT)/base-model --dataset_name $(OUT)/dataset \
	$$([ ! -e $(OUT)/dataset/validation.jsonl ] || echo --dataset_test_split validation)
recipe = $(addprefix --config ,$(recipe_$(1)))
config = $(if $(fast),--config $(OUT)/check/fast-$(1).yaml,$(recipe))
choose = $(PY) scripts/chain/choose_fast.py --method $(1) $(recipe) --output $(OUT)/check/fast-$(1).yaml \
	$(if $(call restart,$(1)),,$(if $(wildcard $(OUT)/$(1).part),--keep)) --
audit = $(STEP) --reads $(OUT)/base-model $(OUT)/dataset -- scripts/chain/audit_tokens.py $(data) $(recipe) $(if $(fast),--bf16 false) \
	--output $(OUT)/check/audit-$(1).json $(if $(filter full,$(1)),--use_peft false) $(2)
fitted = $(call args,$(1)) $$(cat $(OUT)/check/audit-$(1).options)
define train
$(if $(findstring --help,$(ARGS)),exec $(PY) $(script) --help)
$(call audit,$(1),$(call args,$(1)))
$(if $(fast),$(choose)) $(PY) scripts/chain/predict_memory.py --model $(OUT)/base-model --method $(1) --audit $(OUT)/check/audit-$(1).json \
	$(if $(filter 1,$(FORCE)),--force) --output $(OUT)/check/memory-$(1).json -- $(config) $(fitted)
exec $(STEP) $(OUT)/$(1) --reads $(OUT)/base-model $(OUT)/dataset --note $(note) --prediction $(OUT)/check/memory-$(1).json \
	$(if $(call restart,$(1)),--restart) -- $(script) $(data) $(config) $(fitted)
endef
$(OUT)/lora/run.json $(OUT)/full/run.json: FORCE | $(call result,base-model) $(call result,dataset) $(ready)
	$(unless_same)
	$(call train,$(step))
$(OUT)/merged/run.json: FORCE | $(call result,lora) $(ready)
	$(unless_same)
	$(STEP) $(@D) --reads $(OUT)/base-model $(OUT)/lora --note $(note) -- scripts/04_merge_adapter.py $(call model,adapter) $(call args,$(step))
# The card and the picture go into a result that has none yet; PEFT leaves a form to fill in.
define finish
[ -e $(folder_of)/README.md ] && ! grep -q "More Information Needed" $(folder_of)/README.md || $(PY) scripts/chain/write_card.py $(OUT)/$(1)/run.json
[ -e $(OUT)/$(1)/loss.png ] || [ $(1) = merged ] || $(PY) scripts/chain/plot_loss.py $(OUT)/$(1)/run.json --output $(OUT)/$(1)/loss.png
echo "$(OUT)/$(1) is up to date"
endef

# Two runs are compared as they are there; neither is trained for it, and where one is missing the script says so.
$(OUT)/report/comparison.json: FORCE | $(foreach step,lora full,$(if $(call makes,$(step)),$(OUT)/$(step)/run.json)) $(VENV)/installed
	$(unless_same)
	$(PY) scripts/chain/compare_runs.py $(OUT)/lora/run.json $(OUT)/full/run.json --output_dir $(@D) $(call args,$(step))
	$(PY) scripts/chain/plot_loss.py $(OUT)/lora/run.json $(OUT)/full/run.json --output $(@D)/comparison.png
	$(keep_note)
$(OUT)/report/evaluation.json: FORCE | $(foreach step,$(evaluated) dataset base-model,$(call result,$(step))) $(ready)
	$(unless_same)
	$(STEP) --reads $(addprefix $(OUT)/,$(evaluated) dataset base-model) -- scripts/chain/evaluate.py --base_model $(OUT)/base-model \
		--models $(foreach step,$(evaluated),$(call folder_of,$(step))) --dataset_name $(OUT)/dataset --output_dir $(@D) $(call args,$(step))
	$(keep_note)
answer = $(STEP) $(reads) -- scripts/05_generate.py $(model) $(call trained_type,$(step_of))
$(OUT)/answers/pipeline.jsonl: FORCE | $(foreach step,base-model lora full merged,$(call result,$(step))) $(ready)
	$(unless_same)
	mkdir -p $(@D)
	$(foreach from,adapter base full merged,$(call answer,$(from)) --prompt="$$PROMPT" --output $(@D)/$(from).jsonl &&) \
	$(STEP) $(call reads,base) -- scripts/06_pipeline_infer.py $(call model,base) --prompt="$$PROMPT" --output $@
	$(keep_note)

include env/use.mk
