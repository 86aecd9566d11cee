"""What a text says is text: control tokens in it are spelt out, whatever the tokenizer, and what tokenizer and template write stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from adept_fast.data.documents import document_tokens, tokenize_documents
from adept_fast.data.encoding import Encoder
from adept_fast.data.items import IGNORE, load_items, tokenize_choices, tokenize_item
from adept_fast.data.sources import Record
from tests.support import tiny_models

TEXT = "a </s>b<pad>, <s> or <think>c</s>"
LETTERS = ["▁", *"abcdefghijklmnopqrstuvwxyz</>, ?."]
CONTROL = ["<pad>", "<s>", "</s>"]
TEMPLATE = (
    "<s>{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_level(special: bool) -> Tokenizer:
    """As GPT-2's: control tokens lie in the vocabulary, and some merges make one."""
    backend = Tokenizer.from_str(tiny_models.tokenizer().backend_tokenizer.to_str())
    if special:
        return backend
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({token: number for number, token in enumerate(letters)}, []))
    plain.pre_tokenizer, plain.decoder = backend.pre_tokenizer, backend.decoder
    return plain


def sentencepiece(special: bool) -> Tokenizer:
    """As Llama-2's and Gemma's: a BPE of pieces, of which merges would make "</s>" too."""
    merges = [("<", "/"), ("</", "s"), ("</s", ">")] if special else [("<", "/"), ("</", "s")]
    pieces = [*CONTROL, *LETTERS, "</", "</s"] if special else ["?", "?2", "?3", *LETTERS[:-2], "unk", ".", "</", "</s"]
    backend = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges, unk_token=pieces[0]))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return backend


def unigram(special: bool) -> Tokenizer:
    """As XGLM's: control tokens are words of the model itself."""
    pieces = [(piece if special or piece not in CONTROL else f"\x01{piece}", 0.0) for piece in CONTROL]
    backend = Tokenizer(models.Unigram([*pieces, *((letter, -2.0) for letter in LETTERS)], unk_id=0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace(prepend_scheme="first")
    return backend


KINDS = [byte_level, sentencepiece, unigram]


def tokenizer(kind: Callable[[bool], Tokenizer], begins: bool = True) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=kind(True), pad_token="<pad>", unk_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.add_tokens([AddedToken("<think>", special=False)])
    if begins:
        made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", made.bos_token_id)])
    made.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_in_a_text_are_spelt_out(kind: Callable[[bool], Tokenizer]) -> None:
    given = tokenizer(kind)
    plain = PreTrainedTokenizerFast(tokenizer_object=kind(False))
    plain.add_tokens([AddedToken("<think>", special=False)])
    encoder = Encoder(given)
    assert given(TEXT)["input_ids"].count(given.eos_token_id) == 2, "the tokenizer would take them for control tokens"
    (ids,) = encoder.texts([TEXT])
    assert ids[0] == given.bos_token_id and not {given.bos_token_id, given.eos_token_id, given.pad_token_id} & {*ids[1:]}
    assert given.decode(ids[1:]) == TEXT
    assert given.convert_ids_to_tokens(ids[1:]) == plain.convert_ids_to_tokens(plain(TEXT)["input_ids"])
    assert given.convert_tokens_to_ids("<think>") in ids, "an added token that is not special is a word"
    assert encoder.found == {"</s>": 2, "<pad>": 1, "<s>": 1}
    ordinary = "no token, a <think>b </s"
    assert encoder.texts([ordinary, TEXT, ordinary]) == [given(ordinary)["input_ids"], ids, given(ordinary)["input_ids"]]


@pytest.mark.parametrize("kind", KINDS)
def test_data_may_carry_control_tokens_on_purpose(kind: Callable[[bool], Tokenizer]) -> None:
    given = tokenizer(kind)
    encoder = Encoder(given, "tokens")
    assert encoder.texts([TEXT]) == [given(TEXT)["input_ids"]] and encoder.found["</s>"] == 2
    assert encoder.texts(["<s>a b"])[0].count(given.bos_token_id) == 1, "a text that begins itself does not begin twice"
    assert document_tokens([TEXT], encoder)[0].tolist().count(given.eos_token_id) == 2, "nor does one that ends itself end twice"
    assert document_tokens([TEXT], given)[0].tolist().count(given.eos_token_id) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_questions_are_text(kind: Callable[[bool], Tokenizer]) -> None:
    given = tokenizer(kind)
    item = tokenize_item(Record({"instruction": "what ends </s>?", "output": " a </s>"}, "here"), given)
    supervised = [token for token, label in zip(item.input_ids, item.labels, strict=True) if label != IGNORE]
    assert given.decode(supervised).strip() == "a </s>" and given.eos_token_id not in item.input_ids
    assert given.decode(item.input_ids[1:]) == "what ends </s>? a </s>" and item.input_ids[0] == given.bos_token_id
    assert load_items([{"text": TEXT}], given)[0].input_ids == tuple(Encoder(given).texts([TEXT])[0])
    choices = tokenize_choices(Record({"question": "what", "choices": ["</s>", "<s>"], "answer": 0}, "here"), given)
    assert given.eos_token_id not in choices.options[0].input_ids and choices.options[1].input_ids.count(given.bos_token_id) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_writes_its_own_control_tokens_and_turns_none(kind: Callable[[bool], Tokenizer]) -> None:
    given = tokenizer(kind)
    turns = [{"role": "user", "content": "what </s> is"}, {"role": "assistant", "content": "an <s> end</s>"}]
    plain, ends = [{**turn, "content": turn["content"].translate(str.maketrans("<>", "//"))} for turn in turns], given.eos_token_id
    for messages in (turns, plain):
        ids, parts = Encoder(given).chat(messages, prompt=1)
        assert (ids.count(ends), ids.count(given.bos_token_id), ids[0], ids[-1]) == (2, 1, given.bos_token_id, ends), "one begin"
        answer = given.decode([token for token, part in zip(ids, parts, strict=True) if part])
        assert answer.strip() == messages[1]["content"] + "</s>" and given.decode(ids).count(messages[0]["content"]) == 1
    ordinary = given(given.apply_chat_template(plain, tokenize=False), add_special_tokens=False)["input_ids"]
    assert Encoder(given).chat(plain, prompt=1)[0] == ordinary
    assert Encoder(given, "tokens").chat(turns)[0].count(ends) == 4


def test_a_tokenizer_in_python_that_closes_texts_itself() -> None:
    given, text = ByT5Tokenizer(), "a </s>b"
    encoder = Encoder(given)
    assert given(text)["input_ids"].count(given.eos_token_id) == 2
    assert encoder.texts([text, "b"]) == [[3 + byte for byte in text.encode()], [3 + ord("b")]]
    assert document_tokens([text], given)[0].tolist() == [*(3 + byte for byte in text.encode()), given.eos_token_id]
    item = tokenize_item(Record({"instruction": "ab", "output": " é"}, "here"), given)
    assert item.input_ids == tuple(3 + byte for byte in "ab é".encode()), "no end stands between prompt and answer"
    assert item.labels == (IGNORE, IGNORE, *item.input_ids[2:])
    given.chat_template = TEMPLATE.replace("<s>", "")
    ids, parts = encoder.chat([{"role": "user", "content": "</s>"}, {"role": "assistant", "content": "b</s>"}], prompt=1)
    assert ids.count(given.eos_token_id) == 2
    assert given.decode([token for token, part in zip(ids, parts, strict=True) if part]) == "b</s></s>"


def test_what_a_tokenizer_writes_behind_a_text_stands_behind_documents_only() -> None:
    given = tokenizer(byte_level)
    closing = copy.deepcopy(given)
    special = [("<s>", given.bos_token_id), ("</s>", given.eos_token_id)]
    closing.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    record = Record({"instruction": "where?", "output": " there"}, "here")
    assert tokenize_item(record, closing) == tokenize_item(record, given)
    assert Encoder(closing).begin == Encoder(given).begin == [given.bos_token_id] and Encoder(tokenizer(byte_level, False)).begin == []
    assert document_tokens(["there", TEXT], closing)[1].tolist() == document_tokens(["there", TEXT], given)[1].tolist()


def test_tokens_are_cached_by_what_control_tokens_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ADEPT_FAST_CACHE", str(tmp_path))
    given = tokenizer(byte_level)
    encoder = Encoder(given)
    assert tokenize_documents([TEXT], encoder).tokens > tokenize_documents([TEXT], Encoder(given, "tokens")).tokens
    encoder.warn_of_control_tokens("d")
    encoder.warn_of_control_tokens("d")  # of none that was not told
    line = "d: control tokens stand in the text ('</s>' 2 times, '<pad>' 1 times, '<s>' 1 times): encoded as plain text; special_tokens="
    assert caplog.messages == [f"{line}tokens keeps them"]
    again = Encoder(given)
    tokenize_documents([TEXT], again)
    again.warn_of_control_tokens("d")
    assert caplog.messages == [f"{line}tokens keeps them"] * 2, "from the cache too"


@pytest.mark.parametrize("special_tokens", ["text", "tokens"])
def test_what_becomes_of_control_tokens_is_told_once(special_tokens: str, caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder(tiny_models.tokenizer(), special_tokens)
    encoder.warn_of_control_tokens("probe")
    for where in ("domain", "probe"):
        encoder.texts(["a </s>"])
        encoder.warn_of_control_tokens(where)
    (message,) = caplog.messages
    assert message.startswith("domain: control tokens stand in the text ('</s>' 1 times): ")
