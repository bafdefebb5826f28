import errno
import json
import sys
from unittest.mock import Mock

import pytest
import torch
from saved_networks import save_run
from tokenizers import Tokenizer, models, pre_tokenizers

from engram_lab.cli import main
from engram_lab.errors import UserError
from engram_lab.model.attention import AttentionConfig
from engram_lab.model.cache import Cache
from engram_lab.model.generation import Sampling, generate
from engram_lab.model_commands import HotRowsOption, keep_hot_rows
from engram_lab.saved_model import SavedModel, open_saved
from engram_lab.text.vocabulary import train_tokenizer

PROMPT = "the cat – 東"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "abc"
    return directory, *save_run(directory)


def said(capsys, *arguments):
    status = main(["generate", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def decoded(network, tokenizer, drawn):
    """The text of drawn ids as a whole, without an unfinished end."""
    text = tokenizer.decode([token for token in drawn if token != network.eos_id], skip_special_tokens=False)
    controls = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
    return text.translate(controls).rstrip("\n\ufffd")


@pytest.mark.parametrize("inside", ["", "model"])
@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        (["--temperature", "0"], Sampling(temperature=0)),
        (["--seed", "7"], Sampling(seed=7)),
        (
            ["--temperature", "2", "--top-k", "40", "--top-p", "0.9"],
            Sampling(temperature=2, top_k=40, top_p=0.9),
        ),
    ],
    ids=["greedy", "seed", "all"],
)
def test_it_prints_the_prompt_and_what_the_network_says(run, capsys, inside, options, sampling):
    directory, network, tokenizer = run
    ids = [network.eos_id, *tokenizer.encode(PROMPT).ids]
    (drawn,) = generate(network, [ids], 30, sampling)
    status, out, err = said(capsys, directory / inside, PROMPT, "--tokens", 30, *options)
    assert (status, err) == (0, "")
    assert out.rstrip("\n\ufffd") == PROMPT + decoded(network, tokenizer, drawn)
    assert len(out) > len(PROMPT)


@pytest.mark.parametrize("options", [["--temperature", 0], ["--seed", 3]], ids=["greedy", "seed"])
def test_the_text_is_the_same_wherever_the_rows_are(run, capsys, options):
    directory = run[0]
    expected = said(capsys, directory, PROMPT, "--tokens", 40, *options)
    assert expected[0] == 0
    for tier in ("host", "disk", "disk"):  # the second time the file is there
        assert said(capsys, directory, PROMPT, "--tokens", 40, "--memory", tier, *options) == expected
    files = list((directory / "model").glob("[!.]*.table*"))
    assert len(files) == 2, "one table and the mark that it is whole"
    for file in files:
        file.unlink()


@pytest.mark.parametrize("cause", ["full", "closed", "damaged", "in the way"])
def test_a_file_that_cannot_be_used_is_told_with_what_the_command_can_do(
    tmp_path, capsys, monkeypatch, cause
):
    save_run(tmp_path / "run")
    model, asked = tmp_path / "run" / "model", [tmp_path / "run", "x", "--tokens", 1, "--memory", "disk"]
    if cause in ("full", "closed"):
        reason = OSError(errno.ENOSPC if cause == "full" else errno.EROFS, "the system's words")
        name = "os.posix_fallocate" if cause == "full" else "engram_lab.memory.serving.FileLock.acquire"
        monkeypatch.setattr(name, Mock(side_effect=reason))
    else:
        assert said(capsys, *asked)[0] == 0
        (table,) = model.glob("[!.]*.table")
        if cause == "damaged":
            table.write_bytes(table.read_bytes()[:100])
        else:
            for file in model.glob(f"{table.name}*"):
                file.unlink()
            table.mkdir()
    status, _, err = said(capsys, *asked)
    assert status == 2
    assert err.endswith(
        "keep the table elsewhere (a recipe's memory.directory or memory.tier, generate's --memory).\n"
    )


def test_a_network_without_a_table_has_nothing_to_place(tmp_path, capsys):
    save_run(tmp_path / "run", memory=False)
    status, out, err = said(capsys, tmp_path / "run", "x", "--memory", "host")
    assert (status, out) == (2, "")
    assert "reads no table by n-gram" in err


def test_an_empty_text_begins_a_document(run, capsys):
    directory, network, tokenizer = run
    (drawn,) = generate(network, [[network.eos_id]], 3, Sampling(temperature=0))
    _, out, _ = said(capsys, directory, "", "--tokens", 3, "--temperature", 0)
    assert out.rstrip("\n\ufffd") == decoded(network, tokenizer, drawn)


def test_a_runs_identity_is_enough(run, tmp_path, capsys, monkeypatch):
    directory, _, _ = run
    identity = "0123456789abcdef"
    (tmp_path / "mlruns" / "runs").mkdir(parents=True)
    (tmp_path / "mlruns" / "runs" / identity).symlink_to(directory)
    monkeypatch.chdir(tmp_path)
    by_path = said(capsys, directory, PROMPT, "--tokens", 3)
    assert said(capsys, identity, PROMPT, "--tokens", 3) == by_path
    status, _, err = said(capsys, "0123456789abcdee", PROMPT)
    assert status == 2
    assert f"Did you mean 'mlruns/runs/{identity}'?" in err


@pytest.mark.parametrize("prompt", ["the cat sat", "the cat ", ""])
def test_words_are_joined_as_the_tokenizer_joins_them(run, tmp_path, capsys, monkeypatch, prompt):
    """For a vocabulary of whole words too: prompt and continuation are one text, with its spaces."""
    directory, network, _ = run
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2, "sat": 3, "[EOS]": 4}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    saved = SavedModel(folder=directory, network=network, tokenizer=words)
    monkeypatch.setattr("engram_lab.model_commands.open_saved", lambda *_: saved)
    monkeypatch.setattr("engram_lab.model_commands.stream", lambda *_: iter([[1], [2]]))
    assert said(capsys, directory, prompt)[1] == (prompt.rstrip() + " the cat").lstrip() + "\n"


def test_a_blank_at_the_end_of_the_text_is_not_doubled(run, capsys):
    directory, _, _ = run
    _, without, _ = said(capsys, directory, "the cat", "--tokens", 20, "--seed", 3)
    _, out, _ = said(capsys, directory, "the cat ", "--tokens", 20, "--seed", 3)
    assert out == "the cat " + without.removeprefix("the cat").removeprefix(" ")


def test_special_tokens_written_out_are_plain_text(run, capsys):
    status, out, _ = said(capsys, run[0], "a<|endoftext|>b", "--tokens", 1)
    assert status == 0
    assert out.startswith("a<|endoftext|>b")


class Pipe:
    """Standard output that remembers what had been written at every flush."""

    def __init__(self):
        self.parts, self.text = [], ""

    def write(self, text):
        self.text += text

    def flush(self):
        self.parts.append(self.text)
        self.text = ""


def test_every_token_is_shown_as_soon_as_it_is_a_character(run, monkeypatch):
    directory, network, tokenizer = run
    (drawn,) = generate(network, [[network.eos_id, *tokenizer.encode(PROMPT).ids]], 12, Sampling(seed=1))
    monkeypatch.setattr(sys, "stdout", Pipe())
    assert main(["generate", str(directory), PROMPT, "--tokens", "12", "--seed", "1"]) == 0
    parts = sys.stdout.parts
    assert parts[0] == PROMPT
    assert 5 < len(parts[1:]) <= len(drawn) + 1
    assert "".join(parts).rstrip("\n\ufffd") == PROMPT + decoded(network, tokenizer, drawn)


def test_an_interruption_ends_the_line(run, capsys, monkeypatch):
    def interrupted(*_):
        yield [run[1].eos_id + 66]
        raise KeyboardInterrupt

    monkeypatch.setattr("engram_lab.model_commands.stream", interrupted)
    status, out, err = said(capsys, run[0], "the")
    assert (status, err) == (130, "")
    assert out.startswith("the")
    assert out.endswith("\n")


def test_a_length_beyond_the_one_trained_with_is_told_in_a_line(run, tmp_path, capsys):
    """As a run's recipe has it; a model folder alone does not tell."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(run[0] / "model")
    given = len(open_saved(run[0]).encode(PROMPT))
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(f"data: {{sequence_length: {given + 9}}}")  # reads given + 9, and foretells one more
    ends = ["--temperature", 0, "--tokens"]
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        assert said(capsys, folder, PROMPT, *ends, 10)[2] == ""
        status, out, err = said(capsys, folder, PROMPT, *ends, 11)
        assert err == (
            f"warning: the network was trained on {given + 9} tokens at a time, and this asks for up to "
            f"{given + 11}, the text's {given} among them: how it writes beyond {given + 9} is untried\n"
        )
        assert (status, out, "") == said(capsys, run[0], PROMPT, *ends, 11)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tokens", "0"], "--tokens is 0, but must be at least 1.\n"),
        (["--tokens=2.5"], "--tokens is 2.5, but must be a whole number.\n"),
        (["--temperature", "-1"], "--temperature is -1, but must be at least 0.\n"),
        (["--temperature", "nan"], "--temperature is nan, but must be a finite number.\n"),
        (["--temperature", "hot"], "--temperature is hot, but must be a number.\n"),
        (["--top-k", "0"], "--top-k is 0, but must be at least 1.\n"),
        (["--top-p", "0"], "--top-p is 0, but must be above 0 and at most 1.\n"),
        (["--top-p", "1.5"], "--top-p is 1.5, but must be above 0 and at most 1.\n"),
        (["--seed", str(2**63)], f"--seed is {2**63}, but must be at least 0 and at most {2**63 - 1}.\n"),
        (["--device", "gpu"], "device is 'gpu', but must be one of cpu, cuda, mps"),
        (["--device", "cpu:x"], "device is 'cpu:x'"),
    ],
)
def test_a_wrong_option_is_one_sentence(run, capsys, options, sentence):
    status, out, err = said(capsys, run[0], "x", *options)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {sentence}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "attention",
    [
        AttentionConfig(n_heads=2),
        AttentionConfig(n_heads=2, n_kv_heads=1),
        AttentionConfig(kind="latent", n_heads=2, latent_dim=6),
    ],
    ids=["all heads", "one head", "latent"],
)
def test_tokens_that_no_memory_remembers_are_refused_before_it_is_reserved(
    tmp_path, capsys, monkeypatch, attention
):
    """The limit is what a cache of so many tokens really holds."""
    network, _ = save_run(tmp_path / "run", attention=attention)
    ids = torch.tensor([[network.eos_id, 1, 2]])
    cache = Cache.start(network.config.n_layers, torch.zeros(1, dtype=torch.int64), 3, network.eos_id)
    network(ids, cache=cache)
    kept = sum(tensor.nbytes for layer in cache.layers for tensor in layer.kept)
    monkeypatch.setattr("engram_lab.model_commands.available_memory", lambda: kept)
    arguments = [tmp_path / "run", "", "--device", "cpu", "--tokens"]
    assert said(capsys, *arguments, 2)[0] == 0  # and one that begins the document
    status, out, err = said(capsys, *arguments, 10**12)
    assert (status, out) == (2, "")
    assert err.startswith("error: --tokens is 1,000,000,000,000, whose keys and values need ")
    assert err.endswith("but 0.0 GiB are available; ask for fewer than 3.\n")
    assert said(capsys, *arguments, 3)[0] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_gpu_is_one_sentence(run, capsys):
    status, _, err = said(capsys, run[0], "x", "--device", "cuda:1")
    assert (status, err) == (2, "error: device is 'cuda:1', but this machine has no such device: use cpu.\n")


def damage(directory, change):
    save_run(directory)
    model = directory / "model"
    if change == "weights":
        (model / "model.safetensors").unlink()
    elif change == "tokenizer":
        (model / "tokenizer.json").unlink()
    elif change == "other tokenizer":
        train_tokenizer(["quite another text, another"] * 3, 280).save(str(model / "tokenizer.json"))
    elif change == "hash":
        record = json.loads((model / "model.json").read_text())
        (model / "model.json").write_text(json.dumps(record | {"hash_version": 99}))
    elif change == "unfinished":
        for file in model.iterdir():
            file.unlink()
        (directory / "recipe.yaml").touch()
    else:
        (model / "model.json").unlink()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("record", "is no checkpoint: give a run's directory, or the folder in it that holds model.json."),
        ("weights", "holds no model.safetensors."),
        ("tokenizer", "holds no tokenizer.json: copy the one there that the network was trained with."),
        ("other tokenizer", "use the tokenizer it was trained with."),
        ("hash", "use the version it was trained with."),
        (
            "unfinished",
            "has not finished, so it has no weights yet: run its recipe again, which continues it.",
        ),
    ],
)
def test_an_unusable_checkpoint_is_one_sentence(tmp_path, capsys, change, sentence):
    damage(tmp_path / "run", change)
    status, out, err = said(capsys, tmp_path / "run", "x")
    assert (status, out) == (2, "")
    assert err.endswith(sentence + "\n")
    assert err.count("\n") == 1


def test_a_missing_checkpoint_says_what_to_give(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for missing in ("nowhere", "0123456789abcdef", "a/b/c"):
        status, out, err = said(capsys, missing, "x")
        assert (status, out) == (2, "")
        assert err.startswith("error: there is no checkpoint '")
        assert "give the directory or the 16 digits of a finished run, which `engram-lab run RECIPE`" in err
        assert err.count("\n") == 1


def test_hot_rows_are_those_that_the_text_reads_most(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat " + "on on " * 40)
    saved = open_saved(run[0], "cpu", "host")
    share = keep_hot_rows(saved, HotRowsOption(rows=4, text=text))
    often = saved.network.hash(torch.tensor([saved.encode("on on on on on")]))[0, 0, -1]
    (table,) = saved.network.tables
    assert (table.hot.find(often.long()) >= 0).all()
    assert len(table.hot.records) == 4
    assert 0.3 < share < 1
    assert keep_hot_rows(saved, HotRowsOption(rows=10**6, text=text)) == 1
    table.close()
    table.store.close()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--hot-rows", 5], "--hot-rows and --hot-text go together"),
        (["--hot-text", "x"], "--hot-rows and --hot-text go together"),
        (["--hot-rows", 0, "--hot-text", "x"], "--hot-rows is 0, but must be at least 1."),
        (["--hot-rows", 5, "--hot-text", "x"], "but --memory is resident: add --memory host."),
        (
            ["--hot-rows", 5, "--hot-text", "x", "--memory", "host", "--device", "cpu"],
            "but the network computes on cpu: leave it out.",
        ),
    ],
)
def test_hot_rows_that_nothing_would_read_are_refused(run, capsys, options, sentence):
    status, out, err = said(capsys, run[0], "x", *options)
    assert (status, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


def test_a_hot_text_that_cannot_be_read_is_one_sentence(run, tmp_path):
    saved = open_saved(run[0], "cpu", "host")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xfa")
    for name, reason in (("missing", "No such file"), ("bytes", "it is no text in UTF-8")):
        with pytest.raises(UserError, match=f"--hot-text is .*{name}.* be read: {reason}"):
            keep_hot_rows(saved, HotRowsOption(rows=4, text=tmp_path / name))


def test_a_missing_checkpoint_names_the_nearest(run, capsys):
    status, _, err = said(capsys, run[0].with_name("abd"), "x")
    assert status == 2
    assert "there is no checkpoint" in err
    assert f"Did you mean {str(run[0])!r}?" in err
