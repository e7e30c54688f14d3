"""Ask a server as its users would, and worse, and compare its answers with those of `make infer`.

    python check_serve.py --probe probe.json --output serve.json -- python serve.py OPTIONS

Reads   probe.json of probe.py. Starts the command after --, on a free port and with a key of its own, and ends it.
Writes  serve.json and serve.md: what was asked, what came of it, the answers side by side; with --load the figures
        under load, beside those of our own generation. Needs the client of OpenAI, which vLLM brings along.

Exit status 1 where something was not as it should be. A greedy answer may differ from the first token on whose margin
is smaller than rounding in that type.
"""

import contextlib
import math
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
from folders import fail, make_parser, read_json, write_json, write_text

ROUNDING = {"float32": 0.01, "float16": 0.1, "bfloat16": 0.5}  # nats, between two ways to compute the same
ANSWERED = "the next request is answered"


class Server:
    """The command under test, on a port of its own."""

    def __init__(self, command: list[str], probe: dict):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.command, self.probe, self.key = command, probe, secrets.token_hex(16)
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=120)

    def start(self, patience: float = 600) -> float:
        """Seconds until it answers."""
        began = time.monotonic()
        environment = os.environ | {"API_KEY": self.key}
        self.process = subprocess.Popen([*self.command, "--port", str(self.port)], env=environment, stdout=sys.stderr)
        while True:
            with contextlib.suppress(OSError):
                if urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200:
                    models = self.client.models.list().data
                    self.name, self.length = models[-1].id, models[0].model_dump()["max_model_len"]
                    return time.monotonic() - began
            if self.process.poll() is not None:
                fail("the server did not start: see its own words above.")
            if time.monotonic() - began > patience:
                self.end()
                fail(f"the server did not answer within {patience:.0f} s. Its log is named above.")
            time.sleep(0.5)

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()  # vLLM ends with it

    def processes(self) -> list[int]:
        """Ids of vLLM's processes: those of the group that the server's child leads."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(child) for child in children]

    def ask(self, prompt: str | list, **options):
        """The server's answer: a choice, or with stream=True chunks. Greedy, as short as in the probe."""
        options = {"model": self.name, "temperature": 0, "max_tokens": self.probe["max_new_tokens"]} | options
        if self.probe["chat"]:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return self.client.chat.completions.create(messages=messages, **options)
        return self.client.completions.create(prompt=prompt, **options)

    def ask_probe(self, number: int, **options):
        """The answer to a prompt of the probe."""
        each = self.probe["prompts"][number]
        return self.ask(each["messages"] if self.probe["chat"] else each["prompt"], **options)

    def post(self, body: bytes, key: str, path: str = "/v1/chat/completions") -> tuple[int, str]:
        """Status and text that came of a body, which need not be right."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"{self.url}{path}", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def text_of(answer) -> str:
    """The words of an answer, also of a chunk of one."""
    if not answer.choices:
        return ""
    choice = answer.choices[0]
    part = choice if hasattr(choice, "text") else getattr(choice, "message", None) or choice.delta
    return (part.text if part is choice else part.content) or ""


def compare(server: Server) -> list[dict]:
    """Each prompt of the probe, asked alone: the same tokens went in, and the same came out?"""
    pairs = []
    for number, each in enumerate(server.probe["prompts"]):
        answer = server.ask_probe(number, extra_body={"return_token_ids": True})
        choice, whole = answer.choices[0].model_dump(), answer.model_dump()
        ours, theirs = each["answer_ids"], choice["token_ids"]
        pair = {"prompt": each["messages"][-1]["content"], "infer": each["answer"], "server": text_of(answer)}
        pair["same_prompt"] = each["prompt_ids"] == (whole.get("prompt_token_ids") or choice["prompt_token_ids"])
        pair["tokens"] = len(ours)
        if ours != theirs:
            place = next(
                (at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
            )
            pair["differs_at"] = place + 1
            pair["margin"] = each["margins"][place] if place < len(ours) else math.inf  # it does not end
        pairs.append(pair)
    return pairs


def check_requests(server: Server, alone: list[str]) -> dict[str, str]:
    """What was tried beside single questions; an entry that does not begin with "ok" went wrong."""
    results, count = {}, len(alone)

    def judge(name: str, right: bool, words: str) -> None:
        results[name] = f"{'ok' if right else 'WRONG'}: {words}"

    def again(name: str, right: bool, words: str) -> None:
        began, answered = time.monotonic(), text_of(server.ask_probe(0)) == alone[0]
        judge(
            name,
            right and answered,
            f"{words}; {ANSWERED if answered else 'NOT ' + ANSWERED}, {time.monotonic() - began:.1f} s",
        )

    chunks = [text_of(chunk) for chunk in server.ask_probe(0, stream=True)]
    judge("streamed", "".join(chunks) == alone[0], f"the same answer, in {len(chunks)} parts")
    with ThreadPoolExecutor(count) as pool:
        together = [text_of(answer) for answer in pool.map(server.ask_probe, range(count))]
    same = sum(a == b for a, b in zip(together, alone, strict=True))
    judge("several at once", all(together), f"{count} asked, {same} of them answered as alone")
    word = alone[0].split()[len(alone[0].split()) // 2]
    stopped = server.ask_probe(0, stop=[word])
    right = text_of(stopped) == alone[0].split(word)[0] and stopped.choices[0].finish_reason == "stop"
    judge("a stop", right, f"stop={word!r} ends the answer before it")

    words = server.length // 2 - 64  # " a b" are two tokens wherever words are
    answer = server.ask("a b " * words, max_tokens=8)
    judge(
        "a long prompt", answer.usage.completion_tokens > 0, f"{answer.usage.prompt_tokens} of {server.length} tokens"
    )
    try:
        server.ask("a b " * server.length, max_tokens=8)
        again("a prompt that is too long", False, "answered")
    except openai.BadRequestError as error:
        again("a prompt that is too long", True, f"refused with {error.status_code}")
    status, _ = server.post(b'{"model": "', server.key)
    again("broken JSON", status == 400, f"status {status}")
    paths = ("/v1/chat/completions", "/invocations", "/tokenize")  # vLLM by itself guards the first alone
    refused = [server.post(b"{}", "not the key", path)[0] for path in paths]
    again("a wrong key", set(refused) == {401}, f"status {refused} of {', '.join(paths)}")
    stream = server.ask_probe(0, stream=True, max_tokens=server.length // 2, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    again("a client that goes away", True, "in the middle of an answer")
    return results


def put_under_load(server: Server, at_once: int, patience: float) -> dict:
    """Asks what the probe answered in batches, streamed, so many at once; after patience seconds no more is asked."""
    prompts, began = server.probe["load"]["prompts"], time.monotonic()

    def ask(prompt) -> tuple[float, int] | None:
        asked, first, tokens = time.monotonic(), None, 0
        if asked - began > patience:
            return None
        with contextlib.suppress(openai.OpenAIError):
            for chunk in server.ask(prompt, stream=True, stream_options={"include_usage": True}):
                first = first or (text_of(chunk) and time.monotonic() - asked) or None
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        return (first, tokens) if first and tokens else None

    with ThreadPoolExecutor(at_once) as pool:
        done = [each for each in pool.map(ask, prompts) if each]
    return {
        "requests": len(prompts),
        "answered": len(done),
        "at_once": at_once,
        "tokens": sum(tokens for _, tokens in done),
        "seconds": time.monotonic() - began,
        "first_token": [first for first, _ in done],
    }


def count_alive(group: int) -> int:
    """Processes of a group that have not ended."""
    count = 0
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # one that has just ended
            state, _, its_group = file.read_text().rpartition(")")[2].split()[:3]
            count += its_group == str(group) and state not in "ZX"
    return count


def kill(server: Server) -> str:
    """Kills vLLM while it answers: clients hear of it, nothing stays behind, and it can be started again."""
    alone, groups = text_of(server.ask_probe(0)), server.processes()
    with ThreadPoolExecutor(4) as pool:
        long = {"max_tokens": server.length // 2, "extra_body": {"ignore_eos": True}}
        waiting = [pool.submit(server.ask_probe, 0, **long) for _ in range(4)]
        time.sleep(2)
        began = time.monotonic()
        for child in groups:
            os.kill(child, signal.SIGKILL)
        told = sum(isinstance(each.exception(60), openai.APIConnectionError) for each in waiting)
    seconds, status = time.monotonic() - began, server.process.wait(60)
    left = sum(map(count_alive, groups))
    started = server.start()
    right = told == 4 and status and left == 0 and text_of(server.ask_probe(0)) == alone
    words = f"{told} of 4 clients were told within {seconds:.1f} s, {left} processes stayed behind"
    return f"{'ok' if right else 'WRONG'}: {words}; started again in {started:.0f} s, {ANSWERED}"


def format_report(report: dict) -> str:
    """The report as Markdown."""
    lines = [f"# {report['name']}, served by vLLM {report['vllm']}", "", "| asked | came of it |", "| --- | --- |"]
    lines += [f"| {name} | {words} |" for name, words in report["requests"].items()]
    lines += ["", "| prompt | make infer | vLLM | |", "| --- | --- | --- | --- |"]
    for pair in report["answers"]:
        verdict = f"the same {pair['tokens']} tokens"
        if "differs_at" in pair:
            verdict = f"differs from token {pair['differs_at']} on, whose margin is {pair['margin']:.4f}"
        if not pair["same_prompt"]:
            verdict += "; ANOTHER PROMPT went in"
        cells = [" ".join(str(pair[key]).split()).replace("|", "\\|") for key in ("prompt", "infer", "server")]
        lines.append(f"| {' | '.join(cells)} | {verdict} |")
    if "load" in report:
        head = "| | answered | tokens/s | seconds | first token, median | 99th percentile |"
        lines += ["", "{requests} requests, {at_once} at once:".format(**report["load"]["vLLM"]), "", head]
        lines.append("| --- | --- | --- | --- | --- | --- |")
        for name, each in report["load"].items():
            speed, first = each["tokens"] / each["seconds"], sorted(each["first_token"])
            late = first[min(len(first) - 1, int(0.99 * len(first)))]
            lines.append(
                f"| {name} | {each.get('answered', each['requests'])} of {each['requests']} | {speed:.0f} "
                f"| {each['seconds']:.1f} | {statistics.median(first):.2f} s | {late:.2f} s |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--probe", type=Path, required=True, help="probe.json of the same model")
    add("--output", type=Path, default=Path("serve.json"), help="file to write; the report as text goes beside it")
    add(
        "--load", action="store_true", help="ask what the probe answered in batches, many at once; then kill the server"
    )
    add("--patience", type=float, default=900, help="seconds after which no more is asked under load (default: 900)")
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, options = parser.parse_known_args(sys.argv[1:place])  # others are for the server
    if not (command := sys.argv[place + 1 :]):
        fail("no command that starts a server, after --. Type: make serve-check")
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1"
    probe = read_json(args.probe)
    if args.load and "load" not in probe:
        fail(f"{args.probe} has no questions for --load. Make it anew: probe.py --load 200")
    server = Server([*command, *options], probe)
    try:
        started = server.start()
        report = {"name": server.name, "vllm": __import__("vllm").__version__, "seconds_to_start": started}
        report["answers"] = compare(server)
        report["requests"] = check_requests(server, [pair["server"] for pair in report["answers"]])
        if args.load:
            ours = probe["load"] | {"prompts": None}
            report["load"] = {
                "vLLM": put_under_load(server, ours["at_once"], args.patience),
                "05_generate.py, in batches": ours,
            }
            report["requests"]["a server that is killed"] = kill(server)
    finally:
        server.end()
    write_json(args.output, report)
    write_text(args.output.with_suffix(".md"), format_report(report))
    print(format_report(report))
    limit = ROUNDING[probe["dtype"]]
    wrong = [f"{name}: {words}" for name, words in report["requests"].items() if not words.startswith("ok")]
    for pair in report["answers"]:
        if not pair["same_prompt"] or pair.get("margin", 0) > limit:
            wrong.append(f"the answer to {pair['prompt']!r} is another")
    if args.load and report["load"]["vLLM"]["answered"] < report["load"]["vLLM"]["requests"]:
        wrong.append("not all were answered under load")
    if wrong:
        fail(f"{'; '.join(wrong)}. The report is {args.output.with_suffix('.md')}")


if __name__ == "__main__":
    main()
