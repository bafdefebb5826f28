import pytest
from saved_networks import save_run

from engram_lab.cli import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "memory")
    save_run(folder / "plain", memory=False)
    return folder


def said(capsys, *arguments):
    status = main(["inspect", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_it_prints_and_writes_the_page(runs, tmp_path, capsys):
    out = tmp_path / "new" / "page.html"
    status, shown, err = said(capsys, runs / "memory", "--text", "the <cat> sat – 東京", "--out", out)
    assert (status, err) == (0, "")
    for heading in ("Gates", "LogitLens", "Memory switched off", "block 1: mean"):
        assert heading in shown
    assert str(out) in shown
    page = out.read_text(encoding="utf-8")
    assert str(runs / "memory") in page
    assert "<cat>" not in page
    assert "Memory switched off" in page


def test_without_out_nothing_is_written(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said(capsys, runs / "memory" / "model", "--text", "the cat")[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_the_page_is_checked_before_the_network_is_opened(runs, capsys, monkeypatch):
    monkeypatch.setattr("engram_lab.model_commands.open_saved", None)
    assert said(capsys, runs / "memory", "--text", "x", "--out", runs)[0] == 2


def test_a_network_without_memory_says_so(runs, tmp_path, capsys):
    status, shown, _ = said(capsys, runs / "plain", "--text", "the cat", "--out", tmp_path / "page.html")
    assert status == 0
    assert "This network has no memory" in shown
    assert "This network has no memory" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["memory", "--text", ""], "The text is empty"),
        (["memory", "--text", "the cat " * 3000], "give a passage of at most 4,095"),
        (["memori", "--text", "x"], "there is no checkpoint"),
        (["memory", "--text", "x", "--out", "memory"], "cannot be written: it is a folder"),
        (["none", "--text", "x", "--out", "plain/model/model.json/page.html"], "takes no new files"),
    ],
    ids=["empty", "long", "missing", "folder", "file as folder"],
)
def test_a_mistake_is_one_sentence(runs, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(runs)
    status, _, err = said(capsys, *arguments)
    assert status == 2
    assert sentence in err
    assert err.count("\n") == 1
