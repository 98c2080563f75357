"""The command line, run as its users run it: exit statuses, what goes to which stream, signals, pipes."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from tilewright import AutoModelForCausalLM, AutoTokenizer, cli
from tilewright.io.pull import pull

COMMAND = [sys.executable, "-m", "tilewright.cli"]
QUESTION = "What is the capital of France?"
STORY = "Write a long story about a dragon and a princess, in twenty chapters."  # answered at length


def run(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess:
    kwargs = {"capture_output": True, "text": True, "timeout": 120, "stdin": subprocess.DEVNULL, **kwargs}
    if "input" in kwargs:
        kwargs.pop("stdin")
    return subprocess.run([*COMMAND, *arguments], **kwargs)


@pytest.fixture(scope="module", autouse=True)
def model_is_there() -> Path:
    return pull("smollm2")


def test_generate_answers_on_stdout_alone() -> None:
    done = run("generate", QUESTION)
    assert done.returncode == 0
    assert "Paris" in done.stdout
    assert done.stdout.endswith("\n")
    assert done.stderr == ""
    assert "<|im_end|>" not in done.stdout


def test_stats_and_options() -> None:
    done = run("generate", "--stats", "--threads", "1", "--max-new-tokens", "5", "--model", "smollm2", QUESTION)
    assert done.returncode == 0
    assert re.search(r"^prompt: \d+ tokens, [\d.]+ tok/s$", done.stderr, re.M)
    assert re.search(
        r"^decode: 4 tokens, [\d.]+ tok/s, [\d.]+ GB/s, \d+% of the measured [\d.]+ GB/s$", done.stderr, re.M
    )
    assert "tok/s" not in done.stdout


WRONG_USAGE = [
    [],
    ["generate"],
    ["frobnicate"],
    ["generate", "--max-new-tokens", "0", "x"],
    ["generate", "--max-new-tokens", "many", "x"],
    ["generate", "--temperature", "-1", "x"],
    ["generate", "--temperature", "nan", "x"],
    ["generate", "--quantization", "int3", "x"],
    ["generate", "--threads", "0", "x"],
    ["generate", "x", "y"],
    ["pull"],
]


@pytest.mark.parametrize("arguments", WRONG_USAGE, ids=" ".join)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: tilewright" in captured.err


FAILURES = [
    (["generate", "--model", "no-such-model", "x"], "no-such-model"),
    (["generate", "--model", "smollm2", "--quantization", "int4", "x"], "already quantised"),
    (["generate", "--model", __file__, "x"], "GGUF"),
    (["pull", "no-such-model"], "expected one of smollm2"),
]


@pytest.mark.parametrize(("arguments", "message"), FAILURES, ids=lambda value: str(value)[:50])
def test_failures_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"tilewright: error: .*\n", captured.err)
    assert message in captured.err


def test_help_info_pull(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("generate", "chat", "bench", "pull", "info"))
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(": " in line for line in lines)
    assert any(line.startswith("isa: ") for line in lines)
    assert cli.main(["pull", "smollm2"]) == 0
    assert capsys.readouterr().out.strip() == str(pull("smollm2"))


def test_bench_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    import tilewright

    received = []
    bench = types.SimpleNamespace(main=lambda argv: received.append(argv) or 0)
    monkeypatch.setitem(sys.modules, "tilewright.bench", bench)
    monkeypatch.setattr(tilewright, "bench", bench, raising=False)
    assert cli.main(["bench", "linear", "--shapes", "x", "--help"]) == 0
    assert received == [["linear", "--shapes", "x", "--help"]]


def test_folder_model_with_quantization(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A folder without a chat template: the prompt goes in as it is."""
    tokenizer = AutoTokenizer.from_pretrained(pull("smollm2"))
    tokenizer.chat_template = {}
    tiny.save(tmp_path, "llama", vocab_size=len(tokenizer))
    monkeypatch.setattr("tilewright.AutoTokenizer.from_pretrained", lambda path: tokenizer)
    seen = {}
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        "tilewright.AutoModelForCausalLM.from_pretrained", lambda path, **kw: seen.update(kw) or load(path, **kw)
    )
    arguments = ["generate", "--model", str(tmp_path), "--quantization", "int8", "--max-new-tokens", "4", "Hi"]
    assert cli.main(arguments) == 0
    assert seen["quantization"] == "int8"
    greedy = capsys.readouterr().out
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == greedy
    torch.manual_seed(0)
    assert cli.main([*arguments[:-1], "--temperature", "5", "Hi"]) == 0
    assert capsys.readouterr().out != greedy


def test_text_streams_and_ctrl_c_leaves() -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", "--max-new-tokens", "4000", STORY],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        first = os.read(process.stdout.fileno(), 1)  # long before the answer is complete
        assert first
        time.sleep(0.2)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_reader_that_goes_away() -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", "--max-new-tokens", "400", STORY],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        os.read(process.stdout.fileno(), 1)
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
    assert err == b""


def test_chat_from_a_pipe() -> None:
    done = run("chat", "--max-new-tokens", "24", input=f"{QUESTION}\n\nAnd of Italy?\n")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "Paris" in done.stdout
    assert "Rome" in done.stdout
    assert ">" not in done.stdout


def test_chat_turns_equal_fresh_conversations() -> None:
    """The cache that is carried from turn to turn changes nothing."""
    messages = ["My name is Ada.", "What is my name?", "Thank you."]
    out = run("chat", "--max-new-tokens", "16", input="\n".join(messages)).stdout
    path = pull("smollm2")
    model = AutoModelForCausalLM.from_pretrained(path, activation=cli._ACTIVATION)
    tokenizer = AutoTokenizer.from_pretrained(path)
    conversation: list[dict[str, str]] = []
    expected = ""
    for message in messages:
        conversation.append({"role": "user", "content": message})
        batch = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt")
        ids = model.generate(**batch, max_new_tokens=16)[0, batch["input_ids"].shape[1] :]
        answer = tokenizer.decode(ids, skip_special_tokens=True)
        conversation.append({"role": "assistant", "content": answer})
        expected += answer + "\n"
    assert out == expected


def test_chat_on_a_terminal() -> None:
    """Ctrl-C stops an answer, not the chat; Ctrl-C at the prompt leaves with 130."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen([*COMMAND, "chat"], stdin=slave, stdout=slave, stderr=slave, env=environment,
                               start_new_session=True)  # fmt: skip
    os.close(slave)
    seen = b""

    def wait_for(pattern: bytes, seconds: float = 60) -> None:
        nonlocal seen
        end = time.monotonic() + seconds
        while not re.search(pattern, seen):
            assert time.monotonic() < end, seen
            if select.select([master], [], [], 0.1)[0]:
                seen += os.read(master, 4096)
        seen = b""

    try:
        wait_for(b"> ")
        os.write(master, f"{STORY}\n".encode())
        wait_for(rb"chapters\.\r\n.+")
        process.send_signal(signal.SIGINT)
        wait_for(b"> ")
        os.write(master, f"{QUESTION}\n".encode())
        wait_for(rb"France\?\r\n[\s\S]+\n[^\n]*> ")  # the prompt after the answer: the echo repeats the one before it
        # A signal between the prompt and readline's wait for input is noticed with the next one only.
        for _ in range(6):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
                break
        assert process.returncode == 130
    finally:
        process.kill()
        os.close(master)
