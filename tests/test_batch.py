"""The batch run on small notebooks, as a process of its own in a copy of the library."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from dask.system import CPU_COUNT

from sidae_lib import paths
from sidae_lib.batch import _arguments, _jobs, _parameters, main
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


def batch(folder: Path, *args: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SIDAE_", "JUPYTER_"))}
    env |= {"PYTHONPATH": str(folder), "MPLBACKEND": "agg"} | environment
    return subprocess.run([sys.executable, "-P", "-m", "sidae_lib.batch", *args], env=env, cwd=folder,
                          capture_output=True, text=True, timeout=300)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "a copy"
    shutil.copytree(ROOT / "sidae_lib", folder / "sidae_lib", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "notebooks").mkdir()
    return folder


@pytest.mark.slow
def test_goes_on_after_a_failure_a_dead_kernel_and_a_cell_beyond_its_time(copy):
    write(copy, "00_raises", "import sys", "print('noise', file=sys.stderr); 1 / 0", "print('never')")
    write(copy, "01_dies", "import os", "os._exit(1)")
    write(copy, "02_hangs", "import time; time.sleep(600)")
    write(copy, "03_works", "import os, sidae_lib; from sidae_lib import paths",
          "print(scale, seeds, device, sidae_lib.__file__, os.environ['MPLBACKEND'], os.listdir(paths.runs()))")
    (copy / "runs" / "0123456789abcdef").mkdir(parents=True)
    done = batch(copy, "--cell-seconds", "3")
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and done.stderr == "", done.stderr
    for line, name, result in zip(lines, ("00_raises", "01_dies", "02_hangs", "03_works"),
                                  ("FAILED  ZeroDivisionError: division by zero", "FAILED  DeadKernelError",
                                   "FAILED  CellTimeoutError", "ok"), strict=False):
        assert line.startswith(name) and result in line
    assert lines[4].startswith("1 of 4 notebooks ran") and "00_raises, 01_dies, 02_hangs" in lines[5]
    index = copy / "figures" / "quick" / "index.html"
    assert lines[-1] == f"Figures: {index}" and index.exists()
    assert "ZeroDivisionError" in read(copy, "00_raises", "quick") and "never" not in read(copy, "00_raises", "quick")
    shown = read(copy, "03_works", "quick")
    assert shown.startswith("quick [] auto ")  # []: the scale's own seeds
    assert str(copy / "sidae_lib") in shown and "inline" in shown and "0123456789abcdef" in shown
    html = [(copy / "executed" / "quick" / f"{n}.html").read_text() for n in ("00_raises", "03_works")]
    assert "ZeroDivisionError" in html[0] and str(copy) in html[1]


@pytest.mark.slow
def test_every_parameter_arrives(copy, tmp_path):
    show = ("import os, sys; print(scale, seeds, device, minutes > 1, extra, sys.executable)",
            "print(os.environ['SIDAE_DATA'], os.environ['SIDAE_BUNDLE'], os.environ['SIDAE_DOWNLOAD'], os.getcwd())")
    write(copy, "00_show", *show, parameters=PARAMETERS + "extra: list = []\n")
    write(copy, "01_w_sweep", "print(scale, seeds)")
    (copy / "images").mkdir()
    other = tmp_path / "jupyter" / "kernels" / "python3"  # another interpreter that calls itself python3
    other.mkdir(parents=True)
    (other / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "", "language": "python"}')
    done = batch(copy, "--scale", "laptop", "--data", "images", "--device", "cpu", "--seeds", "3", "--minutes", "9",
                 "--download", "-p", "extra", "['images', 1]", JUPYTER_PATH=str(tmp_path / "jupyter"), SIDAE_BUNDLE="all.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    assert read(copy, "00_show", "laptop") == (f"laptop [0, 1, 2] cpu True ['{copy}/images', 1] {sys.executable}\n"
                                               f"{copy}/images {copy}/all.jsonl 1 {copy}/notebooks\n")
    assert read(copy, "01_w_sweep", "laptop") == "laptop [0, 1, 2]\n"
    assert batch(copy, "--scale", "smoke", "--only", "w_sweep").returncode == 0
    assert read(copy, "01_w_sweep", "smoke") == "smoke [0]\n"  # the notebook's own default
    assert not (copy / "executed" / "smoke" / "00_show.ipynb").exists()


@pytest.mark.slow
def test_narrow_networks_are_trained_in_a_process_per_core(copy):
    write(copy, "00_show", "import os; address = os.environ.get('SIDAE_SCHEDULER')",
          "from distributed import Client; print(len(Client(address).nthreads()) if address else 'here')")  # fmt: skip
    done = batch(copy, "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert read(copy, "00_show", "quick") == (f"{min(CPU_COUNT, 4)}\n" if CPU_COUNT > 1 else "here\n")


def test_how_many_processes_train():
    jobs = [_jobs(_arguments([*a.split(), "--device", "cpu"])) for a in ("", "--jobs 1", "--jobs 3", "--scale smoke")]
    assert jobs == [min(CPU_COUNT, 4), 1, 3, 1]


@pytest.mark.slow
def test_fresh_hides_the_records_and_deletes_nothing(copy):
    write(copy, "00_show", "from sidae_lib import paths",
          "for folder in (paths.runs(), paths.records()): print(folder.is_dir(), list(folder.iterdir()), folder)")
    recorded = [copy / name / "0123456789abcdef" / "record.json" for name in ("runs", "records")]
    for record in recorded:
        record.parent.mkdir(parents=True)
        record.write_text("{}")
    assert batch(copy, "--fresh").returncode == 0
    shown = read(copy, "00_show", "quick")
    assert shown.count("True []") == 2 and f"{copy / 'runs' / 'fresh-'}" in shown
    assert all(record.read_text() == "{}" for record in recorded)


def test_refuses_before_anything_runs(copy, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", copy)

    def refused(words: str, *args: str) -> None:
        with pytest.raises(SidaeError) as e:
            main(args)
        assert "\n" not in str(e.value) and all(word in str(e.value) for word in words.split()), e.value

    refused("notebooks checkout")
    write(copy, "00_first", parameters=PARAMETERS + "datasets: list = []\n")
    write(copy, "01_second")
    refused("huge smoke paper", "--scale", "huge")
    refused("tpu cuda", "--device", "tpu")
    refused("99 00_first 01_second", "--only", "00,99")
    refused("dataset datasets minutes", "-p", "dataset", "mnist")
    refused("--seeds 0", "--seeds", "0")
    refused("--minutes", "--minutes", "0")
    refused("nowhere", "--data", "nowhere")
    refused("--no-such-option", "--no-such-option")
    write(copy, "02_third", parameters='scale: str = "smoke"\ndevice: str = "auto"\n')
    refused("02_third seeds")
    (copy / "notebooks" / "02_third.ipynb").unlink()
    assert sorted(p.name for p in copy.iterdir()) == ["notebooks", "sidae_lib"]  # nothing was written
    (copy / "executed").write_text("a file where the folder should be")
    refused("executed")
    (copy / "executed").unlink()
    (copy / "figures").write_text("a file where the folder should be")
    refused("figures")
    assert [p.name for p in (copy / "executed").rglob("*")] == ["quick"]


@pytest.mark.parametrize("option", ["--seeds", "--minutes", "--jobs"])
@pytest.mark.parametrize("value", ["0", "-1"])
def test_both_command_lines_refuse_the_same_in_the_same_words(option, value, cli):
    with pytest.raises(SidaeError, match=f"^{option} must be above 0, not {value}\\.$") as e:
        main([option, value])
    done = cli("run", "tsne", "--scale", "smoke", option, value)
    assert (done.returncode, done.stderr) == (2, f"error: {e.value}\n")


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
    args = _arguments(["--scale", "smoke", "-p", name, text])
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
    given = _parameters(_arguments(["-p", name, text]), [notebook])[notebook][name]
    expected = [v.replace("@", str(tmp_path)) for v in ([value] if isinstance(value, str) else value)]
    assert (given if isinstance(value, list) else [given]) == expected
