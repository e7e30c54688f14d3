"""make gpu-check: every step on the CPU, on a tiny model; and what it judges, on figures that are made up."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, Process


@pytest.fixture
def check(monkeypatch, tmp_path):
    """bench/gpu_check.py, whose processes have imported their libraries already; main(ARGUMENTS) runs it here."""

    class Fork:
        def __init__(self, command, cwd=tmp_path, **options):
            self.command, self.cwd, self.returncode = command, cwd, 0

        def communicate(self, timeout) -> tuple[str, str]:
            if "00_check_gpu.py" in self.command[1]:  # whose probes are processes: tests/test_check_gpu.py
                Path(self.command[3]).write_text(json.dumps(DOCTOR))
                return "", ""
            result = Process(Path(self.command[1]), self.command[2:], self.cwd).wait()
            self.returncode = result.returncode
            return result.stdout, result.stderr

    monkeypatch.setattr("os.cpu_count", lambda: 1)  # the process that forks answers one at a time
    defined = SimpleNamespace(**runpy.run_path(str(ROOT / "bench/gpu_check.py")))
    names = defined.main.__globals__
    monkeypatch.setitem(names, "subprocess", SimpleNamespace(Popen=Fork, PIPE=None, TimeoutExpired=TimeoutError))
    monkeypatch.setitem(names, "look_for_torch", lambda args: None)  # which is there

    def main(*args) -> dict:
        given = ["--size", "tiny", "--device", "cpu", "--output_dir", tmp_path / "check", *args]
        monkeypatch.setattr("sys.argv", ["gpu_check.py", *map(str, given)])
        defined.status, before = 0, set((tmp_path / "check").glob("gpu*.json"))
        try:
            defined.main()
        except SystemExit as stop:
            defined.status = stop.code
        for file in set((tmp_path / "check").glob("gpu*.json")) - before:
            return json.loads(file.rename(file.with_suffix(".read")).read_text())
        return {}

    defined.names, defined.run_main = names, main
    return defined


DOCTOR = {
    "verdict": "ready, with warnings", "python": "3.12", "findings": [{"cause": "scipy is missing"}],
    "torch": {"version": "2.13.0+cpu", "gpus": []}, "system": {"nvidia": {}},
    "probes": {"matmul_fp32": {"status": "passed"}, "attention": {"status": "passed"}},
}  # fmt: skip


def test_each_step_is_walked_on_the_cpu(check, tmp_path):
    report = check.run_main()
    rows = {f"{row['step']}: {row['what']}": row for row in report["rows"]}
    bad = [f"{name}: {row['found']}" for name, row in rows.items() if row["good"] is False]
    assert check.status == 0 and report["good"] and not bad, "\n".join(bad)
    # The default, and each optimizer and recipe, is stopped and gone on with.
    for name in check.TRAININGS:
        assert rows[f"tiny: {name}"]["good"] and rows[f"tiny: {name}, stopped and gone on with"]["value"] <= 1e-3
    assert rows["tiny: different answers in float32"]["value"] == 1
    for name in ("fast", "default", "QLoRA", "full fast"):
        found = rows[f"wide: {name}"]["value"]
        assert found["tokens_per_second"] > 0 and found["share"] > 0 and found["allocated"] > 2**27
        assert rows[f"wide: {name}"]["good"] is None  # of a CPU no speed is judged
    assert len(rows["wide: fast"]["value"]["losses"]) == 40 and rows["wide: fast, loss"]["good"]
    for dtype in ("float32", "bfloat16"):
        assert rows[f"answers: adapter, {dtype}"]["value"]["tokens"] > 2
    table = (tmp_path / "check/gpu.md").read_text()
    assert all(f"| {row['step']} | {row['what']} |" in table for row in report["rows"])
    stopped = (tmp_path / "check/gpu/tiny-LoRA-stopped143.log").read_text()
    assert "Type the same command again" in stopped and "status 143 after" in stopped
    assert report["doctor"]["verdict"] == "ready, with warnings"
    assert "scipy is missing" in rows["doctor: verdict"]["found"]
    judged = [row["good"] for row in report["rows"] if row["good"] is not None]
    assert f"{len(judged)} of {len(judged)} are as they should be. Speed and memory are judged on an acc" in table
    assert "| 0.4 of the measured peak | not judged |" in table


def test_what_fails_or_takes_too_long_is_a_row_and_not_the_end(check, tmp_path, monkeypatch):
    def broken(check):
        raise KeyError("tokens")

    monkeypatch.setitem(check.names, "subprocess", subprocess)
    monkeypatch.setitem(check.STEPS, "kernels", lambda check: check.run("broken", "-c", "1/0", limit=20))
    monkeypatch.setitem(check.STEPS, "tiny", broken)
    monkeypatch.setitem(
        check.STEPS, "wide", lambda check: check.run("slow", "-c", "import time; time.sleep(60)", limit=5.5)
    )
    monkeypatch.setitem(check.STEPS, "answers", lambda check: check.say("the end", "reached"))
    report = check.run_main("--only", "kernels", "tiny", "wide", "answers")
    found = {row["step"]: row["found"] for row in report["rows"]}
    assert "ZeroDivisionError: division by zero (kernels-broken.log)" in found["kernels"]
    assert (found["tiny"], found["answers"]) == ("KeyError('tokens')", "reached")
    assert "it did not end within 6 s (wide-slow.log)" in found["wide"] or "within 5 s" in found["wide"]
    assert check.status.startswith("error: not as it should be: kernels: kernels; tiny: tiny; wide: wide.")
    assert "status no end after" in (tmp_path / "check/gpu-kernels-tiny-wide-answers/wide-slow.log").read_text()
    report = check.run_main("--only", "kernels", "answers", "--minutes", "0.05")
    assert (
        "left out: the 0.05 minutes are over (--minutes)" in report["rows"][0]["found"]
        and report["rows"][1]["good"] is None
    )


def wide(**others) -> dict:
    """What a training of the wide model found: within each limit, but for others."""
    found = {"tokens_per_second": 14000, "longest": {"tokens": 4096, "seconds": 0.15}, "tflops": 400.0, "share": 0.65}
    found |= {"losses": [10.0] * 20 + [9.0] * 20, "step_seconds": [0.1] * 40}
    found |= {"new_over_known": 1.1, "allocated": 10 * 2**30, "reserved": 11 * 2**30, "predicted": 10 * 2**30}
    return found | others


@pytest.mark.parametrize(
    ("kind", "others", "bad"),
    [
        ("fast", {}, []),
        ("fast", {"share": 0.3}, ["fast"]),
        ("default", {"share": 0.5}, ["default"]),
        ("fast", {"losses": [9.0] * 40}, ["fast, loss", "fast beside the default, loss of 11 steps"]),
        ("fast", {"new_over_known": 1.5}, ["fast, a new length over a known one"]),
        ("default", {"losses": [10.1] * 11}, ["fast beside the default, loss of 11 steps"]),
        ("full fast", {"allocated": 10.9 * 2**30}, ["full fast, memory"]),
        ("QLoRA", {"allocated": 9.1 * 2**30, "reserved": 9.3 * 2**30}, ["QLoRA, memory"]),
        ("full fast", {"reserved": 11.6 * 2**30}, ["full fast, reserved"]),
    ],
)
def test_what_is_beyond_its_limit_is_said(kind, others, bad, check, monkeypatch, tmp_path):
    def train(check, name, *how):
        return wide(losses=[10.0] * 40 if name != "fast" else wide()["losses"]) | (others if name == kind else {})

    monkeypatch.setitem(check.names, "train_wide", train)
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--output_dir", str(tmp_path)])
    one = check.Check(check.parse_arguments(), tmp_path)
    check.check_wide(one)
    loss = [row for row in one.rows if row["what"] in ("default, loss", "QLoRA, loss", "full fast, loss")]
    for row in loss:  # 40 equal losses here, for the mean of the first eleven
        one.rows.remove(row)
    assert [row["what"] for row in one.rows if row["good"] is False] == bad
    assert all(row["good"] is not None for row in one.rows if row["limit"])  # on an accelerator all is judged


def test_operations_are_those_that_the_bench_counts(check, monkeypatch, tmp_path):
    from transformers import LlamaConfig

    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    count = runpy.run_path(str(ROOT / "bench/train_speed.py"))["count_flops"]
    sizes = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, vocab_size=500)
    config = LlamaConfig(**sizes, num_key_value_heads=2)
    config.save_pretrained(tmp_path)
    for full in (False, True):
        ours = check.count_operations(config.to_dict(), [4, 48], full, ["q_proj", "v_proj"])
        assert ours == pytest.approx(count(tmp_path, [48] * 4, full), rel=1e-6)


def test_wheels_are_carried_along(check, tmp_path, monkeypatch):
    info = "carried-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "print('carried along')\n")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setitem(check.names, "subprocess", subprocess)
    monkeypatch.setitem(check.STEPS, "kernels", lambda check: check.run("import", "-c", "import carried", limit=20))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert "No module named 'carried'" in check.run_main("--only", "kernels")["rows"][0]["found"]
    assert check.run_main("--only", "kernels", "--wheels", tmp_path)["good"]
    assert "carried along" in (tmp_path / "check/gpu-kernels/kernels-import.log").read_text()
    check.run_main("--only", "kernels", "--wheels", tmp_path / "none")
    assert check.status.startswith("error: no wheels in ")


def test_without_an_environment_it_runs_on_the_python_that_is_named():
    command = ["make", "-n", "gpu-check", "VENV=.venv-none", "PYTHON=python3.99", "ARGS=--size tiny --device cpu"]
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    assert printed.strip() == "python3.99 bench/gpu_check.py --output_dir outputs/check --size tiny --device cpu"


@pytest.mark.parametrize(
    ("torch", "said"),
    [
        (
            "class cuda:\n    is_available = lambda: False\n",
            "PyTorch finds no accelerator. Type: make check-gpu, or add",
        ),
        (
            "raise ImportError('libcudart')\n",
            "has no PyTorch that works. Type: make setup, or name one that has: PYTHON=",
        ),
    ],
)
def test_without_torch_or_an_accelerator_nothing_begins(torch, said, tmp_path):
    (tmp_path / "torch.py").write_text(torch)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / "bench/gpu_check.py", "--output_dir", tmp_path / "check"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and said in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "check").exists()


def test_the_casts_that_a_variant_keeps_are_kept(check, tmp_path):
    (tmp_path / "script.py").write_text(
        "import sys, torch\nfrom peft import LoraConfig, get_peft_model\n"
        "model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), LoraConfig(target_modules=['0']))\n"
        "model.apply(lambda layer: vars(layer).update(cast_input_dtype_enabled=False))\n"
        "print(sys.argv, model.base_model.model[0].cast_input_dtype_enabled)\n"
    )
    for before, kept in ((["-c", check.PATCHES["casts"] + check.RUN], True), ([], False)):
        command = [sys.executable, *before, tmp_path / "script.py", "--option"]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert printed == f"{[str(tmp_path / 'script.py'), '--option']} {kept}\n"


def test_variants_are_set_beside_the_recipe_fast(check, monkeypatch):
    asked = []

    def train(check, name, script, options, steps, *before, **environment):
        asked.append((name, options, steps, before[:1], environment))
        return wide(tokens_per_second=7000 if name == "packing" else 14000)

    monkeypatch.setitem(check.names, "train_wide", train)
    monkeypatch.setitem(check.STEPS, "kernels", lambda check: None)
    report = check.run_main("--variants")
    found = {row["what"]: row["found"] for row in report["rows"]}
    assert check.status == 0 and found["packing"].startswith("0.50 of fast, 7,000 tokens/s, 10.00 GiB")
    assert [name for name, *_ in asked] == ["fast", *check.VARIANTS]
    how = {name: rest for name, *rest in asked}
    assert how["cuDNN's attention first"][3] == {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "0"}
    assert how["layers compiled"][2] == ("-c",) and how["packing"][1] == 40
    assert how["PEFT's casts kept"][2] == ("-c",) and how["batches of 16"][1] == 10


def judged(check, monkeypatch, tmp_path, files: dict, step, *given) -> list[str]:
    """What a step finds not to be as it should, on an accelerator, where its commands would write these files."""
    monkeypatch.setattr("sys.argv", ["gpu_check.py", "--output_dir", str(tmp_path)])
    one = check.Check(check.parse_arguments(), tmp_path)
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    monkeypatch.setattr(one, "run", lambda *command, **how: None)
    step(one, *given)
    return [row["what"] for row in one.rows if row["good"] is False]


def kernels(new: float, finite: bool) -> dict:
    times = {
        kind: {"new": [[new, 1.0]] * 5, "again": [[1.0, 1.0]] * 5, "finite": finite} for kind in ("causal", "masked")
    }
    times["decoding"] = {"new": [0.1] * 20, "again": [0.1] * 20}
    attention = times
    found = {
        "machine": "x",
        "tflops": {"bfloat16": 800.0},
        "data_sheet": {"bfloat16": 1000},
        "copy_gb_per_second": 3000,
    }
    return found | {"attention": attention}


@pytest.mark.parametrize(
    ("new", "finite", "bad"),
    [(2.0, True, []), (50.0, True, ["attention, as run_step.py sets it: ms at a new length and again"]),
     (2.0, False, ["gradients of attention"])],
)  # fmt: skip
def test_kernels_are_judged_in_the_order_that_is_set(new, finite, bad, check, monkeypatch, tmp_path):
    files = {"kernels.json": kernels(new, finite)}
    assert judged(check, monkeypatch, tmp_path, files, check.check_kernels) == bad


@pytest.mark.parametrize(("slowest", "bad"), [(0.04, []), (0.06, ["adapter"])])
def test_tokens_behind_the_kernels_are_judged(slowest, bad, check, monkeypatch, tmp_path):
    times = [1.0, 0.5, *[0.01] * 30, slowest]  # the first load kernels
    files = {"answers.json": {"token_seconds": times, "first_token_at": 9.0}}
    assert judged(check, monkeypatch, tmp_path, files, check.answer, "adapter") == bad


def test_probes_of_kernels_that_fail_are_judged(check, monkeypatch, tmp_path):
    broken = DOCTOR | {"probes": {"attention": {"status": "failed", "error": "off by nan"}}}
    assert judged(check, monkeypatch, tmp_path, {"doctor.json": broken}, check.check_doctor) == ["probes"]


@pytest.mark.parametrize(
    ("whole", "stopped", "ends", "bad"),
    [
        ([3.0, 2.0], [3.0, 2.0005], [2.0, 2.0], []),
        ([3.0, 3.1], [3.0, 3.1], [2.0, 2.0], ["LoRA"]),
        ([3.0, 2.0], [3.0, 2.01], [2.0, 2.0], ["LoRA, stopped and gone on with"]),
        ([3.0, 2.0], [3.0, 2.0], [2.0, 2.01], ["LoRA, stopped and gone on with"]),
    ],
)
def test_trainings_on_kernels_of_a_card_are_judged(whole, stopped, ends, bad, check, monkeypatch, tmp_path):
    files = {}
    for name, losses, end in (("whole", whole, ends[0]), ("stopped", stopped, ends[1])):
        history = [{"step": number, "loss": loss} for number, loss in enumerate(losses)]
        files[f"runs/LoRA-{name}/run.json"] = {"history": history, "metrics": {"eval_loss": end}, "sha256": {}}
    assert judged(check, monkeypatch, tmp_path, files, check.train_twice, "LoRA", {}) == bad


@pytest.mark.parametrize(
    ("answer", "measured", "bad"),
    [
        ("yes", 2.0, []),
        ("no", 2.0, ["different answers in float32"]),
        ("yes", 2.001, ["evaluate"]),
    ],
)
def test_answers_and_measured_losses_behind_the_kernels_are_judged(answer, measured, bad, check, monkeypatch, tmp_path):
    files = {f"{kind} {script} {dtype}.jsonl": {"answer": "yes"} for kind in ("adapter", "merged")
             for script in ("05", "06") for dtype in ("float32", "bfloat16")}  # fmt: skip
    files["merged 06 float32.jsonl"] = {"answer": answer}
    models = [
        {"name": "base", "loss": 3.0},
        {"name": "LoRA-whole", "loss": measured},
        {"name": "full-whole", "loss": 2.0},
    ]
    files["evaluation/evaluation.json"] = {"models": models}
    files |= {f"runs/{name}-whole/run.json": {"metrics": {"eval_loss": 2.0}} for name in ("LoRA", "full")}
    monkeypatch.setitem(check.names, "train_twice", lambda *given: None)
    assert judged(check, monkeypatch, tmp_path, files, check.check_tiny) == bad


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_what_runs_and_leaves_what_was_found(number, tmp_path):
    script = (ROOT / "bench/gpu_check.py").read_text().replace("Path(__file__)", f"Path({str(ROOT / 'bench/x')!r})")
    steps = """
def rest(check):
    check.say("found", "before")
    Path("began").touch()
    check.run("rest", "-c", "import os; os.system('sleep 99')", limit=60)
STEPS["kernels"] = rest
"""  # fmt: skip
    (tmp_path / "check.py").write_text(
        script.replace('if __name__ == "__main__":', steps + 'if __name__ == "__main__":')
    )
    (tmp_path / "temporary").mkdir()
    command = [
        sys.executable,
        "check.py",
        "--size",
        "tiny",
        "--device",
        "cpu",
        "--only",
        "kernels",
        "--output_dir",
        "out",
    ]
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary"), "MARK": str(tmp_path)}
    # Not in the memory, where this machine has much of it
    (tmp_path / "check.py").write_text((tmp_path / "check.py").read_text().replace("/dev/shm", "/dev/none"))
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "began").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 128 + number
    rows = json.loads((tmp_path / "out/gpu-kernels.json").read_text())["rows"]
    assert rows[0]["found"] == "before" and not any((tmp_path / "temporary").iterdir())
    mark = f"MARK={tmp_path}".encode()
    left = [file for file in Path("/proc").glob("[0-9]*/environ") if mark in read_quietly(file)]
    assert not left


def read_quietly(file: Path) -> bytes:
    """What a file of a process holds, which may be over or another user's."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, ROOT / "bench/gpu_check.py", "--device", "cpu", "--output_dir", tmp_path / "file"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "give another folder: --output_dir FOLDER" in result.stderr


def test_the_layers_that_a_variant_compiles_are_compiled_for_any_length(check, tmp_path, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer

    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=9)
    model, compiled = LlamaForCausalLM(LlamaConfig(**sizes)), []
    monkeypatch.setattr("torch.nn.Module.compile", lambda layer, **how: compiled.append((type(layer).__name__, how)))
    monkeypatch.setattr(Trainer, "train", lambda trainer: "trained")
    exec(check.PATCHES["compiled"], {})
    assert Trainer.train(SimpleNamespace(model=model)) == "trained"
    assert compiled == [("LlamaDecoderLayer", {"dynamic": True})] * 2
