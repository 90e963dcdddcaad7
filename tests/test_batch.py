"""The batch run on small notebooks, and how both command lines refuse."""

import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import nbformat
import pytest
from joblib import cpu_count

from sidae_lib import paths
from sidae_lib.__main__ import _parser
from sidae_lib.batch import NEXT, _jobs, _parameters
from sidae_lib.config import SidaeError

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = 'scale: str = "smoke"\nseeds: list = [0]\ndevice: str = "auto"\nminutes: float = 0.0\n'


def write(folder: Path, name: str, *cells: str, parameters: str = PARAMETERS) -> None:
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "language": "python",
                                                           "display_name": "Python 3"}})
    nb.cells = [nbformat.v4.new_code_cell(c) for c in (parameters, *cells)]
    nb.cells[0].metadata.tags = ["parameters"]
    nbformat.write(nb, folder / "notebooks" / f"{name}.ipynb")


def read(folder: Path, name: str, scale: str) -> str:
    """All that the executed notebook printed or raised."""
    nb = nbformat.read(folder / "executed" / scale / f"{name}.ipynb", as_version=4)
    outputs = [o for cell in nb.cells if cell.cell_type == "code" for o in cell.outputs]
    return "".join(o.get("text", "") + o.get("ename", "") for o in outputs)


def arguments(*args: str) -> Namespace:
    return _parser().parse_args(["notebooks", *args])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of its own, without notebooks, and no folder that is set elsewhere."""
    folder = tmp_path / "a project"
    (folder / "notebooks").mkdir(parents=True)
    monkeypatch.setattr(paths, "ROOT", folder)
    monkeypatch.chdir(folder)
    for name in [name for name in os.environ if name.startswith(("SIDAE_", "JUPYTER_"))]:
        monkeypatch.delenv(name)
    return folder


@pytest.mark.slow
def test_goes_on_after_a_failure_a_dead_kernel_and_a_cell_beyond_its_time(project):
    """As a process, in a copy of the library."""
    shutil.copytree(ROOT / "sidae_lib", project / "sidae_lib", ignore=shutil.ignore_patterns("__pycache__"))
    write(project, "00_raises", "import sys", "print('noise', file=sys.stderr); 1 / 0", "print('never')")
    write(project, "01_dies", "import os", "os._exit(1)")
    write(project, "02_hangs", "import time; time.sleep(600)")
    write(project, "03_works", "import os, sidae_lib; from sidae_lib import paths",
          "print(scale, seeds, device, sidae_lib.__file__, os.environ['MPLBACKEND'], os.listdir(paths.runs()))")
    (project / "runs" / "0123456789abcdef").mkdir(parents=True)
    command = [sys.executable, "-P", "-m", "sidae_lib", "notebooks", "--device", "cpu", "--cell-seconds", "5"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(project), "MPLBACKEND": "agg"}, cwd=project,
                          capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and done.stderr == "", done.stderr
    for line, name, result in zip(lines, ("00_raises", "01_dies", "02_hangs", "03_works"),
                                  ("FAILED  ZeroDivisionError: division by zero", "FAILED  DeadKernelError",
                                   "FAILED  CellTimeoutError", "ok"), strict=False):
        assert line.startswith(name) and result in line
    assert lines[4].startswith("1 of 4 notebooks ran") and "00_raises, 01_dies, 02_hangs" in lines[5]
    assert lines[-1] == f"Next: {NEXT['quick']}" and (project / "figures" / "quick" / "scoreboard.csv").exists()
    raised, shown = read(project, "00_raises", "quick"), read(project, "03_works", "quick")
    assert "ZeroDivisionError" in raised and "never" not in raised
    assert shown.startswith("quick [] cpu ")  # []: the scale's own seeds
    assert str(project / "sidae_lib") in shown and "inline" in shown and "0123456789abcdef" in shown


@pytest.mark.slow
def test_every_parameter_arrives(project, tmp_path, cli, monkeypatch):
    """And a fresh store hides what is recorded, and deletes nothing."""
    write(project, "00_show", "import os, sys; print(scale, seeds, device, minutes > 1, extra, sys.executable)",
          "for name in ('DATA', 'DOWNLOAD', 'RUNS', 'RECORDS'): print(os.environ[f'SIDAE_{name}'])",
          "print(os.getcwd(), *(os.listdir(os.environ[f'SIDAE_{n}']) for n in ('RUNS', 'RECORDS')))",
          parameters=PARAMETERS + "extra: list = []\n")
    write(project, "01_w_sweep", "print(scale, seeds)")
    recorded = [project / name / "0123456789abcdef" / "record.json" for name in ("images", "runs", "records")]
    for record in recorded:
        record.parent.mkdir(parents=True)
        record.write_text("{}")
    other = tmp_path / "jupyter" / "kernels" / "python3"  # another interpreter that calls itself python3
    other.mkdir(parents=True)
    (other / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    done = cli("notebooks", "laptop", "--data", "images", "--device", "cpu", "--seeds", "3", "--minutes", "9", "--jobs", "1",
               "--download", "--fresh", "-p", "extra", "['images', 1]")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first, data, download, runs, records, last = read(project, "00_show", "laptop").splitlines()
    assert first == f"laptop [0, 1, 2] cpu True ['{project}/images', 1] {sys.executable}"
    assert (data, download) == (f"{project}/images", "1") and last == f"{project}/notebooks [] []"
    assert runs.startswith(f"{project}/runs/fresh-") and records == f"{runs}-no-records"
    assert all(record.read_text() == "{}" for record in recorded)
    assert read(project, "01_w_sweep", "laptop") == "laptop [0, 1, 2]\n"
    assert cli("notebooks", "--only", "w_sweep", "smoke").returncode == 0
    assert read(project, "01_w_sweep", "smoke") == "smoke [0]\n"  # the notebook's own default
    assert not (project / "executed" / "smoke" / "00_show.ipynb").exists()


def test_processes_train_what_the_notebooks_ask_for(project, cli, monkeypatch):
    """Each run once, in the notebooks' order; a notebook begins when its records are there. The book is built last."""
    for name in ("runs", "records", "figures"):
        monkeypatch.setenv(f"SIDAE_{name.upper()}", str(project / name))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (project / "book").mkdir()
    (project / "book" / "conf.py").write_text("")
    (project / "book" / "index.rst").write_text("Book\n====\n")
    names = "00_sidae_step_by_step", "02_w_sweep"
    for name in names:
        write(project, name, "from sidae_lib import experiments, store",
              f"both = experiments.{name[3:]}(scale, datasets, seeds)",
              "print(len(store.missing(sum(both, []))), 'missing')", parameters=PARAMETERS + "datasets: list = []\n")
    done = cli("notebooks", "smoke", "--jobs", "2", "-p", "datasets", "digits")
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert [read(project, name, "smoke") for name in names] == ["0 missing\n"] * 2
    log = (project / "executed" / "smoke" / "workers.log").read_text()
    trained = re.findall(r"trained (\w+) \w{16} in", log)
    assert sorted(trained) == ["dae", "sidae", "sidae", "simsiam"]  # of two, one with another target; none twice
    assert re.search(r"  1 of 5 runs done, next \w+, about \d+\.\d min left", done.stdout)  # its evaluations are a fifth
    assert done.stdout.splitlines()[-1] == f"The book: {project}/book/_build/html/index.html. Next: ./run_all.sh"


def test_how_many_processes_train():
    jobs = [_jobs(arguments(*a.split(), "--device", "cpu")) for a in ("", "--jobs 1", "--jobs 3", "smoke")]
    assert jobs == [min(cpu_count(), 4), 1, 3, 1]


def test_refuses_before_anything_runs(project, cli):
    def refused(words: str, *args: str) -> None:
        said = cli("notebooks", *args)
        assert (said.returncode, said.stdout) == (2, "") and said.stderr.count("\n") == 1
        assert all(word in said.stderr for word in words.split()), said.stderr

    refused("notebooks checkout")
    write(project, "00_first", parameters=PARAMETERS + "datasets: list = []\n")
    write(project, "01_second")
    refused("99 00_first 01_second", "--only", "00,99")
    refused("dataset datasets minutes", "-p", "dataset", "mnist")
    write(project, "02_third", parameters='scale: str = "smoke"\ndevice: str = "auto"\n')
    refused("02_third seeds")
    (project / "notebooks" / "02_third.ipynb").unlink()
    assert [p.name for p in project.iterdir()] == ["notebooks"]  # nothing was written
    for taken in ("executed", "figures"):
        (project / taken).write_text("a file where the folder should be")
        refused(taken)
        (project / taken).unlink()
    assert [p.name for p in (project / "executed").rglob("*")] == ["quick"]


@pytest.mark.parametrize("command", ["notebooks", "run tsne"])
@pytest.mark.parametrize(("args", "sentence"), [
    *((f"{option} {value}", f"{option} must be above 0, not {value}.") for option in ("--seeds", "--minutes", "--jobs")
      for value in ("0", "-1")),
    ("--data nowhere", "--data nowhere is not a folder; name the one that holds the image sets."),
    *((args, f"{said}; --help lists what is known.") for args, said in (
        ("--no-such-option", "unrecognized arguments: --no-such-option"), ("--seed=1", "unrecognized arguments: --seed=1"),
        ("--seeds", "argument --seeds: expected one argument"), ("--seeds x", "argument --seeds: invalid int value: x"),
        ("--device tpu", "argument --device: invalid choice: tpu (choose from auto, cpu, cuda)"))),
])  # fmt: skip
def test_both_command_lines_refuse_the_same_in_the_same_words(command, args, sentence, cli):
    done = cli(*command.split(), *args.split())
    assert (done.returncode, done.stdout, done.stderr.replace("'", "")) == (2, "", f"error: {sentence}\n")


@pytest.mark.parametrize(("name", "text", "value"), [
    ("seeds", "1", [1]), ("seeds", "[0, 1]", [0, 1]), ("seeds", "[]", []), ("datasets", "digits", ["digits"]),
    ("datasets", "['mnist', 'digits']", ["mnist", "digits"]), ("extra", "['x', 1]", ["x", 1]), ("extra", "x", ["x"]),
    ("images", "2024", "2024"), ("images", "none", "none"), ("images", "'a b'", "a b"), ("labels", "20", 20),
    ("minutes", "3", 3.0), ("any", "mnist", "mnist"), ("any", "3", 3),
    *(("compute", word, value) for value in (True, False) for word in (str(value), str(value).lower(), str(value).upper())),
    *((n, t, f"{n} must be {what}, not {shown}.") for n, t, what, shown in (
        ("seeds", "x", "int or a list of them", "'x'"), ("seeds", "[0, 1.5]", "int or a list of them", "1.5"),
        ("datasets", "3", "str or a list of them", "3"), ("labels", "many", "int", "'many'"), ("labels", "true", "int", "True"),
        ("minutes", "long", "float", "'long'"), ("compute", "0", "bool", "0"), ("compute", "no", "bool", "'no'"))),
])  # fmt: skip
def test_a_parameter_is_of_the_type_that_the_notebook_declares(name, text, value, tmp_path):
    """Or refused by its name. "false" as a word would count as true, and a figure that was to be shown would be computed."""
    (tmp_path / "notebooks").mkdir()
    own = ("datasets: list = []", "extra: list = []", 'images: str = "x"', "labels: int = 3", "compute: bool = True", "any = 0")
    write(tmp_path, "00_first", parameters="\n".join((PARAMETERS, *own)))
    notebook = tmp_path / "notebooks" / "00_first.ipynb"
    args = arguments("smoke", "-p", name, text)
    if isinstance(value, str) and value.startswith(f"{name} must"):
        with pytest.raises(SidaeError) as e:
            _parameters(args, [notebook])
        assert str(e.value) == value
    else:
        given = _parameters(args, [notebook])[notebook]
        assert given.pop(name) == value and given.keys() <= {"scale", "device", "seeds"}


@pytest.mark.parametrize(("name", "text", "value"), [  # @: the caller's folder
    ("images", "pics", "@/pics"), ("images", "./pics", "@/pics"), ("images", "Übung 1/own.npz", "@/Übung 1/own.npz"),
    ("images", "folder:pics", "folder:@/pics"), ("images", "zip:~/a.zip", "zip:@/home/a.zip"), ("images", ".", "@"),
    ("datasets", "['folder:pics', 'digits', 'Übung 1/own.npz']", ["folder:@/pics", "digits", "@/Übung 1/own.npz"]),
    ("images", "folder:nowhere", "folder:@/nowhere"),  # so that the refusal names the place that was meant
    *((name, same, same) for name, same in (
        *(("images", v) for v in ("nowhere", "digits", "mnist", "own", "", "folder:", "~nobody-of-this-name", "x" * 300)),
        ("address", "tcp://127.0.0.1:9"), ("probe", "knn"), ("probe", "cuda:0"))),
])  # fmt: skip
def test_a_path_is_the_callers(name, text, value, tmp_path, monkeypatch):
    """A kernel works in notebooks/. A known set stays a name though a folder is called so; so does a choice."""
    for folder in ("notebooks", "pics", "Übung 1", "digits", "mnist", "own", "knn", "data"):
        (tmp_path / folder).mkdir()
    for npz in ("Übung 1/own.npz", "data/own.npz"):
        (tmp_path / npz).touch()
    own = ('images: str = ""', "datasets: list = []", 'address: str = ""', 'probe: str = "logistic"  # logistic | knn: how')
    write(tmp_path, "00_first", parameters="\n".join((PARAMETERS, *own)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SIDAE_DATA", "data")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    notebook = tmp_path / "notebooks" / "00_first.ipynb"
    given = _parameters(arguments("-p", name, text), [notebook])[notebook][name]
    expected = [v.replace("@", str(tmp_path)) for v in ([value] if isinstance(value, str) else value)]
    assert (given if isinstance(value, list) else [given]) == expected
