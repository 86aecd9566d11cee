"""Bad input gets one line on stderr and exit code 2; nothing is half written and earlier artefacts stay."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adept_fast.cli.main import main
from adept_fast.data.readers import read
from adept_fast.data.sources import Source
from adept_fast.data.splits import split_probe
from adept_fast.errors import InputError
from adept_fast.pipeline.datasets import Datasets
from adept_fast.pipeline.recipe import load
from adept_fast.pipeline.source_model import SourceModel
from tests.support import tiny_models


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADEPT_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny_models.checkpoint(tmp_path / "model")
    rows = [{"instruction": f"The fox counts {number} and", "output": f" {number + 1} stones"} for number in range(9)]
    (tmp_path / "probe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "domain.txt").write_text("\n\n".join(tiny_models.SENTENCES))
    return tmp_path


BASE = ["model_name_or_path=model", "output_dir=out", "probe=probe.jsonl", "domain=domain.txt", "tune.max_steps=2"]


def fails(capsys: pytest.CaptureFixture, command: str, *settings: str, code: int = 2) -> str:
    capsys.readouterr()
    assert main([command, *BASE, *settings]) == code
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("adept-fast: "), lines
    return lines[0]


def test_info(capsys: pytest.CaptureFixture) -> None:
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("torch", "transformers", "triton", "cuda"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model_name_or_path=nowhere"], "nowhere: no such model folder"),
        (["domain=none.txt"], "none.txt: no such file"),
        (["expand.k=9"], "from 1 to 4"),
        (["expand.layers=[7]"], "indices from 0 to 3"),
        (["expand.kk=2"], "unknown key expand.kk: did you mean expand.k"),
        (["tune.unit=head"], "did you mean tune.units"),
        (["tune.units=layer"], "units must be one of"),
        (["score.method=magic"], "method must be one of"),
        (["tune.warmup_steps=-1"], "warmup_steps"),
        (["dtype=int8"], "dtype must be one of bfloat16, float16, float32, float64, found 'int8'"),
        (["attn_implementation=flash"], "attn_implementation=flash cannot be had: "),
        (["score.probe_format=Chat"], "score.probe_format must be one of"),
        (["tune.warmup_steps=3"], "tune.warmup_steps=3 is more than the run's 2 steps"),
        (["tune.per_device_train_batch_size=100000"], "a step takes 100,000 blocks, the corpus has"),
        (["tune.save_only_model=true"], "tune.save_only_model"),
        (["tune.eval_strategy=steps"], "tune.eval_strategy"),
        (["tune.report_to=foo"], "tune.report_to: foo is not supported"),
        (["tune.dataloader_num_workers=-1"], "tune.dataloader_num_workers must be a whole number of 0 or more"),
        (["tune.dataloader_prefetch_factor=2"], "tune.dataloader_prefetch_factor: "),
        (["tune.save_strategy=best"], "tune.save_strategy must be one of no, steps, epoch"),
        (["tune.save_total_limit=0"], "tune.save_total_limit must be a whole number of 1 or more"),
        (["tune.logging_steps=0"], "tune.logging_steps must be a number above 0"),
        (["tune.neftune_noise_alpha=-5"], "tune.neftune_noise_alpha must be a number from 0 to 1000"),
        (["tune.max_grad_norm=-1"], "tune.max_grad_norm must be a number of 0 or more"),
        (["tune.optim_args=a=1"], "tune.optim_args"),
        (["tune.ignore_data_skip=true"], "tune.ignore_data_skip"),
        (["tune.train_sampling_strategy=sorted"], "tune.train_sampling_strategy must be one of random"),
        (["tune.label_smoothing_factor=2"], "tune.label_smoothing_factor must be a number from 0 to below 1"),
        (["tune.torch_compile_backend=foo"], "tune.torch_compile_backend: 'FOO' is not a valid DynamoBackend"),
        (["tune.dataloader_persistent_workers=true"], "tune.dataloader_persistent_workers: persistent_workers option"),
        (["tune.gradient_checkpointing=true", "tune.gradient_checkpointing_kwargs={use_reentrant: true}"], "use_reentrant: false"),
        (["tune.gradient_checkpointing_kwargs={foo: 1}"], "got an unexpected keyword argument 'foo'"),
        (["tune.parallelism_config=foo"], "tune.parallelism_config: choose DDP or FSDP2"),
        (["tune.log_level=foo"], "tune.log_level must be one of detail, debug"),
        (["output_dir=model"], "model: output_dir holds a model: choose another"),
        (["output_dir=/proc/none"], "/proc/none: output_dir cannot be made"),
        (["tune.fsdp=full_shard"], "tune.fsdp: Using fsdp only works in distributed training"),
        (["tune.deepspeed=none.json"], "tune.deepspeed: "),
        (["method=lora", "tune.lora_rank=33"], "tune.lora_rank must be a whole number from 1 to 32, the model's width, found 33"),
        (["method=lora", "tune.lora_rank=0"], "tune.lora_rank must be a whole number of 1 or more"),
        (["probe={path: probe.jsonl, weight: 2}"], "probe: weight and share say how much of a source is trained on"),
        (["eval.domain={path: domain.txt, share: 0.5}"], "eval.domain: weight and share say how much of a source is trained on"),
        (["domain={path: domain.txt, split: test}"], "domain.txt: split=test: files have no splits"),
        (["domain={path: domain.txt, template: vicuna}"], "template must be one of plain, alpaca, chat, found 'vicuna'"),
        (["domain={path: domain.txt, column: body}"], "domain.txt: column=body: a text has no columns"),
        (["malformed_rows=-1"], "malformed_rows must be a whole number of 0 or more"),
        (["score.loss=best"], "score.loss must be one of answer, kl, all, found 'best'"),
        (["score.compare=[gate,gate]"], "score.compare must be a list of gate, cumulative, rank, fisher, block_influence, each once"),
        (["score.seed=-1"], "score.seed must be a whole number from 0 to 4294967295"),
        (["score.units=layer"], "score.units must be one of tensor, head"),
        (["score.unit_layers=[1]"], "score.unit_layers: no units are masked"),
        (["score.units=head", "score.unit_layers=[4]"], "score.unit_layers must be indices from 0 to 3, each once, found [4]"),
        (["expand.budget={parameters: 1e-4}"], "expand.budget.parameters=0.0001 allows no copy: that of one layer takes 0."),
        (["expand.budget={parameters: 0.5}", "expand.layers=[1]"], "expand.layers says which: leave one out"),
        (["expand.budget={parameters: 0.5}", "method=uniform"], "method=uniform takes expand.k: leave one out"),
        (["tune.restore_callback_states_from_checkpoint=true"], "a resumed run restores them itself: leave it out"),
        (["tune.learning_rate=1e300"], "tune.learning_rate must be a number from 0 to 1,"),
        (["tune.push_to_hub=true"], "tune.push_to_hub: checkpoints have only the copies"),
        (["tune.per_device_train_batch_size=0"], "tune.per_device_train_batch_size must be a whole number"),
        (["domain={path: domain.txt, weight: 0.0001}"], "leave no document"),
        (["seed=-1"], "seed must be a whole number from 0"),
        (["tune.gradient_checkpointing_kwargs={determinism_check: 3}"], "tune.gradient_checkpointing_kwargs: "),
        (["tune.lr_scheduler_kwargs={num_cycles: abc}"], "tune.lr_scheduler_kwargs: could not convert"),
        (["tune.bf16=true", "tune.fp16=true", "tune.use_cpu=true"], "tune.bf16, tune.fp16: At most one of fp16 and bf16"),
        (["tune.weight_decay=1e4"], "tune.learning_rate=0.0002 times tune.weight_decay=10000 is above 1"),
        (["tune.eval_on_start=true"], "tune.eval_on_start: held-out losses are logged every tune.eval_steps"),
        (["tune.general_limit=0.1"], "tune.general_limit: the probe is too small"),
        (["revision=main"], "revision=main: model is a folder, which has one state only: leave it out"),
        (["model_name_or_path=" + "x" * 300], "x: no such model folder"),
        (["domain=" + "x" * 300 + ".txt"], "x.txt: no such file"),
        (["output_dir=" + "x" * 300], "x: output_dir cannot be made"),
        (["domain=/"], "/: neither a file nor a dataset"),
        (["tune.general_limit=-0.1"], "tune.general_limit must be a number of 0 or more"),
        (["domain=[" + "none.txt, " * 40 + "]"], "none.txt: no such file"),  # longer than a file name may be
    ],
)
def test_bad_settings(here: Path, capsys: pytest.CaptureFixture, settings: list[str], message: str) -> None:
    assert message in fails(capsys, "run", *settings)
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("probe.jsonl", '{"text": "a b c"}\n{"text" "b"}\n', "probe.jsonl:2: not valid JSON"),
        ("probe.jsonl", "", "probe.jsonl: holds no records"),
        ("probe.jsonl", '{"text": "a b c"}\n{"question": "b"}\n{"text": "d e f"}', "probe.jsonl:2: its keys (question) are of no format"),
        ("probe.jsonl", '{"text": "a b"}\n{"text": "c d"}\n', "at least 3"),
        ("domain.txt", "", "domain.txt: holds no records"),
        ("domain.txt", "one line only", "one document only"),
    ],
)
def test_bad_corpora(here: Path, capsys: pytest.CaptureFixture, name: str, content: str, message: str) -> None:
    (here / name).write_text(content)
    assert message in fails(capsys, "run")
    assert not (here / "out").exists()


@pytest.mark.parametrize("part", ["scoring", "steering", "reporting"])
def test_tokens_that_the_model_lacks_are_refused_before_anything_is_scored(here: Path, capsys: pytest.CaptureFixture, part: str) -> None:
    for shift in range(99):  # until record 4 falls to that part
        rows = [{"input_ids": [5, shift, 300 if number == 3 else number]} for number in range(9)]
        (here / "probe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if any(record.where.endswith(":4") for record in getattr(split_probe(read(Source("probe.jsonl")), "probe"), part)):
            break
    assert "probe.jsonl:4: token 300, but the model has 300" in fails(capsys, "run")
    assert not (here / "out").exists()


def test_damaged_model_and_unsupported_family(here: Path, capsys: pytest.CaptureFixture) -> None:
    weights = here / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors: corrupt or truncated" in fails(capsys, "score")
    shutil.rmtree(here / "model")
    tiny_models.checkpoint(here / "model", "diffllama")
    said = fails(capsys, "run", "expand.layers=[1]")
    assert "diffllama: cannot be expanded" in said and "lambda_init" in said
    assert not (here / "out").exists()


@pytest.mark.slow
def test_stages_say_what_they_need(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert "run adept-fast score first" in fails(capsys, "expand")
    assert "run adept-fast expand first" in fails(capsys, "tune")
    assert "run adept-fast expand first" in fails(capsys, "verify")
    assert not (here / "out").exists()
    for command in ("score", "expand", "verify", "tune", "eval", "report"):
        assert main([command, *BASE]) == 0, command
    assert not (here / "out" / ".lock").exists()
    (here / "out" / "recipe.yaml").write_text("{")
    assert "recipe.yaml: not valid YAML" in fails(capsys, "report")


def test_a_training_that_is_refused_leaves_what_was_there(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["expand", *BASE, "expand.layers=[1]"]) == 0
    assert "expand.layers must be indices from 0 to 3" in fails(capsys, "expand", "expand.layers=[7]", "output_dir=no")
    before = {*(here / "out").rglob("*")}
    assert "too small to hold items back" in fails(capsys, "tune", "tune.general_limit=0.1")
    assert {*(here / "out").rglob("*")} == before


@pytest.mark.slow
@pytest.mark.parametrize("where", ["adept_callback.AdeptCallback.on_train_begin", "adept_trainer.AdeptTrainer.train"])
def test_a_refusal_once_training_began_leaves_neither_folder_nor_log(
    here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    assert main(["expand", *BASE, "expand.layers=[1]"]) == 0
    before = {*(here / "out").rglob("*")}

    def refused(*given: object, **named: object) -> None:
        assert (here / "out" / "checkpoints").is_dir() and (here / "out" / "trainer_log.jsonl").is_file()
        raise InputError("refused")

    with monkeypatch.context() as patched:
        patched.setattr(f"adept_fast.tuning.{where}", refused)
        assert fails(capsys, "tune") == "adept-fast: refused"
    assert {*(here / "out").rglob("*")} == before
    assert main(["tune", *BASE, "expand.layers=[1]"]) == 0


def test_another_model_is_not_taken_for_the_one_that_was_expanded(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["expand", *BASE, "expand.layers=[1]"]) == 0
    tiny_models.checkpoint(here / "other", seed=7)
    for command in ("tune", "eval", "verify"):
        assert "another model" in fails(capsys, command, "model_name_or_path=other"), command


@pytest.mark.slow
def test_an_expanded_model_that_was_changed_is_named_by_verify(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["expand", *BASE, "expand.layers=[1]"]) == 0
    config = json.loads((here / "out" / "expanded" / "config.json").read_text())
    (here / "out" / "expanded" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert "out/expanded: the expanded model does not compute what its base computes" in fails(capsys, "verify", "expand.layers=[1]")


def test_held_out_documents_and_probe_items_are_not_trained_on(here: Path) -> None:
    texts = [f"{sentence} {number}" for number, sentence in enumerate(tiny_models.SENTENCES * 3)]
    (here / "a.jsonl").write_text("".join(json.dumps({"text": text, "id": number}) + "\n" for number, text in enumerate(texts)))
    (here / "b.jsonl").write_text("".join(json.dumps({"text": text, "id": -number}) + "\n" for number, text in enumerate(texts[::2])))
    recipe = load(None, ["model_name_or_path=model", "domain=[a.jsonl, b.jsonl]", "probe=probe.jsonl", "tune.replay=probe.jsonl"])
    data = Datasets(recipe, SourceModel(recipe))
    trained, held = set(data.training().texts), {record.content["text"] for record in data.held_out(None)}
    assert len(held) == 2 and trained == set(texts) - held
    general = [{"text": texts[3]}, {"question": "Which?", "choices": ["one", "two"], "answer": 0}]
    (here / "general.jsonl").write_text("".join(json.dumps(record) + "\n" for record in general))
    recipe = dataclasses.replace(recipe, eval=dataclasses.replace(recipe.eval, general=Source("general.jsonl")))
    measured = Datasets(recipe, data.source)
    assert texts[3] in trained and set(measured.training().texts) == trained - {texts[3]}, "eval.general is measured on what it trained on"


@pytest.mark.slow
def test_other_artefacts_are_kept(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["run", *BASE]) == 0
    before = {path: path.read_bytes() for path in (here / "out").rglob("*") if path.is_file()}
    tiny_models.checkpoint(here / "other", "qwen3")
    for command in ("run", "score", "expand", "verify", "tune", "eval"):
        assert "another model" in fails(capsys, command, "model_name_or_path=other"), command
    assert "other settings (score.max_items)" in fails(capsys, "run", "score.max_items=2")
    assert "other settings (tune.learning_rate: 0.0002, now 1e-05)" in fails(capsys, "run", "tune.learning_rate=1e-5")
    assert "other settings (expand.layers)" in fails(capsys, "run", "expand.layers=[1]")
    assert {path: path.read_bytes() for path in (here / "out").rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(here: Path) -> None:
    """A limit on the size of files stands in for the full disk: the write fails part way, as there."""
    driver = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); from adept_fast.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    assert main(["score", *BASE]) == 0
    before = (here / "out" / "scores.json").read_bytes()
    done = subprocess.run([sys.executable, "-c", driver, "expand", *BASE], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and os.strerror(errno.EFBIG) in done.stderr
    assert "out/expanded" in done.stderr and "raise the limit on the size of files (ulimit -f)" in done.stderr
    assert (here / "out" / "scores.json").read_bytes() == before
    assert not (here / "out" / "expanded").exists() and not list((here / "out").glob(".adept_fast-*"))


@pytest.mark.parametrize("name", ["ADEPT_FAST_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_a_cache_that_cannot_be_made_is_named_before_anything_starts(
    here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, str(here / "domain.txt" / "cache"))
    file = here / "domain.txt"
    assert fails(capsys, "run").endswith(f"{name}={file}/cache cannot be made ({file} is no folder): set {name} to a folder, or unset it")
    assert not (here / "out").exists()


def test_a_setting_that_a_later_one_overrides_is_told(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert "none.txt: no such file" in fails(capsys, "run", "domain=none.txt", "seed=3", "seed=3")
    assert main(["run", *BASE, "domain=none.txt"]) == 2
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "domain=domain.txt: given again later, where it counts" and not any(line.startswith("seed") for line in said)


def test_debug_shows_the_traceback(here: Path) -> None:
    with pytest.raises(Exception, match="no such file"):
        main(["run", "--debug", *BASE, "domain=none.txt"])


def test_two_runs_do_not_share_an_output_dir(here: Path, capsys: pytest.CaptureFixture) -> None:
    import fcntl

    (here / "out").mkdir()
    with (here / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another run is working" in fails(capsys, "score")


def test_a_lock_that_ended_with_its_run_holds_nothing(here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run removes the file between this one's opening and locking it: a third could lock a new one."""
    import fcntl

    flock = fcntl.flock

    def removed_first(lock: object, how: int) -> None:
        (here / "out" / ".lock").unlink()
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    assert "another run is working" in fails(capsys, "score")
