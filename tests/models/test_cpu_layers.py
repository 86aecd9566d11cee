"""Plain decoder layers run natively: each kernel against its formula in fp64, whole sweeps against each layer's own forward."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from adept_fast import _C as native
from adept_fast.data.items import IGNORE, Item
from adept_fast.errors import InputError
from adept_fast.models.cpu_layers import has_native_layers, native_layers
from adept_fast.models.decoder_layers import decoder_layers
from adept_fast.scoring import layer_masking, sweep
from adept_fast.scoring.score_layers import score_layers
from tests.scoring.test_layer_masking import by_hooks
from tests.support import tiny_families, tiny_models

SETS = native.features()["instruction_sets"]
WIDE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
SHAPES = {"qwen2": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}}  # its heads divide the hidden size


def no_further_than_torch(found: Tensor, formula: Callable[..., Tensor], *inputs: Tensor) -> None:
    """From fp64 truth, but for twice its distance."""
    truth = formula(*(x.double() for x in inputs))
    mine, its = ((x.double() - truth).abs().max() for x in (found, formula(*inputs)))
    assert its > 0, "fp32 that is exact measures nothing"
    assert mine <= 2 * its


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize(("rows", "width", "threads"), [(1, 1, 1), (7, 33, 1), (300, 70, 3), (5, 576, 2)])
def test_norm(rows: int, width: int, threads: int, instructions: str) -> None:
    generator = torch.Generator().manual_seed(width)
    x, weight = torch.randn(rows, width, generator=generator) * 3, torch.randn(width, generator=generator)
    apart, placed = torch.full((rows + 1, width), 7.0), x.clone()
    for into in (apart, placed):
        source = placed if into is placed else x
        native.rms_norm(source.data_ptr(), weight.data_ptr(), into.data_ptr(), rows, width, 1e-3, threads, instructions)
    no_further_than_torch(placed, rms, x, weight)
    assert torch.equal(apart[:rows], placed)
    assert (apart[rows] == 7).all()


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize(("count", "threads"), [(31, 2), (40_003, 3)])
def test_gated_activation(count: int, threads: int, instructions: str) -> None:
    generator = torch.Generator().manual_seed(count)
    gate, up = torch.randn(count, generator=generator) * 20, torch.randn(count, generator=generator)
    found = torch.cat([gate, torch.full((3,), 7.0)])
    native.gated_activation(found.data_ptr(), up.data_ptr(), count, threads, instructions)
    no_further_than_torch(found[:count], lambda gate, up: functional.silu(gate) * up, gate, up)
    assert (found[count:] == 7).all()
    far, ones = torch.tensor([-200.0, 200.0, 0.0]), torch.ones(3)
    native.gated_activation(far.data_ptr(), ones.data_ptr(), 3, 1, instructions)
    assert far.tolist() == [0.0, 200.0, 0.0]


def causal(lengths: list[int], heads: int, key_heads: int, scale: float) -> Callable[..., Tensor]:
    def attend(queries: Tensor, keys: Tensor, values: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        def split(x: Tensor, count: int, turned: bool) -> Tensor:
            x = x.view(*x.shape[:2], count, -1).transpose(1, 2)
            if turned:
                a, b = x.chunk(2, -1)
                x = x * cosines + torch.cat([-b, a], -1) * sines
            return x.repeat_interleave(heads // count, 1)

        scores = scale * split(queries, heads, True) @ split(keys, key_heads, True).mT
        item = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        seen = (item[:, None] == item[None]).tril()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return (weights @ split(values, key_heads, False)).transpose(1, 2).flatten(2)

    return attend


@pytest.mark.parametrize("instructions", SETS)
@pytest.mark.parametrize(
    ("lengths", "heads", "key_heads", "width"),
    [([1], 1, 1, 32), ([6, 1, 17], 4, 2, 32), ([33, 7], 3, 1, 64), ([50], 2, 2, 96), ([12, 100], 3, 3, 128)],
)
def test_attention(lengths: list[int], heads: int, key_heads: int, width: int, instructions: str) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    sequences, tokens = 3, sum(lengths)
    queries, keys, values = (torch.randn(sequences, tokens, n * width, generator=generator) for n in (heads, key_heads, key_heads))
    cosines, sines = torch.randn(2, tokens, width, generator=generator)  # no turns, so that each half has factors of its own
    ends = torch.tensor(lengths).cumsum(0).tolist()
    given = [queries, keys, values, cosines, sines]
    found = []
    for threads, askers in ((1, torch.arange(tokens)), (3, torch.arange(tokens)), (2, torch.arange(tokens // 2, tokens, 2))):
        asking = queries[:, askers].contiguous()
        found.append(torch.full_like(asking, torch.nan))
        addresses = (x.data_ptr() for x in (asking, *given[1:], found[-1]))
        sizes = sequences, tokens, heads, key_heads, width, ends, askers.data_ptr(), len(askers)
        native.attention(*addresses, *sizes, 0.3, threads, instructions)
    assert torch.equal(*found[:2]), "threads change bits"
    torch.testing.assert_close(found[2], found[0][:, askers], rtol=1e-5, atol=1e-5)
    if tokens > 1:
        no_further_than_torch(found[0], causal(lengths, heads, key_heads, 0.3), *given)
    else:
        assert torch.equal(found[0], values.expand_as(queries))


def test_attention_of_large_scores() -> None:
    """Of scores in the hundreds the largest takes all, without an overflow."""
    queries, keys, values = (torch.randn(1, 20, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    ones, zeros, found = torch.ones(20, 32), torch.zeros(20, 32), torch.empty(1, 20, 32)
    given, askers = [queries * 30, keys * 30, values, ones, zeros], torch.arange(20)
    native.attention(*(x.data_ptr() for x in (*given, found)), 1, 20, 1, 1, 32, [20], askers.data_ptr(), 20, 1.0, 1)
    torch.testing.assert_close(found, causal([20], 1, 1, 1.0)(*given))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"width": 40}, "no multiple of 32"),
        ({"heads": 3, "key_heads": 2}, "no whole groups"),
        ({"ends": [3]}, "does not end"),
        ({"ends": [4, 4]}, "segments do not ascend"),
        ({"asking": 3}, "that ask do not ascend"),
        ({"tokens": 2, "ends": [2], "asking": 2}, "that ask do not ascend"),
        ({"heads": 0}, "no whole groups"),
        ({"sequences": -1}, "negative number of sequences"),
        ({"asking": 2}, "no queries, keys, values, turns or output"),
    ],
)
def test_wrong_shapes_are_refused(change: dict, says: str) -> None:
    askers = torch.tensor([1, 3, 3])
    sizes = {"sequences": 1, "tokens": 4, "heads": 2, "key_heads": 2, "width": 32, "ends": [4], "scale": 1.0, "threads": 1}
    with pytest.raises(ValueError, match=says):
        native.attention(0, 0, 0, 0, 0, 0, askers=askers.data_ptr(), **{**sizes, "asking": 0, **change})


def test_null_addresses_and_negative_sizes_are_refused() -> None:
    """C++ cannot know how long memory is, but it knows what is none."""
    x = torch.zeros(64)
    at, state = x.data_ptr(), torch.zeros(7, 2, dtype=torch.float64)
    targets = torch.zeros(2, dtype=torch.int64)
    block = {"logits": at, "rows": 2, "count": 16, "stride": 16, "first": 0, "targets": targets.data_ptr(), "bias": 0, "scale": 1.0}
    block |= {"softcap": 0.0, "variants": 0, "gradient": False, "state": state.data_ptr(), "state_stride": 2, "threads": 1}
    given = {"param": at, "param_format": 0, "grad": at, "grad_format": 0, "rows": 2, "columns": 3}
    given |= {"running": 0, "row_sums": 0, "column_sums": 0, "threads": 1}
    wrong = [
        *((native.softmax, {**block, **change}) for change in ({"logits": 0}, {"targets": 0}, {"state": 0}, {"state_stride": 1})),
        *((native.softmax, {**block, **change}) for change in ({"rows": -1}, {"first": -1}, {"count": 0}, {"stride": 8}, {"variants": 3})),
        *((native.saliency, {**given, **change}) for change in ({"grad": 0}, {"rows": -2}, {"param_format": -1}, {"grad_format": 3})),
        *((native.rms_norm, {"input": i, "weight": w, "output": o, "rows": 2, "width": 4, "epsilon": 0.1, "threads": 1})
          for i, w, o in ((0, at, at), (at, 0, at), (at, at, 0))),
        (native.rms_norm, {"input": at, "weight": at, "output": at, "rows": -1, "width": 4, "epsilon": 0.1, "threads": 1}),
        (native.rms_norm, {"input": at, "weight": at, "output": at, "rows": 1, "width": 0, "epsilon": 0.1, "threads": 1}),
        (native.gated_activation, {"gate": 0, "up": at, "count": 4, "threads": 1}),
        (native.gated_activation, {"gate": at, "up": at, "count": -4, "threads": 1}),
    ]  # fmt: skip
    for call, arguments in wrong:
        with pytest.raises(ValueError):
            call(**arguments)
    native.softmax(**block)
    native.saliency(**given)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_native_sweep_equals_bypassing_each_layer_in_turn(family: str) -> None:
    bias = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    model, items = tiny_models.model(family, **SHAPES.get(family, WIDE), **bias), tiny_models.items(5)
    plan = sweep.plan(model, items)
    assert plan.native and plan.pack > 0
    scores = score_layers(model, items, loss="all", losses=layer_masking.LOSSES)
    for name, values in by_hooks(model, items).items():
        assert max(map(abs, values)) > 0.01, "a bypass that changes nothing tests nothing"
        torch.testing.assert_close(torch.tensor(scores.profiles[name].values), torch.tensor(values), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"head_dim": 24}),
        ("granite", {"residual_multiplier": 0.3}),
        ("gemma", {}),
        ("olmo2", {}),
        ("mistral", {"sliding_window": 8}),  # seen on the longest item alone
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    ],
)
def test_other_layers_keep_their_own_forward(family: str, changes: dict) -> None:
    model, items = tiny_models.model(family, **{**SHAPES.get(family, WIDE), **changes}), tiny_models.items(5)
    plan = sweep.plan(model, items)
    assert plan.swept and not plan.native


@pytest.mark.parametrize("loss", ["all", "domain"])
def test_window_that_no_supervised_token_reaches_is_seen(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all tokens, and of another corpus, longer sequences are swept than of the answers."""
    model = tiny_models.model("mistral", **WIDE, sliding_window=20)
    whole = [item.input_ids for item in tiny_models.items(12, longest=60) if len(item.input_ids) > 30]
    short = [Item(ids[:8], ids[:8]) for ids in whole]
    answers = [Item(ids, (*ids[:8], *[IGNORE] * (len(ids) - 8))) for ids in whole]
    assert len(whole) > 2 and sweep.plan(model, short).native
    given = (answers, []) if loss == "all" else (short, [Item(ids, ids) for ids in whole])
    found = score_layers(model, given[0], loss="all", domain=given[1]).profiles[loss].values
    monkeypatch.setenv("ADEPT_FAST_BACKEND", "torch")
    expected = score_layers(model, given[0], loss="all", domain=given[1]).profiles[loss].values
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The calls of native attention."""
    calls, own = [], native.attention
    monkeypatch.setattr(native, "attention", lambda *given: calls.append(given) or own(*given))
    return calls


@torch.no_grad()
def test_no_native_layer_where_something_else_is_wanted_of_it(attended: list[tuple]) -> None:
    """Gradients, what autocast makes of products, and a forward of the layer that somebody put in its place."""
    model, items = tiny_models.model(**WIDE), tiny_models.items(2)
    plan, pack = sweep.plan(model, items), sweep.packed(items, [0], False)
    assert plan.native and attended

    def calls() -> tuple[int, Tensor]:
        attended.clear()
        hidden = sweep.sweep(model, pack, (), plan)
        return len(attended), hidden

    count, native_hidden = calls()
    assert count == 4
    assert [call[13] for call in attended] == [pack.tokens] * 3 + [len(pack.rows)] and len(pack.rows) < pack.tokens
    with torch.autocast("cpu", torch.bfloat16):
        assert calls()[0] == 0
    with torch.enable_grad():
        count, hidden = calls()
    assert count == 0 and hidden.requires_grad
    torch.testing.assert_close(hidden.detach(), native_hidden, rtol=1e-5, atol=1e-5)
    layer = decoder_layers(model)[1]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **kwargs) * 2
    count, hidden = calls()
    assert count == 3 and not torch.allclose(hidden, native_hidden)
    for other in decoder_layers(model):
        other.forward = layer.forward
    assert not has_native_layers(model)


@torch.no_grad()
@pytest.mark.parametrize(
    ("change_hidden", "change_turns", "natively"),
    [
        (torch.clone, torch.clone, True),
        (torch.clone, lambda x: x.mT.contiguous().mT, True),
        (lambda x: x.mT.contiguous().mT, torch.clone, False),
        (Tensor.bfloat16, torch.clone, False),
        (torch.clone, Tensor.bfloat16, False),
        (torch.clone, lambda x: x.repeat(3, 1, 1), False),
    ],
)
def test_only_plain_memory_is_read_and_written(change_hidden: Callable, change_turns: Callable, natively: bool, attended: list) -> None:
    model = tiny_models.model(**WIDE)
    hidden = torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(0))
    turns = tuple(map(change_turns, model.model.rotary_emb(hidden, torch.arange(9)[None])))
    layer, hidden = decoder_layers(model)[0], change_hidden(hidden)
    expected = layer(hidden, position_embeddings=turns)
    with native_layers(model, [9]):
        found = layer(hidden, position_embeddings=turns)
    assert len(attended) == natively and (found is hidden) == natively
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_layer_whose_modules_are_changed_runs_its_own_forward() -> None:
    """A hook, a forward put in the way and another kind of projection all have their say."""
    model = tiny_models.model(**WIDE)
    assert has_native_layers(model)
    for layer, place in zip(decoder_layers(model), ("self_attn.q_proj", "mlp", "input_layernorm", "mlp.down_proj"), strict=True):
        layer.get_submodule(place).register_forward_hook(lambda _, __, output: output * 0.5)
    assert not has_native_layers(model)
    model = tiny_models.model(**WIDE, num_hidden_layers=1)
    mlp = decoder_layers(model)[0].mlp
    mlp.forward = mlp.forward
    assert not has_native_layers(model)
    del mlp.forward
    assert has_native_layers(model)

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.Parameter(torch.ones(48))

        def forward(self, x: Tensor) -> Tensor:
            return functional.silu(x) * self.scales

    own, mlp.act_fn = mlp.act_fn, Scaled()
    assert not has_native_layers(model)
    mlp.act_fn = own
    for module in (mlp.act_fn, mlp.gate_proj, decoder_layers(model)[0].self_attn):
        hook = module.register_forward_pre_hook(lambda *_: None)
        assert not has_native_layers(model)
        hook.remove()
    assert has_native_layers(model)
    norm = decoder_layers(model)[0].input_layernorm
    kept, norm.weight = norm.weight, nn.Parameter(norm.weight.detach().repeat_interleave(2)[::2])
    assert not has_native_layers(model), "a weight that is not in one piece"
    norm.weight = kept
    mlp.up_proj.__class__ = Doubled
    assert not has_native_layers(model)
    assert not has_native_layers(tiny_models.model(dtype=torch.bfloat16, **WIDE))
    assert not has_native_layers(tiny_models.model(hidden_act="gelu", **WIDE))


@torch.no_grad()
@pytest.mark.parametrize("rows", [torch.tensor([1, 3], dtype=torch.int32), torch.tensor([1, 2, 3, 4])[::2], torch.tensor([[1]])], ids=str)
def test_rows_that_cpp_would_read_otherwise_are_refused(rows: Tensor) -> None:
    with pytest.raises(InputError, match="rows must be int64"), native_layers(tiny_models.model(**WIDE), [5], rows):
        pass


@pytest.mark.parametrize("place", ["input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"])
def test_weights_of_sizes_that_do_not_belong_together_are_left_to_their_modules(place: str) -> None:
    """Of other shapes, or with a storage that was shrunk, as FSDP1 does between its forwards."""
    model = tiny_models.model(**WIDE, num_hidden_layers=1)
    assert has_native_layers(model)
    module = decoder_layers(model)[0].get_submodule(place)
    kept = module.weight
    if place != "mlp.down_proj":
        module.weight = nn.Parameter(kept.detach()[:-1].clone())
        assert not has_native_layers(model)
    module.weight = nn.Parameter(kept.detach().clone())
    assert has_native_layers(model)
    module.weight.untyped_storage().resize_(0)
    assert not has_native_layers(model)


@pytest.mark.parametrize("place", ["input_layernorm", "mlp.up_proj"])
def test_weights_that_are_no_plain_parameters_are_left_to_their_module(place: str) -> None:
    """Quantised and sharded weights are other tensors; parametrized ones are computed anew."""

    class Quantised(Tensor):
        pass

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = tiny_models.model(**WIDE, num_hidden_layers=1)
    module = decoder_layers(model)[0].get_submodule(place)
    kept = module.weight
    module.weight = nn.Parameter(kept.detach().as_subclass(Quantised))
    assert not has_native_layers(model)
    module.weight = kept
    assert has_native_layers(model)
    parametrize.register_parametrization(module, "weight", Doubled())
    assert not has_native_layers(model)


@pytest.mark.parametrize("width", [32, 96])
def test_values_of_another_width_than_keys_are_no_plain_attention(width: int) -> None:
    model = tiny_families.model("mimo_v2_flash", head_dim=64, v_head_dim=width, vocab_size=tiny_models.VOCABULARY)
    assert not has_native_layers(model)


def test_native_layers_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model, items = tiny_models.model(**WIDE), tiny_models.items(3)
    plan = sweep.plan(model, items)
    monkeypatch.setenv("ADEPT_FAST_BACKEND", "torch")
    assert sweep.plan(model, items) == replace(plan, native=False, pack=plan.tokens // sweep.PACK_SHARE)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda lengths, rows: ([sum(lengths)], rows),
        lambda lengths, rows: (lengths, rows[: len(rows) // 2]),
        lambda lengths, rows: ([1], rows),
    ],
)
def test_a_plan_tries_packs_and_rows(wrong: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that are not kept apart, rows that are left out, and what C++ refuses."""
    model, items = tiny_models.model(**WIDE), tiny_models.items(3)
    assert sweep.plan(model, items).native
    alone = sweep.plan(model, items[:1])
    assert alone.native and alone.pack == 0, "packing is not tried on one item"
    monkeypatch.setattr(sweep, "native_layers", lambda model, lengths, rows: native_layers(model, *wrong(lengths, rows)))
    assert not sweep.plan(model, items).native


@torch.no_grad()
def test_hidden_states_of_a_sweep_in_parts() -> None:
    """Every bound, natively and not, gives the same hidden states to rounding."""
    model, items = tiny_models.model(**WIDE), tiny_models.items(4)
    plan = sweep.plan(model, items)
    whole = replace(plan, tokens=10**6, pack=10**6)
    packed = sweep.packed(items, range(4), False)
    expected = sweep.sweep(model, packed, range(4), replace(whole, native=False))
    for tokens, wanted in itertools.product((1, 2 * packed.tokens), (True, False)):
        found = sweep.sweep(model, packed, range(4), replace(whole, tokens=tokens, native=wanted))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
