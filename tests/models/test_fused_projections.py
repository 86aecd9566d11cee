"""Units of fused projections: move what a unit computes at one token, and see which heads answer, and at which tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adept_fast.expansion.expand_model import expand_model
from adept_fast.models.decoder_layers import decoder_layers
from adept_fast.scoring.units import Units
from tests.support import tiny_families

TOKENS = 5
LAYOUTS = {  # type -> changes of its config, its projections of queries, keys and values, the one of attention's output
    "gpt2": ({}, ("c_attn",), "c_proj"),
    "gpt_bigcode": ({}, ("c_attn",), "c_proj"),
    "gpt_bigcode, a key a head": ({"multi_query": False}, ("c_attn",), "c_proj"),
    "gpt_neox": ({}, ("query_key_value",), "dense"),
    "persimmon": ({}, ("query_key_value",), "dense"),
    "bloom": ({}, ("query_key_value",), "dense"),
    "falcon": ({}, ("query_key_value",), "dense"),
    "falcon, a key a head": ({"multi_query": False, "num_kv_heads": 4}, ("query_key_value",), "dense"),
    "falcon, groups": ({"new_decoder_architecture": True}, ("query_key_value",), "dense"),
    "codegen": ({"n_head": 8, "n_embd": 64, "rotary_dim": 4}, ("qkv_proj",), "out_proj"),
    "mpt": ({}, ("Wqkv",), "out_proj"),
    "phi3": ({}, ("qkv_proj",), "o_proj"),
    "llama": ({}, ("q_proj", "k_proj", "v_proj"), "o_proj"),
    "qwen3_next": ({"layer_types": ["full_attention"] * 4}, ("q_proj", "k_proj", "v_proj"), "o_proj"),
    "deepseek_v3": ({}, ("q_b_proj", "kv_b_proj"), "o_proj"),
}


def made(name: str) -> nn.Module:
    model_type, changes = name.partition(",")[0], LAYOUTS[name][0]
    model = expand_model(tiny_families.model(model_type, **changes), [1])
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in decoder_layers(model)[2].parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def answers(model: nn.Module, projection: nn.Module, output: nn.Module, features: Tensor, token: int) -> Tensor:
    """Where attention's output changes when `features` of a projection's result are moved at one token: bool [TOKENS, columns]."""
    seen, moved = [], False

    def move(module: nn.Module, given: object, result: Tensor) -> Tensor:
        if moved:
            result = result.clone()
            result[..., token, features] += torch.linspace(1, 2, len(features))
        return result

    handles = [projection.register_forward_hook(move), output.register_forward_pre_hook(lambda module, given: seen.append(given[0]))]
    ids = torch.arange(2, 2 + TOKENS)[None]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        moved = True
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return (seen[0] - seen[1]).reshape(TOKENS, -1).abs() > 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_head_of_a_fused_projection_moves_its_own_head(name: str) -> None:
    _, inputs, output_name = LAYOUTS[name]
    model = made(name)
    units = Units.of(model, "head")
    layer = decoder_layers(model)[2]
    named = dict(layer.named_modules())
    attention = next(path.rpartition(".")[0] for path in named if path.endswith(inputs[0]))
    path = next(full for full, module in model.named_modules() if module is layer)
    out = named[f"{attention}.{output_name}"]
    columns = units.slices[f"{path}.{attention}.{output_name}.weight"].unit
    heads = columns.unique()
    assert len(heads) == (8 if name == "codegen" else 4) and (columns.unique(return_counts=True)[1] == len(columns) // len(heads)).all()
    tried: dict[str, int] = {}
    for projection in inputs:
        unit_of = units.slices[f"{path}.{attention}.{projection}.weight"].unit
        numbers = unit_of.unique().tolist()
        parts = [units.units[index].kind.partition("[")[2].rstrip("]") or projection[0] for index in numbers]
        for index, part in zip(numbers, parts, strict=True):
            features = (unit_of == index).nonzero()[:, 0]
            at_first, at_second = (answers(model, named[f"{attention}.{projection}"], out, features, token) for token in (0, 1))
            number, count = tried.get(part, 0), parts.count(part)
            tried[part] = number + 1
            group = heads.view(count, -1)[number]
            assert at_second.any(0).equal(torch.isin(columns, group)), f"{part} {number} moves other heads than {group.tolist()}"
            later = at_second.any(1).tolist()
            if part in ("q", "gate"):  # what a token asks or lets through concerns that token; the first one can ask nothing else
                assert later == [False, True, False, False, False] and bool(at_first.any()) == (part == "gate")
            else:  # keys and values reach later tokens; a lone key has weight 1 whatever it is
                assert later == [False, True, True, True, True] and bool(at_first[0].any()) == (part == "v")
    assert set(tried) >= {"q", "v"} and tried["q"] == len(heads)


def test_heads_of_gpt2_are_cut_along_the_output_of_its_transposed_weights() -> None:
    units = Units.of(made("gpt2"), "head")
    cuts = {name.rpartition("layers.")[2].partition("attn.")[2]: cut for name, cut in units.slices.items() if "attn." in name}
    assert cuts["c_attn.weight"].dim == 1 and cuts["c_attn.bias"].unit.equal(cuts["c_attn.weight"].unit)
    assert cuts["c_proj.weight"].dim == 0 and len(cuts["c_proj.bias"].unit.unique()) == 1


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_an_expert_s_neuron_is_a_row_of_gate_and_up(model_type: str) -> None:
    """Without either of the two rows the model computes what it does without the column of down_proj that reads them."""
    model = expand_model(tiny_families.model(model_type), [1])
    generator = torch.Generator().manual_seed(7)
    layer = decoder_layers(model)[2]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    units = Units.of(model, "neuron")
    path = next(full for full, module in model.named_modules() if module is layer)
    fused, down = (
        next(name for name in units.slices if name.startswith(path) and name.endswith(end)) for end in ("gate_up_proj", "down_proj")
    )
    cut, ids = units.slices[fused], torch.arange(20)[None]
    assert cut.dim == 0 and cut.unit.shape == model.get_parameter(fused).shape[:2] and len(cut.unit.unique()) == cut.unit.numel()

    def logits_without(name: str, index: tuple) -> Tensor:
        parameter = model.get_parameter(name)
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter[index] = 0
            logits = model(input_ids=ids, use_cache=False).logits
            parameter.copy_(kept)
        return logits

    whole = logits_without(fused, (0, slice(0, 0)))
    for expert, row in ((0, 3), (2, 17)):
        expected = logits_without(down, (expert, slice(None), row))
        assert not torch.equal(expected, whole)
        for part in ("gate", "up"):
            name = f"{fused}[{expert},{part},{row}]"
            unit = next(index for index, found in enumerate(units) if found.name == name)
            assert units.units[unit].kind == f"gate_up_proj[{part}]" and units.units[unit].size == model.config.hidden_size
            found = logits_without(fused, tuple((cut.unit == unit).nonzero()[0].tolist()))
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
