# What comes after a training: serving, exporting, benchmarking. Each engine has an environment of its own, made when it
# is first asked for. `make serve` reads what is there, and trains nothing.
# HOST and PORT come from the command line or .env alone: some shells export a HOST, which is the machine's name.
only_asked = override $(1) := $$(or $$(if $$(call typed,$(1)),$$(value $(1))),$$(call dotenv,$(1)),$(2))
$(foreach name,HOST-127.0.0.1 PORT-8000 FORMAT-gguf QUANT-f16 TASKS-heldout,$(eval $(call only_asked,$(firstword $(subst -, ,$(name))),$(word 2,$(subst -, ,$(name))))))
$(if $(call special,$(HOST)$(PORT)$(QUANT)$(FORMAT)),$(error HOST, PORT, FORMAT or QUANT has marks that mean something to a shell. Take others))

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
served = $(STEP) $(call reads,$(FROM)) -- scripts/chain/serve.py $(call model,$(FROM)) --name $(FROM) --python $(SERVE) --log $(OUT)/check/serve.log

.PHONY: serve serve-check export export-check benchmark
serve: $(call result,$(from)) | $(ready) $(VENV)-serve/installed ## serve FROM=adapter|base|full|merged as OpenAI's API, by vLLM, at PORT
	@exec $(served) --host $(HOST) --port $(PORT) $(ARGS)
serve-check: $(call result,$(from)) | $(ready) $(VENV)-serve/installed ## ask a server many things and compare its answers with infer; ARGS=--load asks 200 too
	@$(call probe,$(FROM),$(if $(findstring --load,$(ARGS)),--load 200))
	$(SERVE) scripts/chain/check_serve.py --probe $(OUT)/check/probe-$(FROM).json --output $(OUT)/check/serve-$(FROM).json $(ARGS) -- $(served)
