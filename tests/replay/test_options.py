"""Options: wrong ones are one line, those without effect are named."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trace", "azure"], ["trace", "azure-conv", "sharegpt-like", "'azure'"]),
        (["--model-config", "llama-9"], ["llama-3.1-8b", "qwen3-8b", "'llama-9'"]),
        (["--policy", "best"], ["policy", "max-length", "paged", "'best'"]),
        (["--tokens", "0"], ["tokens", "1", "0"]),
        (["--memory", "0"], ["memory", "0 bytes"]),
        (["--memory", "lots"], ["memory", "'lots'"]),
        (["--memory", "1KiB"], ["1024 bytes", "131072 bytes"]),
        (["--memory", "1GiB", "--tokens", "5"], ["not both"]),
        (["--tokens", "9" * 25], ["tokens", "134217728"]),
        (["--memory", "1000000GiB"], ["memory", "134217728"]),
        (["--memory", "9" * 400 + "GiB"], ["memory"]),
        (["--memory", ""], ["memory", "''"]),
        (["--model-config", ""], ["model config", "''"]),
        (["--tokens", "100000", "--model-config", "nope"], ["model config", "'nope'"]),
        (["--paper", "--trace", "sharegpt"], ["--paper", "--trace"]),
        (["--paper", "--tokens", "100"], ["--paper", "--tokens"]),
        (["--block-size", "16,16"], ["block_size", "16,16"]),
        (["--max-len", "1"], ["max_len", "1"]),
        (["--max-len", "100000"], ["max_len", "65536", "100000"]),
        (["--block-size", "0"], ["block_size", "0"]),
        (["--block-size", "big"], ["block_size", "'big'"]),
        (["--tokens", "10", "--block-size", "16"], ["block_size 16", "10"]),
        (["--head-room", "1"], ["head_room", "1"]),
        (["--victim", "oldest"], ["victim", "newest", "'oldest'"]),
        (["--preemption", "kill"], ["preemption", "swap", "'kill'"]),
        (["--buddy-rest", "half"], ["buddy_rest", "used", "'half'"]),
        (["--order", "lifo"], ["order", "shortest", "'lifo'"]),
        (["--scheduler", "best"], ["scheduler", "engine", "'best'"]),
        (["--requests", "0"], ["requests", "0"]),
        (["--arrivals", "poisson"], ["arrivals", "saturated", "'poisson'"]),
        (["--trace", "sharegpt", "--arrivals", "trace"], ["sharegpt", "arrive"]),
        (["--prefix-cache"], ["azure-conv", "prefixes"]),
        (["--prefix-cache", "--scheduler", "prefill-first"], ["--prefix-cache", "engine"]),
        (["--scheduler", "engine", "--preemption", "swap"], ["engine", "--preemption swap"]),
        (["--scheduler", "engine", "--victim", "newest"], ["engine", "--victim newest"]),
        (["--step-ms", "-1"], ["step_ms", "-1"]),
        (["--step-ms", "0"], ["step_ms", "0"]),
        (["--kv-ns", "1e308"], ["kv_ns", "1e+308"]),
        (["--paper", "--requests", "0"], ["0"]),
        (["--seed", "-1"], ["--seed"]),
        (["--kv-ns", "nan"], ["kv_ns", "nan"]),
        (["--trace", "alpaca-like", "--sigma", "-1"], ["sigma", "-1"]),
        (["--plot", "a.txt"], ["--plot", ".png", "'a.txt'"]),
        (["--json", "/"], ["--json", "folder"]),
        (["--plot", "/no/such/folder/a.png"], ["--plot", "/no/such/folder"]),
        (["--json", "/no/such/folder/a.json"], ["--json", "/no/such/folder"]),
    ],
)
def test_wrong_arguments_are_one_line(run, arguments: list[str], words: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("pykvcache: ") and err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policy", "max", "--block-size", "77"], ["--block-size", "paged is not replayed"]),
        (
            ["--policy", "paged", "--block-size", "16", "--token-budget", "9"],
            ["--scheduler engine"],
        ),
        (["--policy", "paged", "--block-size", "16", "--swap-us", "9"], ["--swap-us", "swapped"]),
        (["--policy", "max", "--sigma", "2", "--seed", "1"], ["--seed, --sigma", "random"]),
        (["--policy", "max", "--buddy-rest", "lost"], ["--buddy-rest", "no buddy"]),
        (["--policy", "max", "--tokens", "9000", "--model-config", "opt-13b"], ["is the budget"]),
    ],
)
def test_options_without_effect_are_named(
    run_small, arguments: list[str], words: list[str]
) -> None:
    code, out, _ = run_small(*arguments)
    text = " ".join(out.split())
    assert code == 0 and "without effect: --" in text
    for word in words:
        assert word in text


def test_no_word_about_options_that_count(run_small) -> None:
    options = ("--preemption", "swap", "--swap-us", "4", "--victim", "cheapest")
    code, out, _ = run_small("--policy", "paged", "--block-size", "16", *options)
    assert code == 0 and "without effect" not in out
    assert "cheapest preempted (swap and 4 us a token one way)" in " ".join(out.split())
    code, out, _ = run_small("--policy", "paged", "--block-size", "16", "--scheduler", "engine")
    assert code == 0 and "newest" not in out and "cheapest preempted" in out
