import dataclasses
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from text_samples import write_jsonl

from engram_lab.errors import UserError
from engram_lab.text import TextConfig, look_ahead, prepare
from engram_lab.text.shards import FORMAT
from engram_lab.text.split import document_hash
from engram_lab.text.vocabulary import load_tokenizer


def split_at(ids: np.ndarray, end: int) -> list[list[int]]:
    stops = np.flatnonzero(ids == end)
    assert stops[-1] == len(ids) - 1
    return [part[:-1].tolist() for part in np.split(ids, stops + 1)[:-1]]


def test_shards_are_what_the_rules_say(small, paragraphs):
    """The whole way again, the slow and plain way."""
    corpus = prepare(small)
    in_order = sorted(paragraphs, key=document_hash)
    below = sum(document_hash(text) < int(0.05 * 2**64) for text in paragraphs)
    tokenizer = corpus.tokenizer()
    for side, texts in ((corpus.validation, in_order[:below]), (corpus.train, in_order[below:])):
        expected = [i for text in texts for i in [*tokenizer.encode(text).ids, corpus.eos_id]]
        assert side.tolist() == expected
    assert (corpus.vocab_size, corpus.train.dtype, corpus.train.flags.writeable) == (400, np.uint16, False)
    assert isinstance(corpus.train, np.memmap)
    assert 5 <= below <= 50


def test_every_speech_comes_back(sotu, speeches):
    tokenizer = sotu.tokenizer()
    sides = [
        [tokenizer.decode(ids, skip_special_tokens=False) for ids in split_at(side, sotu.eos_id)]
        for side in (sotu.train, sotu.validation)
    ]
    assert sorted(sides[0] + sides[1]) == sorted(speeches)
    assert (len(sides[0]), len(sides[1])) == (221, 12)
    years = sorted(int(re.search(r"\d{4}", text[:90]).group()) for text in sides[1])
    assert max(np.diff([1790, *years, 2021])) <= 40
    held_out = sum(len(text.encode()) for text in sides[1])
    assert sotu.validation_bytes_per_token == pytest.approx(held_out / len(sotu.validation), rel=1e-12)
    uniform = math.log(sotu.vocab_size) / math.log(2) / sotu.validation_bytes_per_token
    assert 2 < uniform < 4  # bits per byte of knowing nothing: between chance and well packed


def test_defaults_of_sotu(sotu):
    assert (sotu.vocab_size, sotu.eos_id, sotu.train.dtype) == (8192, 0, np.uint16)
    assert len(sotu.train) > 2_000_000


def test_order_names_and_packing_of_the_source_do_not_matter(small, tmp_path, paragraphs):
    corpus = prepare(small)
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "1.jsonl", paragraphs[:100:-1])
    write_jsonl(folder / "2.jsonl", [*paragraphs[:101], "", "  \n", paragraphs[7], paragraphs[150]])
    again = prepare(dataclasses.replace(small, source=str(folder)))
    assert again.path != corpus.path
    assert again.data_hash == corpus.data_hash
    assert again.record.dropped_documents == 4


def test_hashes_tell_what_changed(small, tmp_path, paragraphs):
    corpus = prepare(small)
    other_split = prepare(dataclasses.replace(small, validation_fraction=0.2))
    other_size = prepare(dataclasses.replace(small, vocab_size=300))
    assert len({corpus.data_hash, other_split.data_hash, other_size.data_hash}) == 3
    assert corpus.tokenizer_hash != other_size.tokenizer_hash
    assert corpus.canonical_hash != other_size.canonical_hash
    elsewhere = prepare(dataclasses.replace(small, cache_dir=str(tmp_path / "elsewhere")))
    assert dataclasses.asdict(elsewhere.record) == dataclasses.asdict(corpus.record)


def test_a_second_call_builds_nothing(small):
    stages: list[tuple[str, float]] = []
    first = prepare(small, lambda stage, share: stages.append((stage, share)))
    names = list(dict.fromkeys(stage for stage, _ in stages))
    assert names == ["reading", "counting words", "merging pairs", "encoding", "ordering", "canonical ids"]
    for name in names:
        shares = [share for stage, share in stages if stage == name]
        assert shares == sorted(shares)
        assert all(0 <= share <= 1 for share in shares)
    stages.clear()
    assert prepare(small, lambda stage, share: stages.append((stage, share))).path == first.path
    assert not stages


def test_finished_shards_are_opened_elsewhere_without_their_text(small, tmp_path):
    built = prepare(small)
    carried = tmp_path / "elsewhere"
    shutil.copytree(built.path, carried)
    Path(small.source).unlink()
    there = TextConfig(source=str(carried), vocab_size=400, cache_dir=str(tmp_path / "no cache"))
    opened = prepare(there)
    assert opened.path == carried
    assert opened.data_hash == built.data_hash
    assert opened.train.tolist() == built.train.tolist()
    assert look_ahead(dataclasses.replace(there, vocab_size=None)).vocab_size == 400
    assert not (tmp_path / "no cache").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vocab_size": 500}, "vocab_size = 500: the shards in .* are finished with 400 ids"),
        ({"tokenizer": "own.json"}, "tokenizer = 'own.json': .* a tokenizer of their own"),
        ({"validation_fraction": 0.1}, "validation_fraction = 0.1: .* and split"),
    ],
)
def test_settings_that_finished_shards_cannot_follow_are_refused(small, changes, sentence):
    shards = str(prepare(small).path)
    with pytest.raises(UserError, match=sentence):
        prepare(TextConfig(source=shards, **changes))


def test_finished_shards_of_another_format_or_damaged_are_refused(small, tmp_path, monkeypatch):
    shards = prepare(small).path
    with monkeypatch.context() as newer:
        newer.setattr(sys.modules["engram_lab.text.prepare"], "FORMAT", FORMAT + 1)
        with pytest.raises(UserError, match=f"in format {FORMAT}; this version reads {FORMAT + 1}"):
            prepare(TextConfig(source=str(shards)))
    ids = np.load(shards / "train.npy")
    np.save(shards / "train.npy", np.roll(ids, 1))
    with pytest.raises(UserError, match="is damaged"):
        prepare(TextConfig(source=str(shards)))


def test_a_given_tokenizer_is_used_as_it_is(small, deepseek, paragraphs):
    config = dataclasses.replace(small, tokenizer=str(deepseek), vocab_size=None)
    corpus = prepare(config)
    assert (corpus.vocab_size, corpus.n_canonical, corpus.train.dtype) == (129_280, 99_092, np.uint32)
    tokenizer = load_tokenizer(deepseek)
    assert tokenizer.decode([corpus.eos_id], skip_special_tokens=False) == "<｜end▁of▁sentence｜>"
    sides = split_at(corpus.train, corpus.eos_id) + split_at(corpus.validation, corpus.eos_id)
    assert sorted(tokenizer.decode(ids) for ids in sides) == sorted(paragraphs)
    with pytest.raises(
        UserError, match=r"vocab_size = 400: the tokenizer .* has 129280 ids; write 129280 or"
    ):
        prepare(dataclasses.replace(config, vocab_size=400))


def test_special_tokens_written_in_a_text_end_nothing(small, tmp_path, paragraphs):
    texts = [f"{text} <|endoftext|> {i}" for i, text in enumerate(paragraphs)]
    corpus = prepare(dataclasses.replace(small, source=write_jsonl(tmp_path / "special.jsonl", texts)))
    ends = np.count_nonzero(corpus.train == corpus.eos_id) + np.count_nonzero(
        corpus.validation == corpus.eos_id
    )
    assert ends == len(texts)


def test_a_small_corpus_gives_the_ids_it_has(tmp_path):
    texts = ["the cat sat on the mat", "the dog sat on the log", "the end of the cat"]
    config = TextConfig(source=write_jsonl(tmp_path / "tiny.jsonl", texts), cache_dir=str(tmp_path / "cache"))
    corpus = prepare(config)
    assert 257 < corpus.vocab_size < 300
    assert corpus.vocab_size == corpus.tokenizer().get_vocab_size() == len(corpus.canonical)
    too_many = dataclasses.replace(config, vocab_size=16384)  # the same entry of the cache
    with pytest.raises(
        UserError, match=f"for {corpus.vocab_size} ids only; ask for at most {corpus.vocab_size}"
    ):
        prepare(too_many)
    with pytest.raises(UserError, match="ids only"):
        prepare(dataclasses.replace(too_many, vocab_size=1000))
    assert prepare(dataclasses.replace(config, vocab_size=corpus.vocab_size)).data_hash == corpus.data_hash


BAD_CORPORA = {
    "nothing": (b"", "holds 0 different documents"),
    "blanks only": (b'{"text": " \\n"}\n{"text": ""}\n', "holds 0 different documents"),
    "one document twice": (
        b'{"text": "a b"}\n{"text": "a b"}\n',
        "holds 1 different document; .* at least 2",
    ),
    "late mistake": (b'{"text": "fine"}\n' * 5 + b"{}\n", "line 6, has no field 'text'"),
}


@pytest.mark.parametrize("case", BAD_CORPORA)
def test_nothing_half_written_is_left(small, tmp_path, case):
    content, sentence = BAD_CORPORA[case]
    (tmp_path / "bad.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        prepare(dataclasses.replace(small, source=str(tmp_path / "bad.jsonl")))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_file_that_changes_while_it_is_read_is_refused(small):
    def append(stage: str, share: float) -> None:
        if stage == "encoding":
            with open(small.source, "a", encoding="utf-8") as stream:
                stream.write('{"text": "late"}\n')

    with pytest.raises(UserError, match="changed while it was read"):
        prepare(small, append)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("source", (), "name at least one file or folder"),
        ("source", "", "name at least one file or folder"),
        ("vocab_size", 256, "at least 257 ids"),
        ("validation_fraction", -0.1, "0 or more and below 1"),
        ("validation_fraction", 1.0, "0 or more and below 1"),
        ("validation_fraction", float("nan"), "0 or more and below 1"),
    ],
)
def test_values_out_of_range_are_refused_at_once(field, value, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        TextConfig(**{field: value})
    assert str(error.value).startswith(f"{field} = ")


def test_a_tokenizer_that_is_not_there_is_refused(small):
    with pytest.raises(UserError, match=r"tokenizer = 'no\.json' cannot be read: No such file"):
        prepare(dataclasses.replace(small, tokenizer="no.json"))


def test_the_import_is_light():
    program = (
        "import sys, engram_lab.text; print({'torch', 'lightning', 'pyarrow', 'mlflow'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
