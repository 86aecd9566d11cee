"""Damaged headers, indexes and configs: one line that names the file and nothing written, or an expansion that verifies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from adept_fast.checkpoints import checkpoint
from adept_fast.errors import InputError
from adept_fast.expansion.expand_checkpoint import expand_checkpoint
from adept_fast.expansion.verify import verify_expansion
from tests.support import tiny_models

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 40),
    st.floats(),
    st.sampled_from(["", "F32", "BF16", "I32", "U8", "F8_E4M3", "F4", "f32", "../x", "/etc/passwd", "\x00", "\ud800", "x" * 300, FIRST]),
    st.lists(st.integers(-3, 40), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(0, 9), max_size=2),
)


def cases(count: int) -> settings:
    phases = [Phase.generate, Phase.shrink]
    return settings(max_examples=count, derandomize=True, database=None, deadline=None, phases=phases, suppress_health_check=[*HealthCheck])


class Folder:
    """A checkpoint in two shards that is damaged and made whole again."""

    def __init__(self, parent: Path) -> None:
        self.parent, self.path = parent, parent / "model"
        tiny_models.model("llama", **SMALL).save_pretrained(self.path, max_shard_size="30KB")
        self.whole = {file.name: file.read_bytes() for file in self.path.iterdir()}
        assert {FIRST, SECOND, INDEX, "config.json"} <= set(self.whole)

    def write(self, **damaged: bytes) -> None:
        """Damage these files, and make all others whole again."""
        for name, content in (self.whole | damaged).items():
            if not (self.path / name).exists() or (self.path / name).read_bytes() != content:
                (self.path / name).write_bytes(content)

    def refuses_or_expands(self, **damaged: bytes) -> None:
        """Write the damaged files, expand, and hold the result to what it must be."""
        self.write(**damaged)
        target = self.parent / "expanded"
        shutil.rmtree(target, ignore_errors=True)
        try:
            expand_checkpoint(self.path, target, [1], verify=False)
        except InputError as error:
            assert "\n" not in str(error) and str(self.path) in str(error) and len(str(error)) < 1000, str(error)
            assert [file.name for file in self.parent.iterdir()] == ["model"]
            return
        model = checkpoint.load_model(target)
        verify_expansion(checkpoint.load_model(self.path), model)
        shutil.rmtree(target)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folder]:
    yield Folder(tmp_path_factory.mktemp("malformed"))


def split(content: bytes) -> tuple[bytes, bytes]:
    """Header and data."""
    length = int.from_bytes(content[:8], "little")
    return content[8 : 8 + length], content[8 + length :]


def joined(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@st.composite
def bytes_changed(draw: Callable[[st.SearchStrategy], Any], content: bytes) -> bytes:
    """Overwritten, inserted or deleted bytes, a cut or an extension."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(changed)))
        match draw(st.sampled_from("overwrite insert delete cut".split())):
            case "overwrite":
                new = draw(st.binary(min_size=1, max_size=4))
                changed[at : at + len(new)] = new
            case "insert":
                changed[at:at] = draw(st.binary(min_size=1, max_size=4)) if draw(st.booleans()) else b"[" * draw(st.integers(1, 5000))
            case "delete":
                del changed[at : at + draw(st.integers(1, 20))]
            case "cut":
                del changed[at:]
    return bytes(changed)


@st.composite
def table_changed(draw: Callable[[st.SearchStrategy], Any], table: dict[str, Any]) -> str:
    """JSON whose entries were renamed, removed, doubled, swapped, or got odd values, at any depth."""
    table = json.loads(json.dumps(table))
    doubled = None
    for _ in range(draw(st.integers(1, 2))):
        inner = table
        while (keys := [key for key, value in inner.items() if isinstance(value, dict) and value]) and draw(st.integers(0, 3)):
            inner = inner[draw(st.sampled_from(keys))]
        key, other = draw(st.sampled_from(list(inner))), draw(st.sampled_from(list(inner)))
        match draw(st.sampled_from("value element rename remove swap double".split())):
            case "value":
                inner[key] = draw(ODD)
            case "element" if isinstance(inner[key], list) and inner[key]:
                inner[key][draw(st.integers(0, len(inner[key]) - 1))] = draw(ODD)
            case "rename":
                inner[draw(st.one_of(st.text(max_size=5), st.just(key.replace("0", "1")), st.just(key + "\ud800")))] = inner.pop(key)
            case "remove":
                del inner[key]
            case "swap":
                inner[key], inner[other] = inner[other], inner[key]
            case "double":
                doubled = key
        if not inner:
            break
    text = json.dumps(table)
    if doubled is not None and f'"{doubled}": ' in text:
        text = text.replace(f'"{doubled}": ', f'"{doubled}": 1, "{doubled}": ', 1)
    return text


@pytest.mark.nightly
@cases(800)
@given(data=st.data())
def test_headers(folder: Folder, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([FIRST, SECOND]))
    header, tensors = split(folder.whole[name])
    match data.draw(st.sampled_from("bytes table table table length".split())):
        case "bytes":
            damaged = joined(data.draw(bytes_changed(header)), tensors)
        case "table":
            damaged = joined(data.draw(table_changed(json.loads(header))).encode(), tensors)
        case "length":
            damaged = data.draw(st.integers(0, 2**64 - 1) | st.integers(0, 4000)).to_bytes(8, "little") + folder.whole[name][8:]
    folder.refuses_or_expands(**{name: damaged})


@pytest.mark.slow
@cases(400)
@given(data=st.data())
def test_files(folder: Folder, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([FIRST, SECOND]))
    content = folder.whole[name]
    cut = data.draw(st.integers(0, len(content) - 1))
    ways = [content[:cut], content + content[:cut] + b"\0", content[cut:], content[:cut] + content[cut + 1 :]]
    damaged = data.draw(st.sampled_from(ways))
    folder.refuses_or_expands(**{name: damaged})


@pytest.mark.nightly
@cases(400)
@given(data=st.data())
def test_indexes(folder: Folder, data: st.DataObject) -> None:
    content = folder.whole[INDEX]
    if data.draw(st.booleans()):
        damaged = data.draw(bytes_changed(content))
    else:
        damaged = data.draw(table_changed(json.loads(content))).encode()
    folder.refuses_or_expands(**{INDEX: damaged})


@pytest.mark.nightly
@cases(400)
@given(data=st.data())
def test_configs(folder: Folder, data: st.DataObject) -> None:
    """What says which tensors there are; the rest of config.json is transformers' to check."""
    config = json.loads(folder.whole["config.json"])
    keys = [*SMALL, "vocab_size", "head_dim", "model_type", "tie_word_embeddings", "attention_bias", "architectures"]
    if data.draw(st.integers(0, 3)):
        config[data.draw(st.sampled_from(keys))] = data.draw(st.one_of(st.integers(-2, 64), ODD))
        damaged = json.dumps(config).encode()
    else:
        damaged = folder.whole["config.json"][: data.draw(st.integers(0, len(folder.whole["config.json"]) - 3))]
    folder.refuses_or_expands(**{"config.json": damaged})


@pytest.mark.parametrize("layers", [0, 1, 3, 10**12])
def test_a_config_that_contradicts_the_tensors_names_both(folder: Folder, layers: int) -> None:
    config = json.loads(folder.whole["config.json"]) | {"num_hidden_layers": layers}
    folder.write(**{"config.json": json.dumps(config).encode()})
    with pytest.raises(InputError, match="config.json"):
        expand_checkpoint(folder.path, folder.parent / "expanded", [0], verify=False)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *(("num_hidden_layers", many, "has num_hidden_layers") for many in (10**6, 10**30)),
        *((key, 10**12, "describes [0-9,]+ parameters, but there are") for key in ("vocab_size", "intermediate_size")),
        ("num_experts", 10**6, "has num_experts 1000000, but no tensor has"),
    ],
)
def test_a_config_of_sizes_that_no_tensor_has_is_refused_before_it_is_built(folder: Folder, key: str, value: int, message: str) -> None:
    config = json.loads(folder.whole["config.json"]) | {key: value}
    folder.write(**{"config.json": json.dumps(config).encode()})
    for load in (checkpoint.load_model, lambda folder: checkpoint.ModelFolder(folder).skeleton()):
        with pytest.raises(InputError, match=f"model/config.json: {message}"):
            load(folder.path)
