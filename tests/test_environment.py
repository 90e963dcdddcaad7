"""The environment: its three descriptions agree, and run_all.sh makes it whole or says why not."""

import ast
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from conftest import last_line
from sidae_lib import __main__, experiments

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()
CORE = "config paths data augment networks losses methods pairs train evaluate runs".split()

in_git = pytest.mark.skipif(not ((ROOT / ".git").exists() and shutil.which("git")), reason="not a git checkout, or no git")


def pins() -> list[tuple[Requirement, int]]:
    """Each pin of the lock and its number of hashes."""
    entries = re.sub(r"^#.*\n", "", LOCK, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(Requirement(e.split("--hash")[0]), e.count("--hash=sha256:")) for e in entries if e.strip()]


def test_lock_admits_every_dependency():
    extras = PROJECT["project"]["optional-dependencies"]
    needed = PROJECT["project"]["dependencies"] + extras["notebooks"] + extras["test"] + extras["cluster"]
    for wanted in map(Requirement, needed + PROJECT["build-system"]["requires"]):
        found = [pin for pin, _ in pins() if pin.name == wanted.name]
        assert found, f"{wanted.name} is not in requirements.lock"
        for pin in found:  # one for each range of Python versions
            (version,) = (s.version for s in pin.specifier if s.operator == "==")
            assert version in wanted.specifier, f"{pin} is outside of {wanted}"


def test_lock_has_hashes_and_no_address():
    assert len(pins()) > 100 and all(hashes for _, hashes in pins())
    assert "://" not in LOCK and "--index" not in LOCK and "--find-links" not in LOCK


def test_conda_door_leads_to_the_lock():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (python,) = (d.partition("=")[2] for d in conda if isinstance(d, str) and d.startswith("python="))
    assert python in SpecifierSet(PROJECT["project"]["requires-python"])
    assert "pip" in conda and conda[-1] == {"pip": ["--require-hashes", "-r requirements.lock"]}


@in_git
def test_tracked_tree_is_small():
    """A GPU machine that takes 64 MiB a call gets it together with CIFAR-10's training images, 38 MiB; 2 MiB are left for
    what one change adds."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in names.split("\0") if name]
    assert sum(f.stat().st_size for f in files if f.exists()) < 20 * 2**20


@in_git
def test_a_clone_that_asks_for_the_line_ends_of_windows_has_none(tmp_path):
    """bash reads no script with them. Binary files are as they were, and nothing waits to be normalised."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "-c", "core.autocrlf=true", str(ROOT), str(clone)], check=True)
    lines = subprocess.run(["git", "ls-files", "--eol"], cwd=clone, capture_output=True, text=True, check=True).stdout
    found = {tuple(line.split()[:2]) for line in lines.splitlines()}
    assert found <= {("i/lf", "w/lf"), ("i/none", "w/none"), ("i/-text", "w/-text")}, found  # in the index, in the folder
    for name in ("run_all.sh", "requirements.lock", "notebooks/00_sidae_step_by_step.ipynb"):
        assert b"\r" not in (clone / name).read_bytes()
    assert not subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, check=True).stdout


# --- run_all.sh ------------------------------------------------------------------------------------------------------


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """What run_all.sh needs to read its arguments and make an environment, in a folder with a space and an umlaut."""
    folder = tmp_path / "Übung 1"
    (folder / "sidae_lib").mkdir(parents=True)
    modules = [f"sidae_lib/{name}.py" for name in ("__init__", "__main__", "config", "paths", "threads")]
    for name in ("run_all.sh", "requirements.lock", "pyproject.toml", *modules):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """No active environment, and an index, first in PATH `shims`, that does not answer."""
    hidden = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "SIDAE_", "PIP_", "UV_")
    (tmp_path / "shims").mkdir()
    return {k: v for k, v in os.environ.items() if not k.startswith(hidden)} | {
        "PATH": f"{tmp_path / 'shims'}{os.pathsep}{os.environ['PATH']}", "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def shim(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def run_all(folder: Path, *args: str, env: dict[str, str], **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([str(folder / "run_all.sh"), *args], env=env, cwd="/", stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, **kwargs)


def refused(done: subprocess.CompletedProcess, *words: str, code: int = 1) -> None:
    assert done.returncode == code and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def files(folder: Path) -> dict[str, bytes | str]:
    """Everything in a folder: what files hold, where links lead."""
    return {str(p.relative_to(folder)): str(p.readlink()) if p.is_symlink() else p.read_bytes() if p.is_file() else ""
            for p in folder.rglob("*")}


def test_help_and_a_mistyped_call_make_nothing(scripts, bare):
    before = files(scripts)
    done = run_all(scripts, "-h", env=bare)
    words = [*experiments.SCALES, "test", "lab", "--only", "--data", "--device", "--seeds", "--minutes", "--jobs",
             "--scheduler", "--download", "--fresh", "--cell-seconds", "-p NAME VALUE"]
    assert done.returncode == 0 and not done.stderr and [word for word in words if word not in done.stdout] == []
    refused(run_all(scripts, "hugh", env=bare), "hugh", "laptop", "--help", code=2)
    refused(run_all(scripts, "smoke", "--olny", "01", env=bare), "--olny", code=2)
    refused(run_all(scripts, "--seeds", env=bare), "--seeds", code=2)
    assert files(scripts) == before


def test_python_too_old(scripts, bare, tmp_path):
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        shim(tmp_path / "shims", name, '[ "$1" = --version ] && echo "Python 3.9.18" && exit; exit 1')
    done = run_all(scripts, env=bare)
    refused(done, "3.11 or newer", "is Python 3.9.18")
    assert not (scripts / ".venv").exists()


@pytest.mark.slow
def test_no_network_leaves_nothing_that_passes_for_whole(scripts, bare, tmp_path):
    shim(tmp_path / "shims", "python3", "exit 1")  # too old again, but a newer one stands beside it
    shim(tmp_path / "shims", "python3.12", f'exec "{sys.executable}" "$@"')
    for _ in range(2):  # the second call does not take what the first left for an environment
        done = run_all(scripts, env=bare)
        refused(done, "No matching distribution found for uv", str(scripts / ".venv" / "make.log"))
    assert "uv" in (scripts / ".venv" / "make.log").read_text()
    assert not (scripts / ".venv" / "stamp").exists()


@pytest.fixture
def stub(bare, tmp_path) -> dict[str, str]:
    """A python3 that says it was asked for an environment, and makes none: what happens before and after is run_all.sh's."""
    shim(tmp_path / "shims", "python3",
         f'case "$*" in "-m venv"*) echo "venv $*" >&2; exit 1;; esac; exec "{sys.executable}" "$@"')
    return bare


def environment(folder: Path, **more: str) -> Path:
    """As any tool leaves one; `more`: files of its own."""
    (folder / "bin").mkdir(parents=True)
    for name, content in {"pyvenv.cfg": "home = /usr/bin\n", "bin/activate": "a stranger's\n", **more}.items():
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize("kind", ["folder", "file", "link", "link to its own", "link to nothing", "link to an empty folder"])
def test_a_venv_of_somebody_else_is_left_as_it_is(scripts, stub, tmp_path, kind):
    venv, other = scripts / ".venv", tmp_path / "another folder's"
    if kind == "folder":
        environment(venv, stamp="3.12\n")  # another script's
    elif kind == "file":
        venv.write_text("/opt/venvs/mine\n")  # as direnv and others leave one
    else:
        if kind == "link to an empty folder":
            other.mkdir()
        elif kind != "link to nothing":
            environment(other, **{"made.by": "run_all.sh\n"} if "own" in kind else {})
        venv.symlink_to(other)
    before = files(tmp_path)
    refused(run_all(scripts, env=stub), str(venv), "not made by this script", "move it away")
    after = files(tmp_path)
    after.pop("Übung 1/.venv.lock")
    assert after == before


@pytest.mark.parametrize("left", [{"made.by": "run_all.sh\n"}, {"stamp": "2406331437 415\n", "make.log": ""}, None],
                         ids=["its mark", "an earlier version's stamp", "an empty folder"])
def test_a_stale_venv_of_its_own_is_made_anew(scripts, stub, tmp_path, left):
    """Links in it are removed, not what they lead to; a make that breaks off is known as its own by the next call."""
    venv, outside = scripts / ".venv", environment(tmp_path / "outside")
    venv.mkdir() if left is None else environment(venv, **left)
    if left:
        (venv / "lib").symlink_to(outside)
    kept = files(outside)
    for _ in range(2):
        done = run_all(scripts, env=stub)
        assert done.returncode == 1 and f"venv -m venv {venv}" in done.stderr and "could not make" in done.stderr
        assert files(venv) == {"made.by": b"run_all.sh\n"} and files(outside) == kept


@pytest.mark.slow
def test_a_second_call_waits_for_the_first(scripts, bare):
    with (scripts / ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(subprocess.TimeoutExpired):
            run_all(scripts, env=bare, timeout=2)
        assert not (scripts / ".venv").exists()
    refused(run_all(scripts, env=bare), "No matching distribution found for uv")  # now it is its turn


def test_an_active_environment_is_used(scripts, stub):
    shutil.copytree(ROOT / "sidae_lib", scripts / "sidae_lib", ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    (scripts / "notebooks").mkdir()
    done = run_all(scripts, env=stub | {"VIRTUAL_ENV": sys.prefix})
    refused(done, f"no notebook in {scripts / 'notebooks'}", code=2)  # got there, with this folder's own package
    assert not (scripts / ".venv").exists()
    done = run_all(scripts, env=stub | {"VIRTUAL_ENV": str(scripts)})  # active, but without the package
    assert done.returncode == 1 and f"venv -m venv {scripts}" in done.stderr


LOGS = {  # what pip and uv say -> what of it stands in the sentence
    """WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError('<pip.HTTPSConnection at 0x7f>: \
Failed to establish a new connection: [Errno -2] Name or service not known')': /simple/uv/
ERROR: Could not find a version that satisfies the requirement uv (from versions: none)
ERROR: No matching distribution found for uv
""": "No matching distribution found for uv: Failed to establish a new connection: [Errno -2] Name or service not known",
    """Using Python 3.11.7 environment at: .venv
error: Failed to download `idna==3.10`
  cause: Failed to extract archive: idna-3.10-py3-none-any.whl
  Caused by: failed to write to file `a b/uts46data.py`: No space left on device (os error 28)
""": "Failed to download `idna==3.10`: failed to write to file `a b/uts46data.py`: No space left on device (os error 28)",
    """  × Failed to download `idna==3.10`
  ╰─▶ Hash mismatch for `idna==3.10`

      Computed:
        sha256:946d
""": "Failed to download `idna==3.10`: Hash mismatch for `idna==3.10`",
    "Resolved 1 package in 510ms\nKilled\n\n": "Killed",
    "": "nothing was said",
}


@pytest.mark.parametrize("log", LOGS, ids=["pip", "uv", "uv of old", "a signal", "nothing"])
def test_the_last_reason_is_found(log, tmp_path):
    (tmp_path / "log").write_text(log)
    function = re.search(r"^reason\(\).*?^}", (ROOT / "run_all.sh").read_text(), re.DOTALL | re.MULTILINE)[0]
    said = subprocess.run(["bash", "-c", f"{function}\nreason log"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert said.stdout == f"{LOGS[log]}\n"


UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.skipif(not UV, reason="no uv here")
@pytest.mark.parametrize("home", ["a file", "below a file", "none"])
def test_a_home_that_cannot_be_written(home, scripts, bare, tmp_path):
    """It is named, and what belongs there goes beside the environment. uv, which looks at its cache first, is real; what it
    would install is not asked for."""
    (tmp_path / "file").touch()
    shim(tmp_path / "shims", "python3", f"""case "$*" in "-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" &&
        printf '#!/bin/sh\\nexec "{UV}" pip list --quiet --python "{sys.executable}"' >"$3/bin/uv" && chmod +x "$3/bin/uv" ;;
        "-m pip"*) ;; "-m jupyterlab"*) env ;; *) exec "{sys.executable}" "$@" ;; esac""")
    env = bare | {"HOME": str(tmp_path / {"a file": "file", "below a file": "file/home", "none": "no/home"}[home])}
    env = {k: v for k, v in env.items() if not k.startswith(("XDG_", "JUPYTER_", "MPLCONFIG", "IPYTHON"))}
    failed = run_all(scripts, "lab", env=env | {"UV_CACHE_DIR": str(tmp_path / "file")})
    refused(failed, "could not be made: Failed to initialize cache at ", "make.log; mend it")
    done = run_all(scripts, "lab", env=env)
    assert done.returncode == 0, done.stderr
    used = dict(line.split("=", 1) for line in done.stdout.splitlines() if f"={scripts}/.venv.home/" in line)
    if home == "none":  # which can be made
        assert not used and (tmp_path / "no" / "home" / ".cache" / "uv").is_dir()
        return
    assert sorted(used) == ["IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "MPLCONFIGDIR", "XDG_CACHE_HOME"]
    assert f"Cannot write to {env['HOME']}/.cache, " in done.stdout and (scripts / ".venv.home" / ".cache" / "uv").is_dir()


def test_a_relative_folder_is_the_callers_in_every_notebook(scripts, bare, tmp_path):
    """JupyterLab's kernels work in notebooks/."""
    shim(scripts, "python", 'case "$*" in *jupyterlab*) env ;; esac')
    (scripts / "bin").mkdir()
    (scripts / "python").rename(scripts / "bin" / "python")
    asked = {"SIDAE_DATA": "my images", "SIDAE_RUNS": "/store", "SIDAE_FIGURES": "~/figures", "VIRTUAL_ENV": str(scripts)}
    said = run_all(scripts, "lab", env=bare | asked).stdout.splitlines()
    assert {"SIDAE_DATA=//my images", "SIDAE_RUNS=/store", "SIDAE_FIGURES=~/figures"} <= {*said}  # the caller's folder is /


@pytest.fixture
def suite(scripts, bare) -> tuple[Path, dict[str, str]]:
    """A project of one good test, one slow bad one and one good notebook, and an environment that runs it."""
    (scripts / "tests").mkdir()
    (scripts / "notebooks").mkdir()
    shutil.copy(ROOT / "conftest.py", scripts)
    (scripts / "tests" / "test_a.py").write_text(
        "import os, pytest\n\ndef test_good(): pass\n\n"
        "def test_good_on_one_thread(): assert os.environ['OMP_NUM_THREADS'] == '1'\n\n"
        "@pytest.mark.skip(reason='no such machine')\ndef test_elsewhere(): pass\n\n"
        "@pytest.mark.slow\n@pytest.mark.parametrize('name', ['a b'])\ndef test_bad(name): assert 0\n")
    cells = ("from sidae_lib import paths", "assert not paths.runs().exists() and not paths.records().exists()",
             "assert 'inline' in __import__('matplotlib').get_backend()")  # fmt: skip
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbformat.write(nb, scripts / "notebooks" / "00_a.ipynb")
    plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist.plugin,nbval.plugin"}  # others take seconds
    return scripts, bare | plugins | {"VIRTUAL_ENV": sys.prefix, "MPLBACKEND": "agg"}


@pytest.mark.slow
def test_the_last_line_says_what_ran_and_why_it_failed(suite):
    folder, env = suite
    done = run_all(folder, "test", "--all", env=env)
    assert done.returncode == 1 and done.stdout.count("slowest 15 durations") == 2, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == ("2 tests and 3 notebook cells passed; 1 failed; the first alone: ./run_all.sh test "
                                            "'tests/test_a.py::test_bad[a b]'; 1 skipped: no such machine (1).")  # fmt: skip
    assert len(re.findall(r"^\[(environment|tests|notebooks) (?:begins|ended after \d+ s)\]$", done.stdout, re.M)) == 6
    alone = run_all(folder, "test", "tests/test_a.py::test_bad[a b]", env=env)
    assert alone.returncode == 1 and alone.stdout.splitlines()[-1].startswith("0 tests passed; 1 failed; the first alone")
    narrowed = run_all(folder, "test", "tests/test_a.py", "-k", "good", env=env)
    assert narrowed.returncode == 0 and "notebooks" not in narrowed.stdout
    assert narrowed.stdout.splitlines()[-1] == "2 tests passed; 1 slow tests left out, --all runs them."


def test_a_notebook_that_failed_is_named_whole():
    """A cell needs those before it."""
    stage = {"what": "notebook cells", "passed": 0, "failed": ["notebooks/00 a.ipynb::Cell 3"], "skipped": {}, "left out": 0}
    assert last_line([stage]) == "0 notebook cells passed; 1 failed; the first alone: ./run_all.sh test 'notebooks/00 a.ipynb'."


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("timeout"), reason="no timeout(1) here")
def test_test_fails_after_an_hour(suite, tmp_path):
    folder, env = suite
    (folder / "tests" / "test_a.py").write_text("import time\n\ndef test_endless(): time.sleep(600)\n")
    shim(tmp_path / "shims", "timeout",  # the hour passes in three seconds
         f'echo "limit $6"; shift 6; exec {shutil.which("timeout")} --foreground -s INT -k 30 3 "$@"')
    done = run_all(folder, "test", env=env)
    assert done.returncode == 1 and "more than 60 minutes" in done.stderr.splitlines()[-1]
    assert 3500 < int(re.search(r"limit (\d+)", done.stdout)[1]) <= 3600


@in_git
@pytest.mark.slow
def test_two_commands_on_a_fresh_clone(tmp_path):
    """What git tracks is enough. The environment is made, unless this one is proof that run_all.sh makes it."""
    clone, own = tmp_path / "a fresh clone", (Path(sys.prefix) / "made.by").exists()
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("VIRTUAL_ENV", "CONDA_", "PYTHONPATH", "SIDAE_"))}
    env |= {"VIRTUAL_ENV": sys.prefix} if own else {}
    done = run_all(clone, "smoke", "--only", "00", env=env)
    assert done.returncode == 0 and ("Making the environment" in done.stdout) != own, done.stdout + done.stderr
    chapters = clone / "book" / "_build" / "html" / "chapters"
    own = [(chapters / f"{name}.html").read_text() for name in ("00_sidae_step_by_step", "01_accuracy_vs_epochs")]
    assert "your run at scale smoke" in own[0] and "not run at scale smoke" in own[1]
    assert list((clone / "figures" / "smoke").glob("*.svg"))
    again = run_all(clone, "test", "tests/test_losses.py", "-k", "cosine", env=env)
    assert again.returncode == 0 and "Making the environment" not in again.stdout, again.stdout + again.stderr


# --- what an import costs --------------------------------------------------------------------------------------------


def test_a_slim_image(own_store):
    """No Jupyter and no git on the machine: every module but one is imported, figures are listed, and a run and its evaluation
    are made, of no known commit."""
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
               for p in (ROOT / "sidae_lib").rglob("*.py")]
    assert "sidae_lib.batch" in modules
    code = ("import sys; sys.modules.update(dict.fromkeys(['IPython', 'papermill', 'nbformat']))\n"
            f"import {', '.join(m for m in modules if m not in ('sidae_lib.batch', 'sidae_lib.__main__'))}\n"
            "from sidae_lib import __main__, experiments, runs; from sidae_lib.config import EvalConfig\n"
            "c = experiments.run('simsiam', 'digits', 'smoke', epochs=1)\n"
            "made = runs.fetch_all([c, EvalConfig(run=c, kind='knn')], log=lambda _: None)\n"
            "print({r['provenance']['commit'] for r in made})\n"
            "sys.exit(__main__.main(['list', '--scale', 'smoke']))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PATH": str(own_store)},
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("{None}\n") and "accuracy_vs_epochs" in done.stdout, done.stderr


def test_the_library_needs_no_assertion_and_no_docstring():
    """`python -OO` leaves both out: a docstring is handed on, as argparse takes it, and never looked into."""
    for path in (ROOT / "sidae_lib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Assert), (path, node.lineno)
            assert not isinstance(node, ast.Attribute) or "__doc__" not in ast.unparse(node.value), (path, node.lineno)


def test_help_and_refusals_import_nothing_slow():
    """And what trains and evaluates imports nothing that only tells of it."""
    assert __main__.SCALES == tuple(experiments.SCALES)
    code = ("import sys\nfrom contextlib import suppress\nfrom sidae_lib import __main__\n"
            "assert __main__.main(['notebooks', '--look']) == 0 and __main__.main(['run', 'tsne', '--sclae', 'quick']) == 2\n"
            "with suppress(SystemExit): __main__.main(['run', '--help'])\n"
            "assert not {'torch', 'numpy', 'pandas'} & {*sys.modules}\n"
            f"import {', '.join(f'sidae_lib.{m}' for m in CORE)}\n"
            "print('slow:', *sorted({'pandas', 'sklearn', 'scipy', 'matplotlib', 'seaborn', 'IPython'} & {*sys.modules}))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "slow:", done.stdout + done.stderr
