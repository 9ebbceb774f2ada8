"""The command line: what it prints, its JSON, wrong arguments."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pykvcache import cli, ops
from pykvcache.bench import demo as bench_demo
from pykvcache.bench import models
from pykvcache.bench.timing import WrongResult

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--batch", "3", "--max-new-tokens", "4")


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's own model is too large for a unit test."""
    monkeypatch.setattr(
        bench_demo,
        "load_model",
        lambda name, dtype: models.build_llama(32, 64, 2, 4, 2, 128, dtype),
    )


def test_module_runs_as_a_program(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pykvcache", "info"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0
    assert result.stderr == ""
    assert f"torch              {torch.__version__}" in result.stdout


def test_interrupt_while_it_starts(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Starting:
        def __getattr__(self, name: str) -> object:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "pykvcache.cli.app", Starting())
    assert cli.main() == 130
    assert capsys.readouterr().err == "pykvcache: interrupted\n"


def test_interrupt_while_the_command_is_built(run_command, monkeypatch) -> None:
    def interrupted(app: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("typer.main.get_command", interrupted)
    assert run_command("info") == (130, "", "pykvcache: interrupted\n")


def test_full_disk_is_one_line(run_command, tiny_model) -> None:
    code, _, err = run_command("demo", *TINY, "--json", "/dev/full")
    assert code == 1 and "No space left" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--json", "/tmp"), "--json: /tmp is a folder"),
        (("--plot", "d.xyz"), "--plot must end in .png"),
        (("--plot", "/proc/x.png"), "--plot: /proc/x.png cannot be written"),
    ],
)
def test_demo_finds_wrong_files_first(
    run_command, arguments: tuple[str, ...], message: str
) -> None:
    code, _, err = run_command("demo", *arguments)
    assert code == 2 and message in err and err.count("\n") == 1


def test_info_names_every_backend_and_its_state(run_command) -> None:
    code, out, _ = run_command("info")
    assert code == 0
    for name, status in ops.backends().items():
        assert f"backend {name}" in out
        assert status.split(";")[0] in out


def test_info_json(run_command) -> None:
    code, out, _ = run_command("info", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["backends"] == ops.backends()
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()


def test_demo_compares_and_draws(run_command, tiny_model, tmp_path: Path) -> None:
    picture = tmp_path / "blocks.png"
    code, out, err = run_command("demo", *TINY, "--plot", str(picture))
    assert code == 0
    assert "tokens identical: yes" in out
    assert "unpatched" in out and "patched" in out and "padding" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert err == ""  # no progress bar where there is no terminal


def test_demo_json(run_command, tiny_model) -> None:
    code, out, err = run_command("demo", *TINY, "--block-size", "8", "--json", "-")
    saved = json.loads(out)
    row = saved["results"][0]
    assert code == 0
    assert "tokens identical: yes" in err
    assert row["identical"] is True and row["difference"] is None
    assert len(row["prompt_lengths"]) == 3
    assert row["stats"]["block_size"] == 8
    bytes_a_token = row["stats"]["block_bytes"] // 8
    longest = max(row["prompt_lengths"]) + 3
    assert row["unpatched"]["kv_bytes"] == 3 * longest * bytes_a_token
    blocks = sum(-(-(length + 3) // 8) for length in row["prompt_lengths"])
    assert row["patched"]["kv_bytes"] == blocks * 8 * bytes_a_token
    needed = sum(length + 3 for length in row["prompt_lengths"]) * bytes_a_token
    for run_name in ("unpatched", "patched"):
        waste = 1 - needed / row[run_name]["kv_bytes"]
        assert row[run_name]["waste"] == pytest.approx(waste, abs=1e-5)


@pytest.mark.parametrize(("dtype", "expected_code"), [("float32", 1), ("bfloat16", 0)])
def test_demo_reports_tokens_that_differ(
    run_command, tiny_model, monkeypatch: pytest.MonkeyPatch, dtype: str, expected_code: int
) -> None:
    generate = bench_demo._timed_generate

    def spoil_patched(model, *arguments):
        tokens, cache, seconds = generate(model, *arguments)
        if "_pykvcache_patch" in vars(model):
            tokens[1, -2] = (tokens[1, -2] + 1) % 128
        return tokens, cache, seconds

    monkeypatch.setattr(bench_demo, "_timed_generate", spoil_patched)
    code, out, _ = run_command("demo", *TINY, "--dtype", dtype)
    assert code == expected_code
    assert "tokens identical: no; first at row 1, new token 2" in out
    assert "logit margin" in out


def test_ctrl_c_in_the_demo_keeps_the_unpatched_run(
    run_command, tiny_model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    generate = bench_demo._timed_generate

    def interrupted(model, *arguments):
        if "_pykvcache_patch" in vars(model):
            raise KeyboardInterrupt
        return generate(model, *arguments)

    monkeypatch.setattr(bench_demo, "_timed_generate", interrupted)
    saved = tmp_path / "rows.json"
    code, out, err = run_command("demo", *TINY, "--json", str(saved))
    assert code == 130 and err == "pykvcache: interrupted\n"
    assert "unpatched" in out and "last blocks" not in out
    row = json.loads(saved.read_text())["results"][0]
    assert row["unpatched"]["seconds"] > 0 and "patched" not in row


def test_no_ctrl_c_is_silent(run_command, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_demo, "load_model", stops)
    assert run_command("demo", *TINY) == (130, "", "pykvcache: interrupted\n")


def test_demo_takes_a_model_from_a_folder(run_command, tmp_path: Path) -> None:
    models.build_llama(32, 64, 1, 2, 1, 64).save_pretrained(tmp_path)
    code, out, _ = run_command("demo", "--model", str(tmp_path), *TINY)
    assert code == 0
    assert "tokens identical: yes" in out


SMALL = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}


def save_tiny(folder: Path, name: str, **arguments: object) -> str:
    """A folder with a tiny model; the class name without "Config" and the ending."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**SMALL, **arguments)
    auto = transformers.AutoModelForCausalLM
    if config.is_encoder_decoder:
        ending = "ForConditionalGeneration"
        model = getattr(transformers, name + ending)(config)
    else:
        model = auto.from_config(config)
    model.save_pretrained(folder)
    return str(folder)


def test_demo_fits_a_model_of_few_positions(run_command, tmp_path: Path) -> None:
    """Prompts of the trace are longer."""
    folder = save_tiny(tmp_path, "GPT2", n_embd=32, n_layer=1, n_head=4, n_positions=64)
    code, out, _ = run_command("demo", "--model", folder, *TINY)
    assert code == 0, out
    assert "note: prompts are cut to 60 tokens, those that GPT2LMHeadModel has positions" in out
    assert "to 60 tokens, 4 new tokens each" in out
    assert "tokens identical: yes" in out
    code, out, err = run_command(
        "demo", "--model", folder, "--batch", "2", "--max-new-tokens", "64"
    )
    assert (code, out) == (2, "")
    assert "64 new tokens are too many: GPT2LMHeadModel has 64 positions" in err


def test_demo_of_an_encoder_decoder_model(run_command, tmp_path: Path, monkeypatch) -> None:
    folder = save_tiny(tmp_path, "Bart", **BART, max_position_embeddings=48)
    code, out, _ = run_command("demo", "--model", folder, *TINY)
    assert code == 0
    assert "note: prompts are cut to 48 tokens" in out
    assert "note: an encoder reads the prompts" in out
    assert "tokens identical: yes" in out
    generate = bench_demo._timed_generate

    def spoil_patched(model, *arguments):
        tokens, cache, seconds = generate(model, *arguments)
        if "_pykvcache_patch" in vars(model):
            tokens[1, 3] = (tokens[1, 3] + 1) % 97
        return tokens, cache, seconds

    monkeypatch.setattr(bench_demo, "_timed_generate", spoil_patched)
    code, out, _ = run_command("demo", "--model", folder, *TINY)
    assert code == 1
    assert "tokens identical: no; first at row 1, new token 2" in out


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("Whisper", {**BART, "max_source_positions": 8}, "whisper does not read text"),
        ("Rwkv", {"hidden_size": 32, "num_hidden_layers": 2}, "RwkvForCausalLM has no attention"),
        ("XLNet", {"d_model": 32, "n_layer": 1, "n_head": 4}, "XLNetLMHeadModel has no attention"),
    ],
)
def test_demo_of_unsuitable_models_is_one_line(
    run_command, tmp_path: Path, monkeypatch, name: str, arguments: dict[str, object], words: str
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)  # transformers keeps a stderr
    code, out, err = run_command("demo", "--model", save_tiny(tmp_path, name, **arguments), *TINY)
    assert (code, out) == (2, "")
    last = err.strip().splitlines()[-1]  # transformers may have warned
    assert last.startswith("pykvcache: ") and words in last
    assert "Traceback" not in err


def test_demo_of_a_folder_that_is_not_there(run_command, tmp_path: Path) -> None:
    code, out, err = run_command("demo", "--model", str(tmp_path / "nowhere"), *TINY)
    assert (code, out) == (2, "")
    assert "nowhere: there is no such folder" in err and err.count("\n") == 1


def test_demo_of_a_model_that_fails_is_one_line(run_command, tiny_model, monkeypatch) -> None:
    """Code 1 is for tokens that differ."""
    from transformers import LlamaForCausalLM

    def forward(*arguments: object, past_key_values: object = None, **more: object) -> None:
        raise IndexError("index out of range in self")

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    code, out, err = run_command("demo", *TINY)
    assert (code, out) == (2, "")
    assert "LlamaForCausalLM cannot generate: IndexError: index out of range in self" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], ["nonsense"]),
        (["demo", "--bath", "3"], ["--bath"]),
        (["demo", "--batch", "many"], ["--batch", "integer"]),
        (["demo", "--batch", "0"], ["--batch", "1"]),
        (["demo", "--batch", "100000000"], ["--batch", "1024"]),
        (["bench", "allocator", "--num-blocks", "99999999999999"], ["--num-blocks"]),
        (["bench", "engine", "--overhead", "--rows", "1,100000000"], ["--rows", "4096"]),
        (["bench", "generate", "--block-size", "65537"], ["--block-size", "65536"]),
        (["demo", "--block-size", "0"], ["--block-size", "1"]),
        (["demo", "--dtype", "int8"], ["--dtype", "float32", "int8"]),
        (["demo", "--model", "/no/such/folder"], ["--model", "/no/such/folder"]),
    ],
)
def test_wrong_arguments_are_one_line(run_command, arguments: list[str], words: list[str]) -> None:
    code, out, err = run_command(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("pykvcache: ") and err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        ("kernels", ["--threads", "two"], "positive integers"),
        ("kernels", ["--heads", "mqa"], "--heads knows gqa, gqa8, mha"),
        ("generate", ["--workload", "short"], "mixed, long, step, all"),
    ],
)
def test_wrong_arguments_of_benchmarks(module: str, arguments: list[str], words: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert words in result.stderr and result.stderr.count("\n") == 1


def test_wrong_result_is_one_line_and_exit_code_1(
    run_command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(*_: object) -> None:
        raise WrongResult("decode is off by 0.5, allowed 0.1")

    monkeypatch.setattr(bench_demo, "compare", compare)
    monkeypatch.setattr(bench_demo, "load_model", lambda *_: None)
    code, out, err = run_command("demo", *TINY)
    assert (code, out) == (1, "")
    assert err == "pykvcache: decode is off by 0.5, allowed 0.1\n"


def test_plot_without_matplotlib_says_what_to_install(
    run_command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    code, _, err = run_command("demo", "--plot", "blocks.png")
    assert code == 2
    assert (
        err == "pykvcache: Invalid value: --plot needs matplotlib: pip install 'pykvcache[plot]'\n"
    )


@pytest.mark.parametrize("command", ["info", "demo", ""])
def test_help_has_an_example(run_command, command: str) -> None:
    code, out, _ = run_command(*command.split(), "--help")
    assert code == 0
    assert f"Example: python -m pykvcache {command}" in out


def test_bench_without_a_command_shows_its_help(run_command) -> None:
    code, out, err = run_command("bench")
    assert code == 2 and "kernels" in out and err == ""
