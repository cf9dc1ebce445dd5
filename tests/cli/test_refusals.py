"""Whatever is typed wrongly: exit code 2, one line that says what came, what was expected and what to type; no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import Command

# the command, and what its answer has to say
REFUSED = {
    "check --model deepseek_v4": ("unknown model 'deepseek_v4'", "deepseek_v3, deepseek_v2", "moe-harness models"),
    "check deepseek_v4@tp2": ("unknown model 'deepseek_v4'", "deepseek_v3, deepseek_v2", "moe-harness models"),
    "models mixtrol": ("unknown model 'mixtrol'", "mixtral", "moe-harness models"),
    "explain mixtrol": ("unknown model 'mixtrol'", "mixtral", "moe-harness models"),
    "check --model ,": ("',' names nothing", "one name or more, joined by commas"),
    "check --model mixtral --tp 5": ("tp=5 does not divide mixtral's intermediate_size 48", "1, 2, 3, 4, 6, 8"),
    "check mixtral@tp5": ("tp=5 does not divide mixtral's intermediate_size 48", "1, 2, 3, 4, 6, 8"),
    "check --model mixtral --tp 0": ("tp=0", "1 or more"),
    "check --model mixtral --tp 2 --ep 3": ("ep=3: expected a divisor of tp*dp=2", "Type one of ep 1, 2"),
    "check --model mixtral --tp 2 --dp 2 --ep 8": ("ep=8: expected a divisor of tp*dp=4", "Type one of ep 1, 2, 4"),
    "check --model mixtral --tp 4 --ep 4 --sp 2": ("sp=2", "sp is 1 or tp=4", "Type sp1 or sp4"),
    "check --model mixtral --tp 4 --ep 2 --sp 4": ("sp=4 with ep=2", "need whole experts", "Type ep4, or leave sp out"),
    "check --model mixtral --tp 8 --dp 9": ("tp=8 and dp=9 are 72 ranks", "at most 64"),
    "check --model mixtral --tp 1 --dp 5": ("tp*dp/ep=5 does not divide mixtral's intermediate_size 48", "1, 2, 3, 4", "ep5"),
    "check mixtral@ep2": ("ep=2: expected a divisor of tp*dp=1", "Type one of ep 1"),
    "check mixtral@sp2": ("sp=2", "sp is 1 or tp=1"),
    "check mixtral@dp2.dp4": ("dp is given twice",),
    "check mixtral@dp2.tokens1_2_3": ("tokens1_2_3", "one number for each of the dp=2", "Type tokens7_7"),
    "check mixtral@dp2.tokens3_": ("the part 'tokens3_'", "tokensN_N for each data-parallel rank"),
    "explain mixtral@tp2.ep3": ("ep=3: expected a divisor of tp*dp=2", "Type one of ep 1, 2"),
    "explain deepseek_v3@tp5.ep5": ("tp=5 does not divide deepseek_v3's shared intermediate_size", "tp up to 8 that do"),
    "check --model mixtral --dtype int8": ("dtype 'int8'", "fp32, bf16, fp16"),
    "check --model mixtral --tokens -1": ("tokens=-1", "0 to 65536"),
    "check --model mixtral --tokens 99999999": ("tokens=99999999", "0 to 65536"),
    "check --model mixtral --tokens seven": ("--tokens seven", "whole numbers joined by commas, as in --tokens 1,2,4"),
    "check --model mixtral --seed 18446744073709551616": ("seed=18446744073709551616", "0 to 2**64 - 1"),
    "check mixtral@int8": ("'mixtral@int8'", "the part 'int8'", "fp32, bf16, fp16"),
    "check mixtral+pad=3": ("pad=3", "0, 8"),
    "check mixtral+padding=8": ("the part 'padding=8'", "NAME=VALUE with size, s, quant, calls, scale"),
    f"check mixtral@tokens{'9' * 5000}": ("tokens",),
    "check mixtral --tp 2": ("name cases or select them with --model, --tp, ..., not both",),
    "check --system runer": ("unknown system 'runer'", "runner", "path/to/file.py:build"),
    "check --system my_layr.py:build": ("my_layr.py does not exist", "Type my_layer.py:build"),
    "check --system my_layer.py:": ("'my_layer.py:'", "a colon and its build function", "path/to/file.py:build"),
    "check --system my_layer.py": ("'my_layer.py'", "path/to/file.py:build"),
    "check --system my_layer.py:biuld": ("no biuld in my_layer.py", "Type my_layer.py:build"),
    "check --system no_such_package:build": ("no package 'no_such_package'", "Install it, or type path/to/file.py:build"),
    "explain mixtral --system runer": ("unknown system 'runer'", "runner"),
    "check --model mixtral --system transformers --tp 2": ("selects no case", "Add --tp 1, or another --system"),
    "check --jobs many": ("--jobs many", "0 to 256"),
    "check --jobs 9999": ("--jobs 9999", "0 to 256"),
    "check mixtral --system my_layer.py:build --limit 0": ("--limit 0", "seconds above 0"),
    "check mixtral --system my_layer.py:build --limit nan": ("--limit nan", "seconds above 0"),
    "check --limit soon": ("--limit", "'soon'", "moe-harness check --help"),
    "check --tpp 2": ("unknown option '--tpp'", "--tp", "moe-harness check --help"),
    "bench --fast": ("--fast", "--help"),
    "explain": ("CASE", "moe-harness explain --help"),
    "check --cases 5": ("--cases", "Type --profile nightly as well"),
    "check mixtral --profile nightly": ("leave out the case mixtral", "--cases, --seed, --model, --jobs"),
    "check --profile nightly --tp 2": ("leave out --tp",),
    "check mixtral+size=labels.quant=int8": ("size=labels with quant=int8", "Leave one out"),
    "check mixtral+size=labels.calls=many": ("size=labels with calls=many", "Leave one out"),
    "faults Z9": ("unknown fault 'Z9'", "moe-harness faults --list"),
    "certify --replay 5 --output none.gz": ("none.gz: no such certificate", "moe-harness certify --output none.gz"),
    "chek mixtral": ("'chek'", "'check', 'models', 'explain', 'certify', 'faults', 'bench'", "moe-harness --help"),
}  # fmt: skip


@pytest.mark.parametrize("line", REFUSED, ids=lambda line: line[:60])
def test_wrong_usage_is_answered_with_value_expectation_and_what_to_type(line: str, command: Command, tmp_path: Path):
    (tmp_path / "my_layer.py").write_text(
        "raise SystemExit('a refusal imports nothing of the user')\ndef build(spec, weights, comm): ...\n"
    )
    done = command(*line.split())
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("moe-harness: ")
    assert len(done.stderr.splitlines()) == 1
    for part in REFUSED[line]:
        assert part in done.stderr


def test_no_verb_at_all_is_answered_with_the_verbs(command: Command):
    done = command()
    assert done.returncode == 2
    assert done.stdout == ""
    for verb in ("check", "models", "explain", "bench"):
        assert f"    {verb} " in done.stderr
