"""What a model needs of a training's options beyond those that were given: fewer positions, and LoRA's targets.

For audit_tokens.py, which says it and writes it for Make. It is found out on the meta device, from the config alone.
"""

import contextlib

import torch
from folders import fail
from peft import LoraConfig, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch.nn import Linear
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig, SFTConfig, get_peft_config


def build(config: PreTrainedConfig):
    """The model without weights, which takes no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def gives_tensor(layer) -> bool:
    """Whether a linear layer gives a tensor, as LoRA takes it; some routers give more."""
    if type(layer).forward in (Linear.forward, Conv1D.forward):
        return True
    return isinstance(layer(torch.empty(1, layer.in_features, device="meta")), torch.Tensor)


def list_linear(model) -> tuple[list[str], list[str]]:
    """Names of the linear layers, the head aside: those that LoRA takes, and others."""
    layers = [(name.rpartition(".")[2], layer) for name, layer in model.named_modules()]
    layers = [each for each in layers if isinstance(each[1], Linear | Conv1D)]
    layers = [(name, layer) for name, layer in layers if layer is not model.get_output_embeddings()]
    plain = {name for name, layer in layers if gives_tensor(layer)}
    return sorted(plain), sorted({name for name, _ in layers} - plain)


def list_experts(model) -> dict[str, str]:
    """The weights that hold all experts of a layer at once: their full names, and as --lora_target_parameters."""
    found = (name for name, weight in model.named_parameters() if weight.ndim == 3 and ".experts." in name)
    return {name: ".".join(name.split(".")[-2:]) for name in found}


def inject(model, targets: LoraConfig):
    """The model with LoRA layers; raises a ValueError where PEFT does not put them into this one."""
    return get_peft_model(model, targets, low_cpu_mem_usage=True).base_model


def choose_targets(config: PreTrainedConfig, model_args: ModelConfig, experts: bool) -> list[str]:
    """all-linear, or where PEFT or the model does not take that, the names of the linear layers that they do take.
    experts: whether those may be among them, which PEFT adds for some models."""
    plain, others = list_linear(build(config))
    model_args.lora_target_modules = "all-linear"
    try:
        model = inject(build(config), get_peft_config(model_args))
        if not others and (experts or not model.targeted_parameter_names):
            return ["all-linear"]
    except ValueError as error:  # it names those layers of Mamba that it does not take
        plain = [name for name in plain if f"'{name}'" not in str(error)]
    model = inject(build(config), LoraConfig(task_type="CAUSAL_LM", target_modules=plain))
    names = sorted(model.peft_config["default"].target_modules)  # without those that stand for experts
    return names if len(names) > 1 else [f".*{names[0]}"]  # a single one is taken for a pattern


def check_targets(name: str, config: PreTrainedConfig, model_args: ModelConfig) -> list[str]:
    """Stops at targets that the model does not have, or PEFT does not take; returns the experts that are left out."""
    targets, model = model_args.lora_target_modules, build(config)
    plain, experts = list_linear(model)[0], list_experts(model)
    have = f"Linear layers of {name!r}: {' '.join(plain)}"
    if experts:
        have += f". Its experts, for --lora_target_parameters: {' '.join(dict.fromkeys(experts.values()))}"
    wanted = get_peft_config(model_args)
    try:
        model = inject(model, wanted)
    except ValueError as error:
        reason, advice = " ".join(str(error).split()).rstrip("."), "Name others, or all-linear"
        if "lora_dropout" in reason:
            advice = "Experts are trained with --lora_dropout 0 alone. Add that, or name layers"
        elif targets in plain:
            advice = f"A single name is taken for a pattern. Give --lora_target_modules '.*{targets}'"
        fail(f"--lora_target_modules: {reason}. {advice}. {have}.")
    found = [*model.targeted_module_names, *model.targeted_parameter_names]
    asked = [*(targets if isinstance(targets, list) else []), *(model_args.lora_target_parameters or [])]
    if missing := [each for each in asked if not any(f".{layer}".endswith(f".{each}") for layer in found)]:
        fail(f"{name!r} has no {', '.join(missing)} for LoRA. {have}.")
    return list(dict.fromkeys(short for full, short in experts.items() if full not in found))


def fit_options(name: str, config: PreTrainedConfig, model_args: ModelConfig, args: SFTConfig) -> list[str]:
    """Options to put after those that were given; says why, and changes model_args and args alike."""
    options, kind, places = [], config.model_type, getattr(config, "max_position_embeddings", None) or 0
    if args.max_length and args.max_length > places > 0:
        print(f"note: {name!r} has places for {places} tokens: --max_length is {places}, not {args.max_length}.")
        options, args.max_length = ["--max_length", str(places)], places
    if kind not in CONFIG_MAPPING:
        return options  # only its own code could tell more
    share = args.router_aux_loss_coef
    share = getattr(config, "router_aux_loss_coef", 0) if share is None else share
    if share and hasattr(config, "output_router_logits") and not hasattr(config, "num_experts"):
        print(f"note: TRL cannot compute the loss of a router of {kind}: it is left out, --router_aux_loss_coef 0.")
        options += ["--router_aux_loss_coef", "0"]
    targets, given = model_args.lora_target_modules, model_args.lora_target_modules or model_args.lora_target_parameters
    if not model_args.use_peft:
        return options
    if not given and kind in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        with contextlib.suppress(ValueError):  # of Mixtral's own targets PEFT finds none
            inject(build(config), get_peft_config(model_args))
            return options
    if not given or targets == "all-linear":
        chosen = choose_targets(config, model_args, experts=bool(given))
        model_args.lora_target_modules = chosen if len(chosen) > 1 else chosen[0]
        if chosen != [targets]:
            reason = f"LoRA does not take all linear layers of {kind}" if given else f"PEFT has no targets for {kind}"
            if given and model_args.lora_dropout and list_experts(build(config)):
                reason = f"LoRA takes the experts of {kind} with --lora_dropout 0 alone"
            what = "all linear layers" if chosen == ["all-linear"] else " ".join(chosen)
            print(f"note: {reason}. Taken: {what}. Others: --lora_target_modules NAMES")
            options += ["--lora_target_modules", *chosen]
    left = check_targets(name, config, model_args)
    if left and (not given or targets == "all-linear"):
        names = model_args.lora_target_modules
        with_them = f"--lora_target_modules {names if isinstance(names, str) else ' '.join(names)}"
        with_them += f" --lora_target_parameters {' '.join(left)} --lora_dropout 0"
        print(f"note: LoRA leaves its experts out. With them: {with_them}")
    return options
