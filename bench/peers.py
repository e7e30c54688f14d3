"""Train with another project: LLaMA-Factory, litgpt or torchtune, in an environment that has it.

    python timed.py OUT.json peers.py PEER SETTINGS.json

The tutorial's values, rows and lengths, by the project's own means. What it has no setting for stays as it is: litgpt
and torchtune take the rows at random, and litgpt clips no gradients and scales its learning rate down along a cosine.
On an accelerator its float32 is TF32.
"""

import json
import os
import runpy
import shutil
import sys
from pathlib import Path


def link_model(model: Path, folder: Path) -> Path:
    """A folder with the model's files, where a project may put its own beside them."""
    folder.mkdir(parents=True)
    for file in model.iterdir():
        if file.is_file():
            (folder / file.name).symlink_to(file)
    return folder


def llama_factory(settings: dict, out: Path) -> None:
    from llamafactory.train.tuner import run_exp

    if settings["gpu"] and not settings["bf16"]:
        sys.exit("error: LLaMA-Factory takes half precision on an accelerator: give --dtype bfloat16.")
    (out / "data").mkdir(parents=True)
    # It adds the EOS token itself.
    rows = [json.loads(line)["text"] for line in Path(settings["rows"]).read_text().splitlines()]
    lines = [json.dumps({"text": row.removesuffix(settings["eos_token"])}) for row in rows]
    (out / "data/rows.jsonl").write_text("\n".join(lines) + "\n")
    content = {"rows": {"file_name": "rows.jsonl", "columns": {"prompt": "text"}}}
    (out / "data/dataset_info.json").write_text(json.dumps(content))
    method = {"finetuning_type": "full"}
    if not settings["full"]:
        method = dict(
            finetuning_type="lora", lora_rank=64, lora_alpha=16, lora_dropout=0.1, lora_target="q_proj,v_proj"
        )
    run_exp(
        dict(
            model_name_or_path=settings["model"],
            stage="pt",  # rows of text, as they are
            do_train=True,
            **method,
            packing=False,
            dataset="rows",
            dataset_dir=str(out / "data"),
            cutoff_len=settings["max_length"],
            output_dir=str(out / "run"),
            num_train_epochs=1,
            per_device_train_batch_size=settings["batch_size"],
            optim="adamw_torch_fused",
            learning_rate=4e-5,
            weight_decay=0.001,
            max_grad_norm=0.3,
            lr_scheduler_type="constant",
            train_sampling_strategy="group_by_length",
            bf16=settings["bf16"],
            disable_gradient_checkpointing=True,
            save_strategy="no",
            logging_steps=50,
            report_to="none",
            **({} if settings["gpu"] else {"use_cpu": True}),
        )
    )


def litgpt(settings: dict, out: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.data import JSON
    from litgpt.finetune import full, lora
    from litgpt.prompts import Default
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    words = json.loads(Path(settings["model"], "config.json").read_text())["vocab_size"]
    name = {49152: "SmolLM2-135M-Instruct", 32000: "Llama-2-7b-hf"}.get(words)
    if not name:
        sys.exit("error: litgpt knows models by their names: give --size embedded or llama2-7b.")
    model = link_model(Path(settings["model"]), out / name)
    convert_hf_checkpoint(model, model_name=name)
    rows = [json.loads(line)["text"] for line in Path(settings["rows"]).read_text().splitlines()]
    (out / "rows").mkdir()
    for split, part in (("train", rows), ("val", rows[:1])):
        # Its tokenizer adds the EOS token itself.
        content = [{"instruction": "", "output": row.removesuffix(settings["eos_token"])} for row in part]
        (out / f"rows/{split}.json").write_text(json.dumps(content))
    size = settings["batch_size"]
    common = dict(
        checkpoint_dir=model,
        out_dir=out / "run",
        precision="bf16-mixed" if settings["bf16"] else "32-true",
        data=JSON(out / "rows", prompt_style=Default(), num_workers=0),
        train=TrainArgs(
            save_interval=10**6,
            log_interval=50,
            global_batch_size=size,
            micro_batch_size=size,
            lr_warmup_steps=1,
            epochs=1,
            max_seq_length=settings["max_length"],
        ),
        eval=EvalArgs(interval=10**6, max_iters=1, max_new_tokens=1, final_validation=False),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 4e-5, "weight_decay": 0.001, "fused": True}},
    )
    torch.set_float32_matmul_precision("high")  # as its command line does
    method = "full" if settings["full"] else "lora"
    sys.argv = ["litgpt", f"finetune_{method}", str(model)]  # it reads and saves its command line in the end
    if settings["full"]:
        full.setup(**common)
    else:
        lora.merge_lora = lambda *args, **kwargs: None  # comes after the last step, which is not measured
        lora.setup(**common, lora_r=64, lora_alpha=16, lora_dropout=0.1)


def train_torchtune(settings: dict, out: Path) -> None:
    import torchtune
    from omegaconf import OmegaConf

    model = Path(settings["model"])
    config = json.loads((model / "config.json").read_text())
    shape = dict(
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        embed_dim=config["hidden_size"],
        intermediate_dim=config["intermediate_size"],
        max_seq_len=2048,
        rope_base=config["rope_parameters"]["rope_theta"],
        tie_word_embeddings=config["tie_word_embeddings"],
    )
    adapter = dict(lora_attn_modules=["q_proj", "v_proj"], apply_lora_to_mlp=False, apply_lora_to_output=False)
    adapter |= dict(lora_rank=64, lora_alpha=16, lora_dropout=0.1)
    kind = "llama3_2" if settings["full"] else "lora_llama3_2"
    recipe = dict(
        output_dir=str(out / "run"),
        model={"_component_": f"torchtune.models.llama3_2._component_builders.{kind}", **shape},
        tokenizer={
            "_component_": "peers.make_tokenizer",
            "folder": str(model),
            "max_seq_len": settings["max_length"] + 1,
        },
        checkpointer={
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": str(model),
            "checkpoint_files": sorted(file.name for file in model.glob("*.safetensors")),
            "output_dir": str(out / "run"),
            "model_type": "LLAMA3_2",
        },
        resume_from_checkpoint=False,
        save_adapter_weights_only=True,
        dataset={
            "_component_": "torchtune.datasets.text_completion_dataset",
            "source": "json",
            "data_files": settings["rows"],
            "split": "train",
            "add_eos": False,  # the rows have it
        },
        seed=42,
        shuffle=True,
        batch_size=settings["batch_size"],
        optimizer={"_component_": "torch.optim.AdamW", "fused": True, "lr": 4e-5, "weight_decay": 0.001},
        lr_scheduler={
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 1,
        },
        loss={"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        epochs=1,
        max_steps_per_epoch=None,
        gradient_accumulation_steps=1,
        clip_grad_norm=0.3,
        optimizer_in_bwd=False,
        compile=False,
        metric_logger={"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": str(out / "logs")},
        log_every_n_steps=50,
        log_peak_memory_stats=False,
        device="cuda" if settings["gpu"] else "cpu",
        dtype="bf16" if settings["bf16"] else "fp32",
        enable_activation_checkpointing=False,
        enable_activation_offloading=False,
    )
    if not settings["full"]:
        recipe["model"] |= adapter
    config = OmegaConf.create(recipe)
    # Its recipes are scripts, which are not to be imported.
    method, name = ("full", "FullFinetune") if settings["full"] else ("lora", "LoRAFinetune")
    recipes = Path(torchtune.__file__).parent.parent / "recipes"
    trainer = runpy.run_path(str(recipes / f"{method}_finetune_single_device.py"))[f"{name}RecipeSingleDevice"](config)
    trainer.setup(config)
    trainer.save_checkpoint = lambda *args, **kwargs: None  # comes after the last step, which is not measured
    trainer.train()


def make_tokenizer(folder: str, max_seq_len: int):
    from torchtune.modules.transforms.tokenizers import HuggingFaceBaseTokenizer

    files = {"tokenizer_config_json_path": f"{folder}/tokenizer_config.json"}
    tokenizer = HuggingFaceBaseTokenizer(f"{folder}/tokenizer.json", **files)
    tokenizer.max_seq_len, tokenizer.pad_id = max_seq_len, tokenizer.eos_id
    return tokenizer


if __name__ == "__main__":
    settings = json.loads(Path(sys.argv[2]).read_text())
    folder = Path(settings["output_dir"])
    shutil.rmtree(folder, ignore_errors=True)
    {"LLaMA-Factory": llama_factory, "litgpt": litgpt, "torchtune": train_torchtune}[sys.argv[1]](settings, folder)
