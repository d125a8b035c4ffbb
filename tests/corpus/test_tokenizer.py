"""The tokenizer against tiktoken, `tokenizers` and transformers, and where it comes from."""

from __future__ import annotations

import http.server
import json
import os
import threading
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from x1_pretrain.corpus import vocabulary
from x1_pretrain.corpus.tokenizer import Tokenizer, byte_letters, load_tokenizer, parse_tokenizer
from x1_pretrain.corpus.vocabulary import Published, byte_level_json, find_tokenizer, train_tokenizer
from x1_pretrain.errors import UserError

SHARED = Path(os.environ.get("X1_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
GPT2_CACHE = SHARED / "tiktoken"
needs_gpt2 = pytest.mark.skipif(not GPT2_CACHE.is_dir(), reason="GPT-2's vocabulary files are not at hand")

ADVERSARIAL = [
    "",
    " ",
    "\n\n\n  x",
    "  \n \t\u00a0\u2003 \u3000x",
    "a<|endoftext|>b",
    "<|endoftext|>" * 3,
    "<|im_start|>user\n<|endofprompt|>",
    "it's we'LL 'tis I'd've",
    "caf\u00e9 cafe\u0301 \u00df \u0130i \u01c5",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467\U0001f3fd \U0001f1e9\U0001f1ea",
    "\x00\x01\x1f\x7f\x80\ufffe\uffff\U0010ffff",
    "\r\n\r\r\n",
    "123456 ١٢٣ \u2167 \u00bd",
    "漢字 かな 한글 ไทย नमस्ते עברית العربية",
    "a" * 5000,
    " " * 3000,
    "ab" * 2000 + "!?" * 2000,
    "\ufeffx",
]


@cache
def gpt2() -> Tokenizer:
    return find_tokenizer("gpt2", GPT2_CACHE)


@cache
def trained() -> Tokenizer:
    return train_tokenizer(library_texts(), 1024)


def library_texts() -> list[str]:
    """Real text that every machine has: modules of Python's own library."""
    folder = Path(os.__file__).parent
    return [p.read_text(encoding="utf-8") for p in sorted(folder.glob("[a-d]*.py"))]


@cache
def reference(which: str) -> tokenizers.Tokenizer:
    """The same tokenizer.json, run by the `tokenizers` library; text is only text."""
    slow = tokenizers.Tokenizer.from_str((gpt2() if which == "gpt2" else trained()).json_text)
    slow.encode_special_tokens = True
    return slow


@needs_gpt2
@pytest.mark.parametrize("text", ADVERSARIAL)
def test_gpt2_is_tiktokens_gpt2(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(GPT2_CACHE))
    encoding = tiktoken.get_encoding("gpt2")
    assert gpt2().encode(text).tolist() == encoding.encode_ordinary(text)
    assert (gpt2().vocab_size, gpt2().eot_id) == (encoding.n_vocab, encoding.eot_token) == (50257, 50256)
    assert gpt2().engine.name == "tiktoken"


@needs_gpt2
@settings(max_examples=300)
@given(st.text(max_size=200))
def test_gpt2_agrees_with_tokenizers_and_returns(text: str) -> None:
    ids = gpt2().encode(text)
    assert ids.tolist() == reference("gpt2").encode(text, add_special_tokens=False).ids
    assert gpt2().decode(ids) == text


@settings(max_examples=300)
@given(st.text(max_size=200))
def test_a_learned_vocabulary_agrees_with_tokenizers_and_returns(text: str) -> None:
    assert trained().engine.name == "tiktoken"
    ids = trained().encode(text)
    assert ids.tolist() == reference("trained").encode(text, add_special_tokens=False).ids
    assert trained().decode(ids) == text
    assert trained().token_bytes()[ids].sum() == len(text.encode())


def test_a_trained_vocabulary_agrees_on_all_it_was_trained_on() -> None:
    texts = library_texts()
    slow = reference("trained").encode_batch_fast(texts, add_special_tokens=False)
    for ours, theirs in zip(trained().encode_batch(texts), slow, strict=True):
        assert ours.tolist() == theirs.ids


@pytest.mark.slow
def test_each_character_alone_and_in_company_is_cut_alike() -> None:
    """The two libraries bring their own Unicode tables and regular expressions."""
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = [f"a{c}a 1{c}1 !{c}! {c} \n{c}" for c in characters]
    slow = reference("trained").encode_batch_fast(texts, add_special_tokens=False)
    fast = trained().encode_batch(texts)
    assert [c for c, a, b in zip(characters, fast, slow, strict=True) if a.tolist() != b.ids] == []


def test_a_trained_vocabulary_has_the_asked_size_and_ends_with_the_end() -> None:
    tokenizer = trained()
    vocab = json.loads(tokenizer.json_text)["model"]["vocab"]
    assert len(vocab) == tokenizer.vocab_size == 1024
    assert vocab["<|endoftext|>"] == tokenizer.eot_id == 1023
    assert train_tokenizer(library_texts(), 1024).sha256 == tokenizer.sha256


def test_a_small_text_gives_a_smaller_vocabulary() -> None:
    tokenizer = train_tokenizer(["aaaa aaaa"], 4096)
    assert 257 < tokenizer.vocab_size < 300
    assert tokenizer.eot_id == tokenizer.vocab_size - 1


# ab (257) is learned after bc (256): "abc" alone becomes a, bc. tiktoken would go on to abc, also a token.
CROSSED = [("b", "c"), ("a", "b"), ("ab", "c")]


def crossed_json() -> str:
    vocab = {letter: i for i, letter in enumerate(byte_letters())}
    vocab |= {left + right: 256 + i for i, (left, right) in enumerate(CROSSED)}
    return byte_level_json(vocab | {"<|endoftext|>": 259}, [" ".join(pair) for pair in CROSSED], 259)


def test_where_tiktoken_would_differ_tokenizers_runs_and_says_so() -> None:
    tokenizer = parse_tokenizer(crossed_json(), "crossed", "crossed")
    a = json.loads(crossed_json())["model"]["vocab"]["a"]
    assert tokenizer.encode("abc").tolist() == [a, 256]
    assert tokenizer.engine.name == "tokenizers"
    assert "258" in tokenizer.note


def changed(**changes: Any) -> str:
    return json.dumps(json.loads(trained().json_text) | changes)


NORMALIZED = {"normalizer": {"type": "NFC"}}


@pytest.mark.parametrize("change", [{}, NORMALIZED], ids=["tiktoken", "tokenizers"])
def test_text_that_looks_special_is_text(change: dict[str, Any]) -> None:
    tokenizer = parse_tokenizer(changed(**change), "t", "t")
    assert tokenizer.engine.name == ("tokenizers" if change else "tiktoken")
    ids = tokenizer.encode("a<|endoftext|>b")
    assert tokenizer.eot_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b"
    assert tokenizer.token_bytes()[tokenizer.eot_id] == 0


def test_a_stored_limit_does_not_cut_documents_short() -> None:
    limit = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    tokenizer = parse_tokenizer(changed(truncation=limit, **NORMALIZED), "t", "t")
    text = "one two three four five six seven eight nine ten eleven twelve"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_of_a_sentencepiece_like_vocabulary() -> None:
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["\u2581the", -1.0], ["<0x0A>", -2.0]]}
    end = {"id": 3, "content": "</s>", "special": True, "normalized": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    tree = {"version": "1.0", "added_tokens": [end | flags], "model": model}
    tokenizer = parse_tokenizer(json.dumps(tree), "t", "t")
    assert tokenizer.token_bytes()[1:].tolist() == [4, 1, 0]  # " the", a byte, the end
    assert (tokenizer.eot_id, tokenizer.vocab_size) == (3, 4)
    assert "Unigram" in tokenizer.note


@needs_gpt2
def test_transformers_loads_it_and_agrees(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_text(gpt2().json_text, encoding="utf-8")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert len(theirs) == 50257
    for text in ADVERSARIAL:
        assert theirs(text, split_special_tokens=True)["input_ids"] == gpt2().encode(text).tolist()
    assert theirs("<|endoftext|>")["input_ids"] == [50256]


@needs_gpt2
def test_the_bytes_of_ids_add_up_to_the_text() -> None:
    lengths = gpt2().token_bytes()
    assert lengths.shape == (50257,)
    assert lengths.dtype == np.int32
    for text in ADVERSARIAL:
        assert lengths[gpt2().encode(text)].sum() == len(text.encode())


def test_loading_from_a_folder_and_from_a_file_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(trained().json_text, encoding="utf-8")
    folder, file = load_tokenizer(tmp_path), load_tokenizer(tmp_path / "tokenizer.json")
    assert folder.sha256 == file.sha256 == trained().sha256
    assert find_tokenizer(str(tmp_path), None).sha256 == trained().sha256


NO_END = json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "can't be read"),
        ("{}", "not a tokenizer.json"),
        ("nonsense", "not a tokenizer.json"),
        (NO_END, "no end-of-doc"),
    ],
)
def test_a_bad_tokenizer_file_is_one_line(tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        load_tokenizer(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["train:", "train:256", "train:4k", "train:-1", "gpt3", "no/such/file.json"])
def test_a_bad_spec_names_the_kinds(spec: str) -> None:
    find = vocabulary.training_size if spec.startswith("train:") else partial(find_tokenizer, cache=None)
    with pytest.raises(UserError, match=r"--tokenizer .*expected.*train:"):
        find(spec)


# GPT-2's files, from a server on this machine


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/slow":
            time.sleep(120)
            return
        names = {"/vocab.bpe": vocabulary.GPT2_MERGES, "/encoder.json": vocabulary.GPT2_VOCAB}
        body = (GPT2_CACHE / REAL_NAMES[names[self.path].url.rsplit("/", 1)[1]]).read_bytes()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


REAL_NAMES = {
    "vocab.bpe": vocabulary.GPT2_MERGES.cache_name,
    "encoder.json": vocabulary.GPT2_VOCAB.cache_name,
}


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as listening:
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


def published_at(monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    for which, name in (("GPT2_MERGES", "vocab.bpe"), ("GPT2_VOCAB", "encoder.json")):
        sha256 = getattr(vocabulary, which).sha256
        monkeypatch.setattr(vocabulary, which, Published(f"{base}/{name}", sha256))


@needs_gpt2
def test_missing_files_are_downloaded_once(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    published_at(monkeypatch, server)
    assert find_tokenizer("gpt2", tmp_path / "cache").sha256 == gpt2().sha256
    published_at(monkeypatch, server)
    monkeypatch.setattr(vocabulary, "_download", None)
    assert find_tokenizer("gpt2", tmp_path / "cache").sha256 == gpt2().sha256


def test_no_network_is_one_line_that_says_how_to_fill_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    published_at(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(UserError) as caught:
        find_tokenizer("gpt2", tmp_path)
    text = str(caught.value)
    names = (vocabulary.GPT2_MERGES.cache_name, vocabulary.GPT2_VOCAB.cache_name)
    assert all(word in text for word in ("vocab.bpe", "--tokenizer-cache", "TIKTOKEN_CACHE_DIR", *names))
    assert "\n" not in text


def test_the_published_cache_names_are_tiktokens() -> None:
    assert REAL_NAMES["vocab.bpe"] == "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
    assert REAL_NAMES["encoder.json"] == "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"


def test_a_server_that_never_answers_is_given_up(
    server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(vocabulary, "DOWNLOAD_LIMIT_S", 0.3)
    monkeypatch.setattr(vocabulary, "GPT2_MERGES", Published(f"{server}/slow", "0" * 64))
    began_s = time.monotonic()
    with pytest.raises(UserError, match="no answer within"):
        find_tokenizer("gpt2", tmp_path)
    assert time.monotonic() - began_s < 60


@needs_gpt2
def test_a_damaged_cache_is_said_to_be_damaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    published_at(monkeypatch, "http://127.0.0.1:9")
    (tmp_path / vocabulary.GPT2_MERGES.cache_name).write_text("#version: 0.2\nh e\n")
    with pytest.raises(UserError, match="is damaged in the cache"):
        find_tokenizer("gpt2", tmp_path)
