"""Every type that transformers knows: a copy is silent, can learn, starts gently and is cut into units, or is refused with the reason."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from adept_fast.checkpoints.checkpoint import ModelFolder
from adept_fast.errors import UnsupportedFamilyError
from adept_fast.expansion.expand_model import copies, expand_model, freeze_original
from adept_fast.expansion.verify import verify_expansion
from adept_fast.models.decoder_layers import decoder_layers, hidden_of, layers_path
from adept_fast.models.silent_copies import describe
from adept_fast.optim import AdamW
from adept_fast.scoring.settings import GRANULARITIES
from adept_fast.scoring.units import Units
from tests.support import families_table, tiny_families

pytestmark = pytest.mark.slow

SUPPORTED = """
afmoe apertus apertus1p5_text arcee aria_text axk1 axk2 bailing_hybrid bamba biogpt bitnet bloom codegen cohere cohere2 cohere2_moe
cohere_compass_text ctrl cwm deepseek_v2 deepseek_v3 deepseek_v32 doge dots1 dots3_note dots3_note_text emu3 ernie4_5 ernie4_5_moe
exaone exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text gemma4 gemma4_text
gemma4_unified gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa got_ocr2 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj
granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax
inkling_text internlm3 iquestcoder jais2 jetmoe kimi_linear kolibri1 laguna lara_mini lfm2 lfm2_moe lfm3 llama llama4 llama4_text mamba
mamba2 megatron-bert mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral moshi
moss_transcribe_diarize mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe opt persimmon phi phi3 phi4_multimodal phimoe
qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next recurrent_gemma roberta-prelayernorm
sarvam_mla sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm xlm-roberta-xl xlstm youtu
""".split()
REFUSED = {
    "bart": "an encoder-decoder, or the decoder of one; adept_fast is for decoder-only models",
    "beam": "layer 0: it scales the residual stream",
    "bert": "layer 0: its output is not its input plus branches (found NativeLayerNorm on the way)",
    "bert-generation": "layer 0: its output is not its input plus branches (found NativeLayerNorm on the way)",
    "big_bird": "layer 0: its output is not its input plus branches (found NativeLayerNorm on the way)",
    "bigbird_pegasus": "an encoder-decoder, or the decoder of one; adept_fast is for decoder-only models",
    "blenderbot": "an encoder-decoder, or the decoder of one; adept_fast is for decoder-only models",
    "blenderbot-small": "an encoder-decoder, or the decoder of one; adept_fast is for decoder-only models",
    "blt": "no list of None decoder layers found",
    "camembert": "layer 0: its output is not its input plus branches (found NativeLayerNorm on the way)",
    "cpmant": "reads ahead: hidden states depend on later tokens, so next-token losses mean nothing: adept_fast is for causal models",
    "data2vec-text": "layer 0: its output is not its input plus branches (found NativeLayerNorm on the way)",
    "dbrx": "what it computes depends on values, not on shapes alone",
    "deepseek_v4": "layer 0: its output is not its input plus branches (found Bmm on the way)",
    "diffllama": "self_attn.lambda_init depends on the layer's index (layer 0)",
    "dory": "layer 0: it scales the residual stream",
    "electra": "layer 0: its output is not its input plus branches (found NativeLayerNorm on the way)",
    "ernie": "layer 0: its output is not its input plus branches (found NativeLayerNorm on the way)",
    "gemma3n_text": "layer 0: its output is not its input plus branches (found CopySlices on the way)",
    "git": "layer 0: its output is not its input plus branches (found NativeLayerNorm on the way)",
    "gpt_neox_japanese": "attention.dense_bias depends on the layer's index (layer 3)",
    "hrm_text": "no list of 32 decoder layers found",
    "hy_v4": "layer 0 picks the tokens that layer 1 attends to: copy another layer",
    "inkling2_text": "layer 0: its output is not its input plus branches (found Div on the way)",
    "inkling2_loop_text": "layer 0: its output is not its input plus branches (found Div on the way)",
    "jamba": "the kind of feed_forward depends on the layer's index (layer 0)",
    "longcat_flash": "no list of 8 decoder layers found",
    "marian": "an encoder-decoder, or the decoder of one; adept_fast is for decoder-only models",
    "mbart": "an encoder-decoder, or the decoder of one; adept_fast is for decoder-only models",
    "minimax": "layer 0: its output is not its input plus branches (found Sum on the way)",
    "mllama": "layer 3 takes no part when the input is text",
    "modernbert-decoder": "the kind of attn_norm depends on the layer's index (layer 0)",
    "mvp": "an encoder-decoder, or the decoder of one; adept_fast is for decoder-only models",
    "openai-gpt": "its layers return lists",
    "pegasus": "an encoder-decoder, or the decoder of one; adept_fast is for decoder-only models",
    "plbart": "an encoder-decoder, or the decoder of one; adept_fast is for decoder-only models",
    "prophetnet": "layer 0: its output is not its input plus branches (found NativeLayerNorm on the way)",
    "qwen4_exp": "what it computes depends on values, not on shapes alone",
    "qwen4_exp_text": "what it computes depends on values, not on shapes alone",
    "reformer": "its layers return ReformerOutputs",
    "rembert": "layer 0: its output is not its input plus branches (found NativeLayerNorm on the way)",
    "roberta": "layer 0: its output is not its input plus branches (found NativeLayerNorm on the way)",
    "roc_bert": "layer 0: its output is not its input plus branches (found NativeLayerNorm on the way)",
    "roformer": "layer 0: its output is not its input plus branches (found NativeLayerNorm on the way)",
    "rwkv": "layer 0: it scales the residual stream",
    "trocr": "an encoder-decoder, or the decoder of one; adept_fast is for decoder-only models",
    "whisper": "an encoder-decoder, or the decoder of one; adept_fast is for decoder-only models",
    "xlm": "what it computes depends on values, not on shapes alone",
    "xlm-roberta": "layer 0: its output is not its input plus branches (found NativeLayerNorm on the way)",
    "xlnet": "layer 0: its output is not its input plus branches (found NativeLayerNorm on the way)",
    "xmod": "layer 0: its output is not its input plus branches (found NativeLayerNorm on the way)",
    "zamba": "its layers share parameters",
    "zamba2": "its layers share parameters",
    "zaya": "mlp.gate.router_states_scale depends on the layer's index (layer 0)",
}
NOT_A_MODEL_OF_ITS_OWN = {
    "gemma3n": "its text model is gemma3n_text, and refused as that is (its vision tower needs timm)",
    "gemma4_assistant": "drafts for another model, whose keys and values it needs",
    "gemma4_unified_assistant": "drafts for another model, whose keys and values it needs",
    "gpt-sw3": "the tokenizer's name: its model is gpt2",
    "musicgen": "an encoder-decoder, or the decoder of one; adept_fast is for decoder-only models",
    "musicgen_melody": "an encoder-decoder, or the decoder of one; adept_fast is for decoder-only models",
}
IDS = torch.arange(2, 26).view(2, 12) * 7 % tiny_families.VOCABULARY


@cache
def expanded(model_type: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    base = tiny_families.model(model_type)
    return base, expand_model(base, [0, 2, 3])


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_supported(model_type: str) -> None:
    base, model = expanded(model_type)
    verify_expansion(base, model)
    _units_cover_each_copy_once(model)
    _an_unsilenced_copy_changes_the_logits(base, model)
    _first_step_is_gentle_and_all_branches_learn(model)
    expanded.cache_clear()


@torch.no_grad()
def _an_unsilenced_copy_changes_the_logits(base: torch.nn.Module, model: torch.nn.Module) -> None:
    copy = copies(model)[1]  # of layer 2
    silent = {name: tensor.clone() for name, tensor in copy.state_dict().items()}
    copy.load_state_dict(decoder_layers(base)[2].state_dict())
    assert not model(input_ids=IDS, use_cache=False).logits.equal(base(input_ids=IDS, use_cache=False).logits)
    copy.load_state_dict(silent)


def _units_cover_each_copy_once(model: torch.nn.Module) -> None:
    freeze_original(model)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for granularity in GRANULARITIES:
        units = Units.of(model, granularity)
        assert set(units.slices) == set(trainable)
        assert all(
            cut.unit.shape == trainable[name].shape[cut.dim :][: cut.unit.ndim] or len(cut.unit) == 1 for name, cut in units.slices.items()
        )
        assert int(units.sizes.sum()) == sum(parameter.numel() for parameter in trainable.values())
        assert len({unit.name for unit in units}) == len(units) and int(units.sizes.min()) > 0


def _first_step_is_gentle_and_all_branches_learn(model: torch.nn.Module) -> None:
    """One step of AdamW at lr 1e-5 changes |layer(x) - x| / |x| by less than 1e-3; after three every silent tensor has moved, and what the
    module that holds it gives, 0 before, is not 0."""
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-5, weight_decay=0.1)
    silent = describe(model).silent
    before = {}
    assert not any(_branches(model, silent).values())
    for step in range(3):
        logits = model(input_ids=IDS, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        if step == 0:
            for index in model.adept_config.trained:
                tensors = dict(decoder_layers(model)[index].named_parameters())
                before |= {(index, name): tensors[name].detach().clone() for name in silent[index] if name in tensors}
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            assert max(_relative_outputs(model)) < 1e-3
    for (index, name), tensor in before.items():
        assert not torch.equal(tensor, decoder_layers(model)[index].get_parameter(name)), f"{name} did not learn"
    branches = _branches(model, silent)
    assert all(branches.values()), [name for name, adds in branches.items() if not adds]


@torch.no_grad()
def _branches(model: torch.nn.Module, silent: Sequence[Mapping[str, float]]) -> dict[str, bool]:
    """Whether the module that holds a silenced tensor (all of a list's experts together) gives anything but 0, for each copy."""
    found: dict[str, bool] = {}
    handles = []
    for index in model.adept_config.trained:
        for name in [name for name, value in silent[index].items() if value <= 0]:
            path = name.rpartition(".")[0]
            branch = f"{index}: {re.sub(r'[.][0-9]+(?=[.]|$)', '', path)}"

            def measure(module: torch.nn.Module, args: tuple, output: object, branch: str = branch) -> None:
                found[branch] = found.get(branch, False) or bool(hidden_of(output).any())

            handles.append(decoder_layers(model)[index].get_submodule(path).register_forward_hook(measure))
    model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    assert len(found) >= len(model.adept_config.trained)
    return found


@torch.no_grad()
def _relative_outputs(model: torch.nn.Module) -> list[float]:
    found: list[float] = []

    def measure(module: torch.nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        entry = args[0] if args else kwargs["hidden_states"]
        found.append(float((hidden_of(output) - entry).norm() / entry.norm()))

    handles = [layer.register_forward_hook(measure, with_kwargs=True) for layer in copies(model)]
    model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    assert min(found) > 0
    return found


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_by_name_with_the_reason(model_type: str) -> None:
    with pytest.raises(UnsupportedFamilyError, match=re.escape(REFUSED[model_type]) + "$") as refusal:
        expand_model(tiny_families.model(model_type), [0, 2, 3])
    assert str(refusal.value).startswith(f"{tiny_families.model(model_type).config.model_type}: ")


def test_enough_types_are_supported() -> None:
    assert len(set(SUPPORTED)) >= 90 and set(SUPPORTED) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert sorted([*SUPPORTED, *REFUSED, *NOT_A_MODEL_OF_ITS_OWN]) == sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize("model_type", ["musicgen", "musicgen_melody"])
def test_what_is_no_decoder_alone_is_refused_from_its_config(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedFamilyError, match=f"^{model_type}: {re.escape(NOT_A_MODEL_OF_ITS_OWN[model_type])}$"):
        ModelFolder(tmp_path).skeleton()


def test_what_drafts_for_another_model_is_refused() -> None:
    model = tiny_families.model("llama")
    model.forward = lambda inputs_embeds=None, shared_kv_states=None: None
    with pytest.raises(UnsupportedFamilyError, match="^llama: drafts for another model, whose keys and values it needs$"):
        layers_path(model)


def test_layers_that_attend_to_what_others_picked() -> None:
    """hy_v4: a "shared" layer takes its tokens from the "full" one before it. Where none follows, and of a shared one, a copy is silent."""
    base = tiny_families.model("hy_v4")
    assert base.config.indexer_types == ["full", "shared"] * 2
    model = expand_model(base, [1, 3])
    verify_expansion(base, model)
    assert model.config.indexer_types == ["full", "shared", "shared", "full", "shared", "shared"]


def test_the_table_in_docs_is_current() -> None:
    table = families_table.table(SUPPORTED, {**REFUSED, **NOT_A_MODEL_OF_ITS_OWN})
    assert (Path(__file__).parents[2] / "docs" / "reference" / "families.md").read_text() == table
