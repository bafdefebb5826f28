from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram_lab.errors import UserError
from engram_lab.tracking import RunRecord, Terminated, open_run, owner, owner_alive, reap, running
from engram_lab.tracking.client import client
from engram_lab.tracking.record import tag_text

ROOT = Path(__file__).resolve().parents[2]

TRAINS = """
import sys, time
from engram_lab.tracking import open_run, running
record = open_run(sys.argv[1], "study", "cell", "a cell", {"study": "study"})
with running(record):
    record.log_values({"loss": 3.0}, step=1)
    print(record.run_id, flush=True)
    time.sleep(60)
"""


def state(record: RunRecord) -> tuple[str, str | None]:
    run = client(record.uri).get_run(record.run_id)
    return run.info.status, run.data.tags.get("reason")


def history(record: RunRecord, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client(record.uri).get_metric_history(record.run_id, key)]


def test_a_new_run_carries_what_readers_need(uri: str) -> None:
    parent = open_run(uri, "study", "study:study", "study", {"kind": "study", "study": "study"})
    tags = {"study": "study", "rho": 0.5, "slots": np.int64(7), "budget": np.float64(1e15), "control": ""}
    child = open_run(uri, "study", "ab12", "rho 0.5", {**tags, "rho_nominal": None}, parent.run_id)
    run = client(uri).get_run(child.run_id)
    expected = {
        **{"study": "study", "rho": "0.5", "slots": "7", "budget": "1000000000000000.0", "control": ""},
        **{"run": "ab12", "identity": "ab12", "kind": "trial", "openings": "1", "owner": owner()},
        "mlflow.parentRunId": parent.run_id,
    }
    assert {key: run.data.tags.get(key) for key in expected} == expected
    assert "rho_nominal" not in run.data.tags
    assert "reason" not in run.data.tags
    assert run.data.tags["code_version"]
    assert f"{os.cpu_count()} cores" in run.data.tags["machine"]
    assert (run.info.status, run.info.run_name) == ("RUNNING", "rho 0.5")
    assert client(uri).get_run(parent.run_id).data.tags["kind"] == "study"


def test_parameters_have_dotted_names_and_keep_their_first_values(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = open_run(uri, "study", "cell", "n")
    store, calls = client(uri), []
    log_batch = store.log_batch
    monkeypatch.setattr(store, "log_batch", lambda *a, **k: (calls.append(k), log_batch(*a, **k)))
    model = {"width": 64, "yarn": None, "ffn": {"experts": 12, "rate": 1e-3, "layers": [1, 2]}}
    many = {f"p{i}": i for i in range(95)}
    record.log_params({"model": model, "trainer": {}, "text": "x" * 9000, **many})
    assert len(calls) == 1
    params = client(uri).get_run(record.run_id).data.params
    assert params.pop("text") == "x" * 6000
    expected = {"model.width": "64", "model.ffn.experts": "12", "model.ffn.rate": "0.001"}
    assert params == expected | {"model.ffn.layers": "[1, 2]"} | {key: str(i) for key, i in many.items()}
    again = open_run(uri, "study", "cell", "n")
    again.log_params({"model": {"width": 128, "depth": 2}})
    params = client(uri).get_run(record.run_id).data.params
    assert (params["model.width"], params["model.depth"]) == ("64", "2")


def test_the_same_identity_is_the_same_run(uri: str) -> None:
    first = open_run(uri, "study", "cell", "name", {"rho": 0.5, "tokens": 10})
    first.log_values({"loss": 3.0}, step=1)
    first.fail("diverged at step 2: the loss is nan")
    assert state(first) == ("FAILED", "diverged at step 2: the loss is nan")

    again = open_run(uri, "study", "cell", "new name", {"rho": 0.25, "tokens": None})
    assert again == first
    assert state(again) == ("RUNNING", None)
    again.log_values({"loss": 2.0}, step=2)
    again.finish(1.5)
    run = client(uri).get_run(again.run_id)
    assert run.info.run_name == "new name"
    assert run.data.tags["rho"] == "0.25"
    assert "tokens" not in run.data.tags
    assert run.data.tags["openings"] == "2"
    assert run.data.metrics["final/loss"] == 1.5
    assert history(again, "loss") == [(1, 3.0), (2, 2.0)]
    assert state(again) == ("FINISHED", None)


def test_identities_are_told_apart(uri: str) -> None:
    runs = {open_run(uri, "study", identity, "n").run_id for identity in ("a", "b", "it's", "study:it's")}
    runs |= {open_run(uri, "other study", "a", "n").run_id}
    assert len(runs) == 5
    assert open_run(uri, "study", "it's", "n").run_id in runs


def test_a_deleted_run_is_not_continued(uri: str) -> None:
    first = open_run(uri, "study", "cell", "n")
    client(uri).delete_run(first.run_id)
    assert open_run(uri, "study", "cell", "n") != first


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, ("FINISHED", None)),
        (ValueError("bad\nnews"), ("FAILED", "ValueError: bad\nnews")),
        (KeyboardInterrupt(), ("KILLED", "interrupted (SIGINT)")),
        (KeyboardInterrupt("SIGTERM"), ("KILLED", "interrupted (SIGTERM)")),
        (Terminated(), ("KILLED", "terminated (SIGTERM)")),
        (SystemExit(0), ("FINISHED", None)),
        (SystemExit(3), ("FAILED", "SystemExit: 3")),
    ],
)
def test_leaving_the_block_tells_the_truth(uri: str, error: Any, expected: tuple[str, str | None]) -> None:
    record = open_run(uri, "study", "cell", "n")
    if error is None:
        with running(record):
            pass
    else:
        with pytest.raises(type(error)) as caught, running(record):
            raise error
        assert caught.value is error
    assert state(record) == expected


def test_lightning_s_way_of_taking_ctrl_c_counts_as_interrupted(uri: str) -> None:
    def fit() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    record = open_run(uri, "study", "cell", "n")
    with pytest.raises(SystemExit), running(record):
        fit()
    assert state(record) == ("KILLED", "interrupted (SIGINT)")


def test_a_store_that_is_gone_does_not_hide_the_error(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    record = open_run(uri, "study", "cell", "n")
    lost = RunRecord(record.uri, "0" * 32)
    with pytest.raises(ValueError, match="the real one"), running(lost):
        raise ValueError("the real one")
    assert "was not recorded" in caplog.text


def spawn(uri: str) -> tuple[subprocess.Popen[str], RunRecord]:
    command = [sys.executable, "-c", TRAINS, uri]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, RunRecord(uri, process.stdout.readline().strip())


@pytest.mark.parametrize(
    ("number", "status", "reason"),
    [(signal.SIGINT, 1, "interrupted (SIGINT)"), (signal.SIGTERM, 143, "terminated (SIGTERM)")],
)
def test_signals_to_a_process(uri: str, number: signal.Signals, status: int, reason: str) -> None:
    process, record = spawn(uri)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode in (status, -number)
    assert state(record) == ("KILLED", reason)


def test_a_killed_process_is_reaped_and_its_run_continues(uri: str) -> None:
    process, killed = spawn(uri)
    mine = open_run(uri, "study", "alive", "n")
    foreign = client(uri).create_run(client(uri).get_experiment_by_name("study").experiment_id)
    assert reap(uri, "study") == []
    process.kill()
    process.communicate()
    assert state(killed) == ("RUNNING", None)

    assert reap(uri, "study") == [killed.run_id]
    status, reason = state(killed)
    assert status == "KILLED"
    assert reason is not None
    assert reason.startswith("its process ended without a word")
    assert state(mine) == ("RUNNING", None)
    assert client(uri).get_run(foreign.info.run_id).info.status == "RUNNING"
    assert reap(uri, "study") == []

    again = open_run(uri, "study", "cell", "a cell")
    assert again == killed
    again.log_values({"loss": 2.5}, step=2)
    again.finish(2.5)
    assert history(again, "loss") == [(1, 3.0), (2, 2.5)]
    assert state(again) == ("FINISHED", None)
    assert reap(uri, "study") == []


def test_reaping_by_another_word_for_alive(uri: str) -> None:
    record = open_run(uri, "study", "cell", "n")
    asked: list[str] = []
    assert reap(uri, "study", alive=lambda who: bool(asked.append(who))) == [record.run_id]
    assert asked == [owner()]
    assert reap(uri, "no such experiment") == []


def test_owners() -> None:
    host, pid, begun = owner().rsplit(":", 2)
    assert owner_alive(owner())
    assert owner_alive(f"another-machine:{pid}:{begun}")
    assert not owner_alive(f"{host}:{pid}:{int(begun) + 1}")  # the number was given to a new process
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    who = f"{host}:{child.pid}:{fields[19]}"
    assert owner_alive(who)
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not owner_alive(who)  # a zombie that nobody has collected
    child.communicate()
    assert not owner_alive(who)


def test_sigterm_handler_comes_back(uri: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), running(open_run(uri, "study", "cell", "n")):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_values_that_are_not_finite(uri: str) -> None:
    record = open_run(uri, "study", "cell", "n")
    record.log_values({"up": math.inf, "down": -math.inf, "nan": math.nan})
    metrics = client(uri).get_run(record.run_id).data.metrics
    assert metrics["up"] == pytest.approx(1.7976931348623157e308)
    assert metrics["down"] == pytest.approx(-1.7976931348623157e308)
    assert math.isnan(metrics["nan"])


def test_artifacts(uri: str, tmp_path: Path) -> None:
    record = open_run(uri, "study", "cell", "n", artifact_root=tmp_path / "kept")
    folder = tmp_path / "report"
    (folder / "figures").mkdir(parents=True)
    (folder / "report.html").write_text("<p>")
    (folder / "figures" / "u.svg").write_text("<svg>")
    record.log_artifact(folder)
    record.log_artifact(folder / "report.html", "pages")
    record.log_text("a: 1\n", "recipe.yaml")
    record.log_text("a: 2\n", "recipe.yaml")
    home = tmp_path / "kept" / "study" / record.run_id / "artifacts"
    found = {str(file.relative_to(home)): file.read_text() for file in home.rglob("*") if file.is_file()}
    assert found == {
        "report/report.html": "<p>",
        "report/figures/u.svg": "<svg>",
        "pages/report.html": "<p>",
        "recipe.yaml": "a: 2\n",
    }
    with pytest.raises(UserError, match="does not exist"):
        record.log_artifact(tmp_path / "nowhere")


def test_tag_text() -> None:
    values = [1, 0.1, np.float32(0.5), np.int16(3), True, "words", 1e-300, np.float64("nan")]
    assert [tag_text(v) for v in values] == ["1", "0.1", "0.5", "3", "True", "words", "1e-300", "nan"]
    assert len(tag_text("x" * 10_000)) == 5_000
    with pytest.raises(TypeError, match="not list"):
        tag_text([1])
