"""The console script, run as the installed one is: a file on disk that calls `engram_lab.launcher.main`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from engram_lab import doctor, launcher
from engram_lab.errors import UserError

ROOT = Path(__file__).resolve().parents[1]

TWO_PROCESSES = """
import json, os, sys
from pathlib import Path
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader
import neighbour

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Linear(2, 1)

    def training_step(self, batch):
        return self.weight(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

torch.manual_seed(0)
module = Module()
trainer = Trainer(max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False)
data = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
trainer.fit(module, DataLoader(data, batch_size=2))
seen = [trainer.global_rank, trainer.world_size, trainer.num_nodes, type(trainer.accelerator).__name__]
weights = module.weight.weight.flatten().tolist()
where = Path(sys.argv[1]) / f"rank{trainer.global_rank}.json"
where.write_text(json.dumps([*seen, sys.argv[1:], weights]))
"""


@pytest.fixture
def command(tmp_path: Path) -> Path:
    """A script like the one that pip writes for the entry point, in a folder that is not the repository."""
    script = tmp_path / "bin" / "lightning"
    script.parent.mkdir()
    script.write_text(
        f"#!{sys.executable}\nimport sys\nfrom engram_lab.launcher import main\nsys.exit(main())\n"
    )
    return script


def run(
    command: Path, *arguments: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PL_", "LT_")) and k != "WORLD_SIZE"}
    return subprocess.run(
        [sys.executable, str(command), *arguments],
        cwd=cwd or command.parent,
        env={**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.slow
def test_two_cpu_processes_train_one_model(command: Path, tmp_path: Path) -> None:
    script = write(tmp_path / "recipe.py", TWO_PROCESSES)
    write(tmp_path / "neighbour.py", "")  # imported from the script's own folder, as python SCRIPT does
    out = tmp_path / "out"
    out.mkdir()
    done = run(
        command, "run", "../recipe.py", str(out), "--devices=2", "--accelerator", "cpu", "--strategy=ddp"
    )
    assert done.returncode == 0, done.stderr
    assert script.exists()
    ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)]
    for rank, (global_rank, world, nodes, accelerator, arguments, _) in enumerate(ranks):
        assert (global_rank, world, nodes, accelerator) == (rank, 2, 1, "CPUAccelerator")
        assert arguments == [str(out)]
    assert ranks[0][-1] == ranks[1][-1]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("print('fine')", 0),
        ("import sys; sys.exit(7)", 7),
        ("import sys; sys.exit('words')", 1),
        ("raise KeyboardInterrupt", 130),
        ("from engram_lab.errors import UserError\nraise UserError('rho is 2.0')", 2),
        ("raise ValueError('boom')", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15),
    ],
)
def test_exit_status_is_the_script_s(command: Path, tmp_path: Path, body: str, status: int) -> None:
    done = run(command, "run", "model", str(write(tmp_path / "s.py", body)))
    assert done.returncode == status, done.stderr
    if status == 2:
        assert done.stderr == "error: rho is 2.0\n"


def test_traceback_is_short(command: Path, tmp_path: Path) -> None:
    script = write(
        tmp_path / "s.py",
        "import json\ndef inner():\n    json.loads('{')\nif __name__ == '__main__':\n    inner()\n",
    )
    done = run(command, "run", str(script))
    assert done.returncode == 1
    assert "JSONDecodeError" in done.stderr
    assert "in inner" in done.stderr
    assert "launcher.py" not in done.stderr
    assert "runpy" not in done.stderr


def test_devices_that_are_not_there_get_one_sentence(command: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there are devices here")
    script = write(tmp_path / "s.py", "from lightning.pytorch import Trainer\nTrainer()\n")
    done = run(command, "run", str(script), "--accelerator=cuda", "--devices=1")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: Lightning cannot do what" in done.stderr


def test_help_is_fast_and_imports_no_torch(command: Path) -> None:
    times = []
    for arguments in (["--help"], ["run", "--help"], ["--help"]):
        start = time.perf_counter()
        done = run(command, *arguments)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0
        assert "lightning run RECIPE" in done.stdout
    code = "import sys, engram_lab.launcher; print({'torch', 'lightning', 'mlflow'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert loaded.stdout == "set()\n"
    assert min(times) < 1.0  # 0.2 s on an idle machine; torch alone takes two


def test_other_commands_belong_to_lightning_sdk(command: Path) -> None:
    done = run(command, "rnu", "x.py")
    assert done.returncode == 2
    assert "lightning-sdk, which is not installed" in done.stderr
    assert "Did you mean 'run'?" in done.stderr


def test_lightning_sdk_gets_its_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    class Dist:
        name = "lightning_sdk"

    class Entry:
        dist = Dist()

        def load(self) -> Any:
            return lambda: seen.append(list(sys.argv))

    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: [Entry()])
    monkeypatch.setattr(sys, "argv", ["lightning"])
    assert launcher.main(["studio", "list"]) == 0
    assert seen == [["lightning", "studio", "list"]]


def test_yaml_goes_to_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("engram_lab.cli.run_recipe", lambda argv: seen.append(list(argv)) or 5)
    recipe = str(write(tmp_path / "r.yaml", ""))
    asked = ["run", "--devices", "0,1", recipe, "--data.tokens=5", "--precision=bf16-mixed", "--print_config"]
    assert launcher.main(asked) == 5
    mapped = ["--trainer.devices=[0,1]", "--trainer.precision=bf16-mixed"]
    assert seen == [[recipe, *mapped, "--data.tokens=5", "--print_config"]]


def test_after_two_dashes_nothing_is_ours(tmp_path: Path) -> None:
    script = str(write(tmp_path / "s.py", ""))
    asked = launcher.parse([script, "--devices=2", "a", "--", "--precision", "x"], {})
    assert asked.options == {"devices": "2"}
    assert asked.overrides == ("a", "--precision", "x")


def test_script_options_become_defaults_of_trainer_and_fabric() -> None:
    environment: dict[str, str] = {}
    launcher._export({"devices": "[0,3]", "num_nodes": "2"}, environment)
    assert environment == {
        "PL_TRAINER_DEVICES": "[0,3]",
        "LT_DEVICES": "0,3",
        "PL_TRAINER_NUM_NODES": "2",
        "LT_NUM_NODES": "2",
    }


def test_processes_of_torchrun_know_their_number(tmp_path: Path) -> None:
    script = str(write(tmp_path / "s.py", ""))
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    assert launcher.parse([script], torchrun).options == {"devices": "2", "num_nodes": "2"}
    assert launcher.parse([script, "--devices=auto"], torchrun).options["devices"] == "2"
    with pytest.raises(UserError, match="--devices is 3, but torchrun started 2"):
        launcher.parse([script, "--devices=3"], torchrun)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{}/s.py", "--devices=0"], "--devices is '0'"),
        (["{}/s.py", "--devices=two"], "--devices is 'two'"),
        (["{}/s.py", "--devices=1,1"], "--devices is '1,1'"),
        (["{}/s.py", "--devices="], "--devices is ''"),
        (["{}/s.py", "--devices"], "--devices needs a value"),
        (
            ["{}/s.py", "--precision", "--devices=2"],
            "--precision needs a value, for example",
        ),
        (["{}/s.py", "--accelerator=gpus"], "Did you mean 'gpu'?"),
        (["{}/s.py", "--num-nodes=0"], "--num-nodes is '0'"),
        (["--device=2", "{}/s.py"], "Did you mean '--devices'?"),
        (["{}/t.py"], "Did you mean '{}/s.py'?"),
        (["{}/s.txt"], "must be a .yaml or a .py file"),
        (["--devices=2"], "there is no recipe to run"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    write(tmp_path / "s.py", "")
    with pytest.raises(UserError) as caught:
        launcher.parse([argument.format(tmp_path) for argument in arguments], {})
    assert sentence.format(tmp_path) in str(caught.value)


def test_lone_processes_are_refused() -> None:
    launcher.refuse_lone_processes(2, {"WORLD_SIZE": "2"})
    launcher.refuse_lone_processes(1, {})
    with pytest.raises(UserError, match="2 processes were started"):
        launcher.refuse_lone_processes(1, {"WORLD_SIZE": "2"})


def test_doctor_knows_whose_lightning_it_is(command: Path, tmp_path: Path) -> None:
    command.chmod(0o755)
    assert doctor.lightning_owner(str(command.parent)).fine
    command.write_text("#!/usr/bin/python\nfrom lightning_sdk.cli.entrypoint import main_cli\n")
    theirs = doctor.lightning_owner(str(command.parent))
    assert not theirs.fine
    assert "lightning-sdk" in theirs.finding
    assert doctor.lightning_owner(str(tmp_path)).fine


def test_doctor_reports_and_creates_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert doctor.doctor() == 0
    printed = capsys.readouterr().out
    assert [line.split()[1] for line in printed.splitlines()].count("lightning") == 1
    assert "torch" in printed
    assert "will be created by the first run" in printed
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mlruns").write_text("a file in the way")
    assert doctor.doctor() == 1
    assert "MEND  store" in capsys.readouterr().out
