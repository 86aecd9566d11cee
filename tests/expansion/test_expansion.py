"""Copies are silent, learn, are recorded, and are written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adept_fast import fast_step, score_layers
from adept_fast.checkpoints import checkpoint
from adept_fast.checkpoints.adept_config import AdeptConfig
from adept_fast.checkpoints.digest import fingerprint
from adept_fast.cli.main import main
from adept_fast.errors import ExpansionError, InputError, UnsupportedFamilyError
from adept_fast.expansion.delta import apply_copies, extract_copies
from adept_fast.expansion.expand_checkpoint import expand_checkpoint
from adept_fast.expansion.expand_model import copies, expand_model, freeze_original
from adept_fast.expansion.first_importance import first_importance, load_first_importance
from adept_fast.expansion.remove import remove_copies
from adept_fast.expansion.verify import verify_expansion
from adept_fast.models.losses import corpus_loss
from adept_fast.models.silent_copies import describe
from adept_fast.optim import AdamW
from tests.support import tiny_families, tiny_models

IDS = torch.arange(3, 40)[None] % tiny_models.VOCABULARY
WIDER = {"qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_expanded_logits_are_bit_equal(family: str, dtype: torch.dtype) -> None:
    base = tiny_models.model(family, dtype=dtype, **WIDER.get(family, {}))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expanded = expand_model(base, [0, 2, 3])
    verify_expansion(base, expanded)
    assert expanded.config.num_hidden_layers == 7 and base.config.num_hidden_layers == 4
    assert [layer.self_attn.layer_idx for layer in expanded.model.layers] == list(range(7))
    assert [entry.copied_from for entry in expanded.adept_config.inserted] == [0, 2, 3]
    assert expanded.adept_config.copies == (1, 4, 6)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    if hasattr(base.config, "layer_types"):
        types = base.config.layer_types
        assert expanded.config.layer_types == [types[0], types[0], types[1], types[2], types[2], types[3], types[3]]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_an_unsilenced_copy_changes_the_logits_and_every_branch_learns(family: str) -> None:
    base = tiny_models.model(family)
    expanded = expand_model(base, [1])
    assert freeze_original(expanded).trainable == sum(parameter.numel() for parameter in base.model.layers[1].parameters())
    outputs = [copies(expanded)[0].get_parameter(name) for name in describe(base).silent[1]]
    optimizer = AdamW([parameter for parameter in expanded.parameters() if parameter.requires_grad], lr=1e-3)
    for _ in range(3):
        expanded(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(bool(output.abs().max() > 0) for output in outputs)
    with pytest.raises(ExpansionError, match="largest logit difference"):
        verify_expansion(base, expanded)


def test_every_module_keeps_its_mode() -> None:
    base = tiny_models.model()
    expanded, items = expand_model(base, [1]), tiny_models.items()[:2]
    for model in (base, expanded):
        model.train()
        model.model.layers[0].eval()  # as somebody who trains without its dropout leaves it
    verify_expansion(base, expanded)
    corpus_loss(expanded, items)
    score_layers(expanded, items)
    freeze_original(expanded)
    with fast_step(expanded):
        pass
    for model in (base, expanded):
        modes = {name: module.training for name, module in model.named_modules()}
        assert {name for name, training in modes.items() if not training} == {name for name in modes if name.startswith("model.layers.0")}


def test_biases_of_output_projections_are_silenced() -> None:
    base = tiny_models.model("llama", attention_bias=True, mlp_bias=True)
    expanded = expand_model(base, [2])
    verify_expansion(base, expanded)
    assert not copies(expanded)[0].self_attn.o_proj.bias.any() and base.model.layers[2].self_attn.o_proj.bias.any()


def test_copies_own_their_tensors_and_originals_are_shared() -> None:
    base = tiny_models.model()
    expanded = expand_model(base, [1])
    assert expanded.model.layers[1].mlp.up_proj.weight is base.model.layers[1].mlp.up_proj.weight
    duplicate = expanded.model.layers[2].mlp.up_proj.weight
    assert torch.equal(duplicate, base.model.layers[1].mlp.up_proj.weight)
    assert duplicate.data_ptr() != base.model.layers[1].mlp.up_proj.weight.data_ptr()


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        (
            "gpt2",
            {"n_layer": 4, "n_embd": 32, "n_head": 4, "scale_attn_by_inverse_layer_idx": True},
            "attn.scaling depends on the layer's index",
        ),
        ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32, "ffn_dim": 48}, "its output is not its input plus branches"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "its output is not its input plus branches"),
        ("diffllama", {}, "self_attn.lambda_init depends on the layer's index"),
    ],
)
def test_unsupported_families_are_refused_by_name_with_the_reason(family: str, changes: dict, reason: str) -> None:
    with pytest.raises(UnsupportedFamilyError, match=f"^{family}: cannot be expanded: .*{reason}"):
        expand_model(tiny_models.model(family, **changes), [1])


@pytest.mark.parametrize("layers", [[], [4], [-1], [1, 1], ["1"]])
def test_bad_layers(layers: list) -> None:
    with pytest.raises(InputError, match="layers must"):
        expand_model(tiny_models.model(), layers)


def test_first_importance_is_that_of_the_copied_layer_in_the_original() -> None:
    base, items = tiny_models.model(), tiny_models.items(3)
    sums = first_importance(expand_model(base, [1]), items)
    base.requires_grad_(True)
    tokens = sum(item.supervised for item in items)
    loss = sum(base(torch.tensor([item.input_ids]), labels=torch.tensor([item.labels]), num_items_in_batch=tokens).loss for item in items)
    loss.backward()
    weight = base.model.layers[1].self_attn.v_proj.weight
    for dim in (0, 1):
        expected = (weight * weight.grad).abs().sum(1 - dim)
        torch.testing.assert_close(sums["model.layers.2.self_attn.v_proj.weight", dim].abs_taylor, expected, rtol=1e-4, atol=1e-7)


def test_checkpoint_loads_with_plain_transformers(tmp_path: Path) -> None:
    source = tiny_models.checkpoint(tmp_path / "base", "qwen3")
    (source / "LICENSE").write_text("a licence")
    record = expand_checkpoint(source, tmp_path / "expanded", [0, 3], steering=tiny_models.items(2))
    base, expanded = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "expanded"))
    assert torch.equal(base(IDS).logits, expanded(IDS).logits)
    assert AdeptConfig.load(tmp_path / "expanded") == record
    assert record.source["identity"] == fingerprint(source)
    assert (tmp_path / "expanded" / "LICENSE").read_text() == "a licence"
    assert (tmp_path / "expanded" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    sums = load_first_importance(tmp_path / "expanded")
    assert sums["model.layers.1.mlp.down_proj.weight", 1].abs_taylor.shape == (48,) and sums["model.layers.1.input_layernorm.weight", 0]


def test_a_folder_of_links_to_blobs_is_expanded_into_files(tmp_path: Path) -> None:
    """As the hub's cache keeps a snapshot: each file a link into ../../blobs, named by its hash."""
    held, snapshot, blobs = tiny_models.checkpoint(tmp_path / "held"), tmp_path / "snapshots" / "1f0c", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(held.iterdir())):
        file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    expand_checkpoint(snapshot, tmp_path / "expanded", [1, 3])
    shutil.rmtree(snapshot.parent)
    shutil.rmtree(blobs)
    written = list((tmp_path / "expanded").iterdir())
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {file.name for file in written}
    assert all(file.is_file() and not file.is_symlink() for file in written)
    assert checkpoint.load_model(tmp_path / "expanded").config.num_hidden_layers == 6


def test_experts_that_are_separate_tensors_on_disk_are_silenced_each(tmp_path: Path) -> None:
    """Mixtral's experts are w1, w2, w3 each on disk, and two 3-D parameters in memory: of a copy, every w2 and o_proj are 0, no more."""
    source = tmp_path / "base"
    tiny_models.model("mixtral", num_local_experts=4).save_pretrained(source, max_shard_size="60KB")
    expand_checkpoint(source, tmp_path / "expanded", [0, 2])
    before, after = stored_tensors(source), stored_tensors(tmp_path / "expanded")
    assert len(list(source.glob("*.safetensors"))) > 1 and "model.layers.0.block_sparse_moe.experts.3.w2.weight" in before
    expected = {name: tensor for name, tensor in before.items() if not name.startswith("model.layers.")}
    for name, tensor in before.items():
        if name.startswith("model.layers."):
            *_, layer, rest = name.split(".", 3)
            for index in {0: (0, 1), 1: (2,), 2: (3, 4), 3: (5,)}[int(layer)]:
                silent = index in (1, 4) and rest.endswith(("w2.weight", "o_proj.weight"))
                expected[f"model.layers.{index}.{rest}"] = torch.zeros_like(tensor) if silent else tensor
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name].view(torch.int32), tensor.view(torch.int32)) for name, tensor in expected.items())
    base, expanded = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "expanded"))
    assert torch.equal(base(IDS).logits, expanded(IDS).logits)


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_models.checkpoint(tmp_path / "base")

    def refuse(*_: object) -> None:
        raise ExpansionError("differs")

    monkeypatch.setattr(sys.modules[expand_checkpoint.__module__], "require_equal_logits", refuse)
    with pytest.raises(ExpansionError):
        expand_checkpoint(source, tmp_path / "expanded", [1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_an_existing_target_is_not_overwritten(tmp_path: Path) -> None:
    source = tiny_models.checkpoint(tmp_path / "base")
    (tmp_path / "expanded").mkdir()
    (tmp_path / "expanded" / "mine").touch()
    with pytest.raises(InputError, match="exists already"):
        expand_checkpoint(source, tmp_path / "expanded", [1])
    assert [path.name for path in (tmp_path / "expanded").iterdir()] == ["mine"]


@pytest.mark.slow
def test_a_killed_expansion_leaves_no_target(tmp_path: Path) -> None:
    """SIGKILL at moments spread over the time that one expansion takes: the final name appears with a whole checkpoint or not at all."""
    source = tiny_models.checkpoint(tmp_path / "base", hidden_size=256, intermediate_size=2048)
    start = time.perf_counter()
    expand_checkpoint(source, tmp_path / "whole", [0, 2], verify=False)
    seconds, killed = time.perf_counter() - start, 0
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    for part in range(12):
        target = tmp_path / f"expanded{part}"
        child = os.fork()
        if not child:
            expand_checkpoint(source, target, [0, 2], verify=False)
            os._exit(0)
        time.sleep(seconds * part / 12)
        os.kill(child, signal.SIGKILL)
        killed += os.waitpid(child, 0)[1] == signal.SIGKILL
        assert not target.exists() or (target / "model.safetensors").read_bytes() == whole
    assert killed


@pytest.mark.slow
def test_it_loads_where_adept_fast_is_not_installed(tmp_path: Path) -> None:
    source = tiny_models.checkpoint(tmp_path / "base")
    expand_checkpoint(source, tmp_path / "expanded", [1, 3], verify=False)
    code = (
        "import sys; sys.modules['adept_fast'] = None; import torch; from transformers import AutoModelForCausalLM as A; "
        "ids = torch.arange(3, 12)[None]; print(*[A.from_pretrained(f).generate(ids, max_new_tokens=9, do_sample=False).tolist() "
        "for f in sys.argv[1:]], sep='|')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(source), str(tmp_path / "expanded")], capture_output=True, text=True, check=True)
    base, expanded = done.stdout.strip().split("|")
    assert base == expanded and len(base) > 20


def test_a_second_expansion_keeps_the_first_and_trains_its_own_copies(tmp_path: Path) -> None:
    first = expand_model(tiny_models.model("qwen3"), [1, 3])
    with torch.no_grad():
        for layer in copies(first):
            for parameter in layer.parameters():
                parameter.add_(0.1)
    second = expand_model(first, [0, 1])
    verify_expansion(first, second)
    assert [(entry.layer, entry.copied_from, entry.round) for entry in second.adept_config.inserted] == [
        (1, 0, 1),
        (3, 1, 0),
        (4, 1, 1),
        (7, 3, 0),
    ]
    trained = {id(parameter) for index in (1, 4) for parameter in second.model.layers[index].parameters()}
    freeze_original(second)
    assert {id(parameter) for parameter in second.parameters() if parameter.requires_grad} == trained
    second.save_pretrained(tmp_path / "plain")
    assert checkpoint.load_model(tmp_path / "plain").adept_config.inserted == second.adept_config.inserted
    with pytest.raises(InputError, match="layer 2 is itself a copy"):
        expand_model(first, [2])


def test_plain_transformers_loads_the_record_with_the_model(tmp_path: Path) -> None:
    tiny_models.checkpoint(tmp_path / "model")
    record = expand_checkpoint(tmp_path / "model", tmp_path / "expanded", [1, 3])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "expanded")
    counts = freeze_original(plain)
    assert (counts.total, counts.trainable) == tuple(record.parameters.values())
    again = expand_model(plain, [0]).adept_config
    assert [(entry.layer, entry.copied_from, entry.round) for entry in again.inserted] == [(1, 0, 1), (3, 1, 0), (6, 3, 0)]
    assert again.source == record.source


def test_a_home_is_found_for_source_and_target_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    tiny_models.checkpoint(tmp_path / "model")
    expand_checkpoint("~/model", "~/expanded", [1], verify=False)
    extract_copies("~/expanded", "~/delta")
    apply_copies("~/model", "~/delta", "~/applied")
    remove_copies("~/applied", "~/removed")
    assert {"expanded", "delta", "applied", "removed"} < {path.name for path in tmp_path.iterdir()} and not (tmp_path / "~").exists()


@pytest.mark.slow
def test_a_second_expansion_on_disk(tmp_path: Path) -> None:
    source = tiny_models.checkpoint(tmp_path / "base", "qwen3")
    expand_checkpoint(source, tmp_path / "one", [1, 3])
    record = expand_checkpoint(tmp_path / "one", tmp_path / "two", [0, 1])
    assert [(entry.layer, entry.copied_from, entry.round) for entry in record.inserted] == [(1, 0, 1), (3, 1, 0), (4, 1, 1), (7, 3, 0)]
    base, twice = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("base", "two"))
    assert torch.equal(base(IDS).logits, twice(IDS).logits)


@pytest.mark.slow
def test_a_second_domain_on_top_of_a_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The pipeline takes an expanded model, saved again by plain transformers, as its source: it copies none of the copies, trains its own
    alone, and both sets come off again."""
    monkeypatch.setenv("ADEPT_FAST_CACHE", str(tmp_path / "cache"))
    base = tiny_models.checkpoint(tmp_path / "base", "qwen3")
    record = expand_checkpoint(base, tmp_path / "expanded", [0, 2], verify=False)
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "expanded")
    with torch.no_grad():
        for layer in record.copies:
            for parameter in first.model.layers[layer].parameters():
                parameter.add_(0.1)
    first.save_pretrained(tmp_path / "first")
    tiny_models.tokenizer().save_pretrained(tmp_path / "first")
    assert AdeptConfig.load(tmp_path / "first") == record and not (tmp_path / "first" / "adept_config.json").exists()
    (tmp_path / "notes.txt").write_text("".join(f"{line} Note {at}.\n" for at, line in enumerate(tiny_models.SENTENCES * 3)))
    given = [f"model_name_or_path={tmp_path / 'first'}", f"domain={tmp_path / 'notes.txt'}", f"output_dir={tmp_path / 'out'}"]
    given += ["expand.k=4", "score.max_items=4", "tune.max_items=4", "tune.max_steps=2", "tune.block_size=64"]
    given += ["eval.max_items=4", "eval.general_limit=9"]
    assert main(["run", *given, "expand.k=5"]) == 2 and "from 1 to 4" in capsys.readouterr().err
    assert main(["run", *given, "score.regret=0.1"]) == 2 and "expand.k must be a whole number from 1 to 3" in capsys.readouterr().err
    assert main(["run", *given, "expand.budget.parameters=0.9"]) == 0, capsys.readouterr().err
    assert "alpha 1 is the largest share" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "eval.json").read_text())["dial"]["limit"] == 9
    tuned = AdeptConfig.load(tmp_path / "out" / "tuned")
    assert [(entry.copied_from, entry.round) for entry in tuned.inserted] == [(0, 0), (0, 1), (1, 1), (2, 0), (2, 1), (3, 1)]
    assert tuned.source == record.source and tuned.trained == (2, 4, 7, 9)
    shares = AdeptConfig.load(tmp_path / "out" / "expanded").selection["shares"]
    assert shares["parameters"] == pytest.approx(tuned.parameters["trainable"] / sum(each.numel() for each in first.parameters()))
    mine = [entry.layer for entry in tuned.inserted if entry.round == 1]
    remove_copies(tmp_path / "out" / "tuned", tmp_path / "without", mine)
    assert _same(stored_tensors(tmp_path / "without"), stored_tensors(tmp_path / "first"))
    remove_copies(tmp_path / "out" / "tuned", tmp_path / "plain")
    assert _same(stored_tensors(tmp_path / "plain"), stored_tensors(base))


@pytest.mark.slow
def test_a_model_saved_again_in_another_dtype_says_so(tmp_path: Path) -> None:
    base = tiny_models.checkpoint(tmp_path / "base")
    expand_checkpoint(base, tmp_path / "one", [1], verify=False)
    AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.bfloat16).save_pretrained(tmp_path / "again")
    with pytest.raises(ExpansionError, match="bit for bit"):
        remove_copies(tmp_path / "again", tmp_path / "no")
    record = expand_checkpoint(tmp_path / "again", tmp_path / "two", [0], verify=False)
    assert record.source["saved_again"] and record.source["name_or_path"] == str(base)
    remove_copies(tmp_path / "two", tmp_path / "plain")
    expected = {name: tensor.bfloat16() for name, tensor in stored_tensors(base).items()}
    assert _same(stored_tensors(tmp_path / "plain"), expected)


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].view(torch.uint8).equal(other[name].view(torch.uint8)) for name in one)


def test_a_broken_period_is_warned_of(tmp_path: Path) -> None:
    """Gemma 3's windows come every so many layers: config.json lists them after a copy, but an engine that counts layers is wrong."""
    tiny_families.model("gemma3_text").save_pretrained(tmp_path / "gemma")
    record = expand_checkpoint(tmp_path / "gemma", tmp_path / "expanded", [1], verify=False)
    assert [note.partition(":")[0] for note in record.selection["notes"]] == ["layer_types repeated every 2 layers and no longer does"]
    types = json.loads((tmp_path / "expanded" / "config.json").read_text())["layer_types"]
    assert types == [("sliding_attention", "full_attention")[index] for index in (0, 1, 1, 0, 1)]
    tiny_models.checkpoint(tmp_path / "qwen", "qwen3")
    assert expand_checkpoint(tmp_path / "qwen", tmp_path / "plain", [1], verify=False).selection["notes"] == []
