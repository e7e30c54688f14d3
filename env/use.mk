# What comes after a training: serving, exporting, benchmarking. Each engine has an environment of its own, made when it
# is first asked for. Serving and exporting train nothing.
# HOST and PORT come from the command line or .env alone: some shells export a HOST, which is the machine's name.
only_asked = override $(1) := $$(or $$(if $$(call typed,$(1)),$$(value $(1))),$$(call dotenv,$(1)),$(2))
$(eval $(call only_asked,HOST,127.0.0.1))
$(eval $(call only_asked,PORT,8000))
$(foreach name,FORMAT-gguf QUANT-f16 TASKS-heldout,$(eval $(call setting,$(firstword $(subst -, ,$(name))),$(word 2,$(subst -, ,$(name))))))
$(if $(call special,$(HOST)$(PORT)$(QUANT)$(FORMAT)),$(error HOST, PORT, FORMAT or QUANT has marks that mean something to a shell. Take others))

export TASKS
SERVE := $(VENV)-serve/bin/python
EXPORT := $(VENV)-export/bin/python
BENCHMARK := $(VENV)-benchmark/bin/python
$(VENV)-%/installed: env/setup_engine.sh | $(VENV)/installed
	@VENV=$(VENV) PYTHON="$$PYTHON" env/setup_engine.sh $*
$(VENV)-serve/installed: $(wildcard env/locks/serve-*.txt) $(if $(filter $(file <$(VENV)/backend),$(file <$(VENV)-serve/installed)),,FORCE)
$(VENV)-export/installed: $(VENV)/installed env/locks/export.txt env/locks/runtime.txt
$(VENV)-benchmark/installed: $(VENV)/installed env/locks/benchmark.txt
$(VENV)-export/runtime: $(VENV)-export/installed
	@VENV=$(VENV) env/setup_engine.sh runtime

# Answers of `make infer` by token, and the held-out rows with their loss: what an engine is compared with.
probe = $(STEP) $(call reads,$(1)) $(wildcard $(OUT)/dataset) -- scripts/chain/probe.py $(call model,$(1)) \
	$(call trained_type,$(call step_of,$(1))) --prompt="$$PROMPT" --dataset_name $(OUT)/dataset --output $(OUT)/check/probe-$(1).json $(2)
served = $(STEP) $(call reads,$(FROM)) -- scripts/chain/serve.py $(call model,$(FROM)) $(call trained_type,$(from)) --name $(FROM) --python $(SERVE)

.PHONY: push serve serve-check export export-check benchmark
push: $(call result,$(from)) | $(VENV)/installed ## upload FROM=adapter|full|merged to REPO=user/name on the Hub
	@$(call finish,$(from)) > /dev/null
	$(STEP) --reads $(OUT)/$(from) -- scripts/chain/push_model.py --folder $(call folder_of,$(from)) --repo_id="$$REPO" $(ARGS)
serve: $(call result,$(from)) | $(ready) $(VENV)-serve/installed ## serve FROM=adapter|base|full|merged as OpenAI's API, by vLLM, at PORT
	@exec $(served) --log $(OUT)/check/serve-$(PORT).log --host $(HOST) --port $(PORT) $(ARGS)
serve-check: $(call result,$(from)) | $(ready) $(VENV)-serve/installed ## ask a server many things and compare its answers with infer; ARGS=--load asks 200 too
	@$(call probe,$(FROM),$(if $(findstring --load,$(ARGS)),--load 200))
	$(SERVE) scripts/chain/check_serve.py --probe $(OUT)/check/probe-$(FROM).json --output $(OUT)/check/serve-$(FROM).json $(ARGS) -- $(served) --log $(OUT)/check/serve-check.log

# The exports of a result stand side by side: OUT/export/merged-f16, merged-q4_k_m.
ifneq ($(call asks,export export-check),)
$(if $(filter gguf,$(FORMAT)),,$(error FORMAT=$(FORMAT) is unknown. Type: make export FORMAT=gguf))
$(if $(filter f32 f16 q8_0 q4_k_m,$(QUANT)),,$(error QUANT=$(QUANT) is unknown. Type: make export QUANT=f32, f16, q8_0 or q4_k_m))
endif
goals += export=export
exported := $(OUT)/export/$(FROM)-$(QUANT)
exports = $(or $(patsubst %/run.json,%,$(wildcard $(OUT)/export/$(FROM)-*/run.json)),$(exported))
$(OUT)/export/%: private note = $(OUT)/.notes/export-$(notdir $(@D))
made_export = $(call sums,scripts/chain/export_gguf.py) $(call inside,$(from) $(if $(filter adapter,$(FROM)),base-model))
.PRECIOUS: $(exported)/run.json
export: $(exported)/run.json ## write FROM=... as a GGUF with a Modelfile for Ollama, QUANT=f32|f16|q8_0|q4_k_m
	@echo "$(exported) is up to date"
$(exported)/run.json: FORCE $(call result,$(from)) | $(ready) $(VENV)-export/$(if $(filter q4_k_m,$(QUANT)),runtime,installed)
	$(unless_same)
	$(EXPORT) scripts/chain/run_step.py $(@D) $(call reads,$(FROM)) --note $(note) -- scripts/chain/export_gguf.py $(call model,$(FROM)) \
		--llama_cpp $(VENV)-export/llama.cpp --quant $(QUANT) $(call args,export)
export-check: $(if $(filter-out $(wildcard $(exports)),$(exports)),$(exported)/run.json) | $(ready) $(VENV)-export/runtime ## compare what llama.cpp answers, of each export of FROM, with infer
	@$(call probe,$(FROM))
	$(EXPORT) scripts/chain/run_step.py $(call reads,$(FROM)) --reads $(exports) -- scripts/chain/check_export.py --probe $(OUT)/check/probe-$(FROM).json \
		--exports $(exports) $(ARGS)

probed := $(patsubst lora,adapter,$(firstword $(evaluated)))
benchmark: $(foreach step,$(evaluated) dataset base-model,$(call result,$(step))) | $(ready) $(VENV)-benchmark/installed ## measure base and all that was trained by lm-eval, TASKS=heldout,arc_easy
	@$(if $(findstring heldout,$(TASKS)),$(call probe,$(probed)))
	$(BENCHMARK) scripts/chain/run_step.py --reads $(addprefix $(OUT)/,$(evaluated) base-model) -- scripts/chain/benchmark.py \
		--base_model $(OUT)/base-model --models $(foreach step,$(evaluated),$(call folder_of,$(step))) \
		--probe $(OUT)/check/probe-$(probed).json --tasks="$$TASKS" --output_dir $(OUT)/report $(ARGS)
