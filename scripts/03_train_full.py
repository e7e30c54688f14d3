# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0",
#     "transformers==5.23.0; python_version >= '3.11'",
#     "transformers==5.20.2; python_version < '3.11'",
#     "trl==1.16.0; python_version >= '3.11'",
#     "trl==1.14.2; python_version < '3.11'",
#     "datasets==5.2.0",
#     "accelerate==1.15.0",
#     "bitsandbytes==0.50.2",
#     "huggingface-hub==2.4.0",
#     "tensorboard==2.21.0",
#     "python-dotenv==1.2.4",
# ]
# tool.uv.index = [{ name = "pytorch", url = "https://download.pytorch.org/whl/cpu", explicit = true }]
# tool.uv.sources.torch = { index = "pytorch" }
# ///
"""Fine-tune all parameters of a causal language model, without LoRA, and save the model.

    python 03_train_full.py --model_name_or_path MODEL --dataset_name DATA [--dataset_test_split SPLIT] --output_dir out

Reads   MODEL (hub id or folder) and DATA (hub id, folder, .jsonl, .json, .csv or .parquet file) with the columns text,
        or messages, or prompt and completion. Options: trl.SFTConfig's and trl.ModelConfig's, or --config FILE.yaml.
Writes  out/model/, out/checkpoints/ (with tensorboard logs) and, at the end, out/run.json: what was trained, and how.
Ctrl-C and SIGTERM save a checkpoint, to go on with: --resume_from_checkpoint out/checkpoints/checkpoint-N.
"""

import json
import signal
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dotenv import find_dotenv, load_dotenv

load_dotenv(find_dotenv(usecwd=True))  # HF_TOKEN, HF_HOME: read by the imports below

import torch
from datasets import Dataset, load_dataset
from huggingface_hub import errors, hf_hub_download
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.loss.loss_utils import ForCausalLMLoss
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_quantization_config

# Configure fine-tuning parameters: the tutorial's. Options and --config change them.
PARAMETERS = dict(
    model_name_or_path="meta-llama/Llama-2-7b-chat-hf", dataset_name="mlabonne/guanaco-llama2-1k",
    dataset_test_split=None, output_dir="results", report_to="tensorboard",
    dtype="float32", bf16=False, gradient_checkpointing=False,  # not Llama-2's own float16, nor SFTConfig's True, True
    num_train_epochs=1, per_device_train_batch_size=4, gradient_accumulation_steps=1, max_length=1024,
    train_sampling_strategy="group_by_length", optim="paged_adamw_32bit", learning_rate=4e-5, weight_decay=0.001,
    max_grad_norm=0.3, lr_scheduler_type="constant", warmup_steps=0.03,  # 3 % of the steps; constant has no warm-up
    logging_steps=50, save_steps=50, save_total_limit=1, logging_nan_inf_filter=False,  # shows a loss that is no number
)  # fmt: skip
STEPS = "make a token at https://huggingface.co/settings/tokens, put HF_TOKEN=<token> into .env"


@dataclass
class Config(SFTConfig):
    token_metrics: bool = field(default=False, metadata={"help": "TRL's loss, in chunks, with entropy and accuracy."})


def find_origin(name: str, revision: str) -> dict:
    """Name and commit of a model on a hub; of a folder its name, or what 01_download.py noted there."""
    if (note := Path(name, "run.json")).parent.is_dir():
        return json.loads(note.read_text(encoding="utf-8"))["base_model"] if note.is_file() else {"name": name}
    try:
        return {"name": name, "revision": Path(hf_hub_download(name, "config.json", revision=revision)).parent.name}
    except errors.GatedRepoError:
        sys.exit(f"error: {name} is gated. Three steps: ask for access at https://huggingface.co/{name}, {STEPS}.")
    except Exception as error:  # no such folder, no such id, no network
        sys.exit(f"error: no model at {name!r}, a folder or a hub id: {' '.join(str(error).split())[:200]}")


def load_rows(name: str, split: str, tokenizer, args: SFTConfig) -> Dataset:
    """Rows as the trainer takes them: prompt and completion as a chat where there is a template, one BOS for texts."""
    path, data_files = (str(file.parent), file.name) if (file := Path(name).absolute()).is_file() else (name, None)
    try:
        rows = load_dataset(path, data_files=data_files, split=split)
    except (FileNotFoundError, ConnectionError, ValueError) as error:  # no such file, id, split or access, no network
        gate = f" Ask for access at https://huggingface.co/datasets/{name}, {STEPS}." if "a gated" in str(error) else ""
        sys.exit(f"error: no data set at {name!r}, hub id, folder or file: {' '.join(str(error).split())[:200]}{gate}")
    forms = (["prompt", "completion"], ["messages"], [args.dataset_text_field])
    form = next((form for form in forms if set(form) <= set(rows.column_names)), None)
    if form is None or not all(isinstance(rows[0][key], str | list) for key in form):  # nor a date, read from words
        sys.exit(f"error: {name!r} has {rows.features}: no words in row 1 as text, messages, or prompt and completion.")
    rows = rows.select_columns([*form, *({"tools"} & set(rows.column_names))])
    if args.chat_template_path:  # a file: another model's template may need tokens that this one has no embedding of
        tokenizer.chat_template = Path(args.chat_template_path).read_text(encoding="utf-8")
    if args.eos_token in tokenizer.get_vocab():  # special at once, as it is when it is loaded again
        tokenizer.add_special_tokens({"eos_token": args.eos_token})
    if isinstance(rows[0][form[0]], str):
        if form[0] == "prompt" and tokenizer.chat_template:
            roles = {"prompt": "user", "completion": "assistant"}
            return rows.map(lambda row: {key: [{"role": role, "content": row[key]}] for key, role in roles.items()})
        if tokenizer.bos_token and tokenizer("a").input_ids[0] == tokenizer.bos_token_id:  # it adds one
            return rows.map(lambda row: {form[0]: row[form[0]].removeprefix(tokenizer.bos_token)})
    return rows


class Interruption(TrainerCallback):
    """Ends a training with a checkpoint after a signal, and gives one that is gone on with the same order of rows."""

    signal = 0

    def stop(self, number, frame):
        signal.signal(number, signal.SIG_DFL)  # the same again stops at once
        self.signal = number

    def on_epoch_begin(self, args, state, control, train_dataloader, **kwargs):
        train_dataloader.batch_sampler.sampler.generator = torch.Generator().manual_seed(args.seed + int(state.epoch))

    def on_step_end(self, args, state, control, **kwargs):
        if self.signal and state.global_step < state.max_steps:
            control.should_log = control.should_save = control.should_training_stop = True


class TokenLossTrainer(SFTTrainer):
    """SFTTrainer with the mean loss of all tokens, in evaluations cross-entropy alone, and no pass more for metrics."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:  # the library takes the mean of batches, weighted by their rows
            num_items_in_batch = len(inputs["input_ids"]) * self.eval_tokens / len(self.eval_dataset)
        mixed = self.args.loss_type != "nll" or self.aux_loss_enabled or self.args.label_smoothing_factor
        if (mixed and model.training) or (self.args.token_metrics and not mixed):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.args.bf16 or self.args.device.type == "cpu":  # else all scores are kept where heads share keys
            inputs.pop("attention_mask", None)  # rows are padded on the right, where no token looks: it is faster
        labels, logits = inputs.pop("labels"), model(**inputs, use_cache=False).logits  # a cache mixes packed rows
        return ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch)


def main() -> None:
    parser = TrlParser((ScriptArguments, ModelConfig, Config), usage="%(prog)s [--OPTION VALUE]", allow_abbrev=False)
    parser.set_defaults(**PARAMETERS)
    script_args, model_args, args = parser.parse_args_and_config()
    output_dir, name = Path(args.output_dir), model_args.model_name_or_path
    args.output_dir, args.include_num_input_tokens_seen = str(output_dir / "checkpoints"), "non_padding"
    if model_args.use_peft != ("use_peft" in PARAMETERS) or Path(name, "adapter_config.json").is_file():
        sys.exit("error: LoRA: 02_train_lora.py, all weights: 03_train_full.py, an adapter first: 04_merge_adapter.py")
    most = 1 if args.packing or args.padding_free else args.per_device_train_batch_size  # packed, several are one row
    args.per_device_eval_batch_size, args.eval_packing = min(args.per_device_eval_batch_size, most), False

    # Base model, tokenizer, data
    origin = find_origin(name, model_args.model_revision)
    hub = dict(revision=origin.get("revision", "main"), trust_remote_code=args.trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(name, model_input_names=["input_ids", "attention_mask"], **hub)
    quantized = {"quantization_config": bits} if (bits := get_quantization_config(model_args)) else {}  # else its own
    if bits or model_args.dtype != "float32":
        sys.exit("error: all weights are trained, in float32. For an adapter, also on fewer bits: 02_train_lora.py")
    hub |= dict(dtype=model_args.dtype, attn_implementation=model_args.attn_implementation, device_map=args.device)
    model = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **quantized, **hub)
    if not model.generation_config.do_sample:  # beside these, which some copies of Llama-2 have, it cannot be saved
        vars(model.generation_config).update(
            dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "typical_p", "top_h"))
        )
    data, splits = script_args.dataset_name, (script_args.dataset_train_split, script_args.dataset_test_split)
    rows, held_out = (split and load_rows(data, split, tokenizer, args) for split in splits)

    # Train all parameters: the model is fresh, nothing in it is frozen or added
    router = {key: value for key, value in vars(model.config).items() if "router_" in key}
    interruption = Interruption()
    sets = dict(train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer, callbacks=[interruption])
    trainer = TokenLossTrainer(model, args, **sets)
    trainable, total = (trainer.model.num_parameters(only_trainable=only) for only in (True, False))
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")
    trainer.eval_tokens = held_out and sum(label != -100 for row in trainer.eval_dataset["labels"] for label in row[1:])
    if trainer.padding_free:  # packed rows are told apart by their positions, which not every architecture looks at
        place = torch.arange(8, device=trainer.model.device)[None] % 4
        with torch.no_grad(), trainer.accelerator.autocast():
            row, again = trainer.model.eval()(place, position_ids=place, use_cache=False).logits.chunk(2, dim=1)
        if (row - again).abs().max() > row.std() / 20:
            sys.exit(f"error: {name!r} mixes rows that are packed. Leave --packing and --padding_free out.")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interruption.stop)
    metrics = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
    if interruption.signal and trainer.state.global_step < trainer.state.max_steps:
        print(f"To go on: --resume_from_checkpoint {args.output_dir}/checkpoint-{trainer.state.global_step}")
        sys.exit(128 + interruption.signal)

    # Save the model: config, generation config, index and files of at most 5 GB
    vars(trainer.model.config).update(router)  # the trainer sets its loss in it, of a mixture of experts
    trainer.model.save_pretrained(output_dir / "model", max_shard_size="5GB")
    tokenizer.save_pretrained(output_dir / "model")
    run = {
        "base_model": origin,
        "dataset": {"name": data, "rows": len(rows)},
        "arguments": asdict(script_args) | asdict(model_args) | args.to_dict() | {"eos_token": args.eos_token},
        "parameters": {"trainable": trainable, "total": total},
        "quantization": bits and bits.to_dict(),
        "metrics": metrics | (trainer.evaluate() | {"eval_tokens": trainer.eval_tokens} if trainer.eval_tokens else {}),
        "history": trainer.state.log_history,
    }
    (output_dir / "run.json").write_text(json.dumps(run, indent=2, default=str), encoding="utf-8")


if __name__ == "__main__":
    main()
