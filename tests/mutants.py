"""Faults that a refactoring could bring in, and whether the tests notice them: `python tests/mutants.py [NAME ...]`.

Each mutant is tried in a copy of the tracked files, first with the tests that ought to kill it; one that lives is tried
with the whole suite and the validation of the notebooks. Exit code 0: all are killed.  1: one lives.  2: one cannot be tried.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
WHOLE = "tests --ignore=tests/test_mutants.py"  # which holds that the checkout is no mutant
SECONDS = {"own": 1800, "whole": 7200}  # what takes longer hangs, and is noticed
PYTEST = """import sys, pytest, sidae_lib
assert sidae_lib.__file__.startswith(sys.argv[1]), "an installed checkout comes first"
sys.exit(pytest.main(sys.argv[2:]))"""
RUNNING: set[int] = set()  # process groups


class Mutant(NamedTuple):
    """`old`, which stands once in `file`, becomes `new`.  tests: those that ought to fail then, or one notebook to validate."""

    name: str  # area.fault
    file: str
    old: str
    new: str
    tests: str


MUTANTS = [Mutant(*m) for m in (
    # the sign of DINO's centre
    ("losses.sign", "sidae_lib/losses.py", "(t.detach() - centre)", "(t.detach() + centre)", "tests/test_losses.py"),
    ("losses.stop_gradient", "sidae_lib/losses.py",
     "F.cosine_similarity(p, z.detach(), dim=1)", "F.cosine_similarity(p, z, dim=1)", "tests/test_losses.py"),
    # VICReg's spread over an image's dimensions in place of a dimension's over the batch
    ("losses.axis", "sidae_lib/losses.py", "(z.var(0) + 1e-4)", "(z.var(1) + 1e-4)", "tests/test_losses.py"),

    ("methods.temperature", "sidae_lib/methods/contrastive.py",
     "losses.info_nce(sim / self.config.tau, key,", "losses.info_nce(sim / self.config.tau**2, key,",
     "tests/test_three_steps.py"),
    ("methods.momentum", "sidae_lib/methods/base.py",
     "get_ema_multi_avg_fn(m)", "get_ema_multi_avg_fn(1 - m)", "tests/test_three_steps.py"),
    ("methods.step_ahead", "sidae_lib/methods/base.py",
     "(step - 1) / steps", "step / steps", "tests/test_three_steps.py"),
    # FNC finds them and removes none
    ("methods.false_negatives", "sidae_lib/methods/contrastive.py",
     "(own, drop | found, records)", "(own, drop, records)", "tests/test_three_steps.py"),
    # MoCo's keys of both views; of ordinary pairs i and j are the same
    ("methods.other_image", "sidae_lib/methods/contrastive.py",
     "torch.cat([k, k1]), torch.cat([j, i])", "torch.cat([k, k1]), torch.cat([i, j])",
     "tests/test_three_steps.py"),

    # the last row and column that a crop may start at
    ("augment.crop_edge", "sidae_lib/augment.py", "* (size - box + 1)).floor()", "* (size - box)).floor()",
     "tests/test_augment.py"),
    # both views by the first one's list: most lists are the same
    ("augment.second_view", "sidae_lib/step.py",
     "ops = (augment.VIEWS[name].first, augment.VIEWS[name].second)[n]", "ops = augment.VIEWS[name].first",
     "tests/test_metric.py::test_the_loop_is_the_reports"),

    ("training.schedule", "sidae_lib/step.py",
     "math.cos(math.pi * step / steps)", "math.cos(math.pi * (step + 1) / steps)",
     "tests/test_train.py::test_lr_at_is_the_cosine"),
    # a graph's step asks for the momentum's value
    ("training.hidden_wait", "sidae_lib/methods/base.py", "if isinstance(m, Tensor):", "if False:",
     "tests/test_step.py::test_a_step_never_waits_for_the_device"),
    # the momentum of the step before
    ("training.momentum_late", "sidae_lib/step.py",
     "self.method.ahead(step + 1, self.steps)", "self.method.ahead(step, self.steps)", "tests/test_three_steps.py"),

    # the first batches of the epoch in which a run was stopped, once more
    ("resume.batches_again", "sidae_lib/train.py",
     "for a, b in run.bounds[run.step % per_epoch :]:", "for a, b in run.bounds:",
     "tests/test_train.py::test_a_stopped_run_equals_one_that_was_not"),
    # the places that were drawn for the next step
    ("resume.draw_lost", "sidae_lib/methods/maps.py",
     'self.register_buffer("place", torch.empty(len(self.comparisons), 2, c.batch))',
     'self.register_buffer("place", torch.empty(len(self.comparisons), 2, c.batch), persistent=False)',
     "tests/test_maps.py::test_a_stopped_run_equals_one_that_was_not"),

    # fields that are 0 or false leave the key
    ("store.key", "sidae_lib/config.py",
     "if value != f.default and not first:", "if value and value != f.default and not first:", "tests/test_config.py"),
    ("store.lock", "sidae_lib/store.py", "held.enter_context(FileLock(lock))", "lock.touch()",
     "tests/test_store.py::test_who_works_on_a_run_shares_it_with_nobody"),
    ("store.rename_first", "sidae_lib/paths.py",
     "            os.fsync(f.fileno())\n        os.replace(temporary, path)\n",
     "            os.replace(temporary, path)\n            os.fsync(f.fileno())\n",
     "tests/test_train.py::test_what_gets_its_name_is_on_the_disk_whole"),
    # processes that share a bundle look for room at the same time
    ("store.bundle", "sidae_lib/store.py",
     'with alone(bundle.with_name(f".{bundle.name}.lock"), "choose another --bundle"):', "if True:",
     "tests/test_adopt.py::test_processes_that_write_at_once_break_no_line_and_fill_no_file_over"),

    ("checkpoints.seal", "sidae_lib/checkpoint.py",
     '            if meta.pop("seal") != sha256(packed(tensors, meta)):\n                raise ValueError\n',
     '            meta.pop("seal")\n', "tests/test_lost.py::test_damaged_files_are_named_set_aside_and_computed_again"),
    # an evaluation begins before what it evaluates is saved
    ("checkpoints.late", "sidae_lib/train.py",
     "if told or late or pause or time.monotonic()", "if told or late or time.monotonic()",
     "tests/test_until.py::test_an_evaluation_that_is_cut_off_is_all_that_is_lost"),

    # a split that lacks a class: the labels of those behind it move up
    ("readers.class_lost", "sidae_lib/pictures.py",
     "np.array([c for c, _ in labelled])", "np.unique([c for c, _ in labelled], return_inverse=True)[1]", "tests/test_data.py"),
    # the images that become a test split stay in the training split too
    ("readers.test_in_train", "sidae_lib/reader.py",
     'train.take(~test, "train")', 'train', "tests/test_own.py"),
    # mean and std of the test split where there is no training split
    ("readers.statistics", "sidae_lib/data.py",
     'for s in ("train", "unlabeled", "test") if s in splits)', "for s in SPLITS if s in splits)", "tests/test_data.py"),

    ("evaluation.last_bin", "sidae_lib/portrait.py",
     "np.histogram(d[same], edges)[0]", "np.histogram(d[same], edges[:-1])[0]",
     "tests/test_metric.py::test_histograms_are_counts_over_all_pairs"),

    ("claims.too_few", "sidae_lib/differences.py",
     "SEEDS = 3  #", "SEEDS = 2  #", "tests/test_claims.py"),
    ("claims.test_images", "sidae_lib/differences.py",
     "stats.norm.isf(alpha / 2) * self.images", "0 * self.images",
     "tests/test_claims.py::test_an_interval_holds_seeds_and_test_images"),
    ("claims.uncorrected", "sidae_lib/differences.py",
     "alpha / (len(p) - k)", "alpha", "tests/test_claims.py::test_holm_is_the_step_down_procedure"),
    ("claims.scale_of_two_seeds", "sidae_lib/claims.py",
     "by_scale.get(scale, 0) + (n >= SEEDS)", "by_scale.get(scale, 0) + (n >= 2)",
     "tests/test_claims.py::test_the_scale_with_the_most_cases_of_three_seeds_decides_of_equals_the_largest"),
    ("claims.unfinished", "sidae_lib/claims.py",
     """frame[finished | frame["first"]]""", "frame",
     "tests/test_until.py::test_of_an_unfinished_run_claims_see_the_first_checkpoint_alone"),
    ("claims.direction", "sidae_lib/claims.csv",
     "method == 'dae' > method == 'simsiam'", "method == 'simsiam' > method == 'dae'",
     "tests/test_scoreboard.py::test_the_file_is_the_board_of_now"),

    # a run that failed counts as done
    ("grid.failure_lost", "sidae_lib/grid.py",
     "result = future.result()\n                error = result.error\n", "result = future.result()\n",
     "tests/test_grid.py::test_each_is_computed_once_and_equals_what_one_process_computes"),
    # a run starts beside the one that it depends on
    ("grid.too_early", "sidae_lib/processes.py",
     "if unfinished.isdisjoint(tasks.dependencies(job.run))]", "]",
     "tests/test_jobs.py::test_a_run_starts_in_its_turn_when_what_it_depends_on_is_done"),
    # threads of one worker draw initial weights from one generator at the same time
    ("grid.shared_generator", "sidae_lib/step.py",
     "with _SEEDING, torch.random.fork_rng(devices=[]):", "with torch.random.fork_rng(devices=[]):",
     "tests/test_train.py::test_threads_draw_their_weights_one_after_the_other"),

    ("notebooks.scale", "notebooks/09_five_axes.ipynb",
     'recorded.fetch(\\"five_axes\\", scale', 'recorded.fetch(\\"five_axes\\", \\"smoke\\"',
     "tests/test_notebooks.py::test_every_parameter_is_read"),
    # nothing that is printed depends on it
    ("notebooks.stop_gradient", "notebooks/00_sidae_step_by_step.ipynb",
     '    "    z = z.detach()  # stop-gradient\\n",\n', "",
     "tests/test_notebooks.py::test_the_walk_stops_the_gradient_where_the_library_does"),
    ("notebooks.labels", "notebooks/10_your_own_images.ipynb",
     "own.STEPS[scale], labels=labels,", "own.STEPS[scale],", "notebooks/10_your_own_images.ipynb"),
    ("notebooks.column", "notebooks/07_pairwise_vs_triplet.ipynb",
     'ax.errorbar(at, own[\\"mean\\"], own[\\"se\\"]', 'ax.errorbar(at, own[\\"published\\"], own[\\"se\\"]',
     "tests/test_lecture.py::test_the_reports_chart_shows_our_means"),
    # a panel shows laptop scale where the paper's is on record
    ("notebooks.largest", "sidae_lib/recorded.py",
     'SCALES = ("paper", "laptop", "quick")', 'SCALES = ("laptop", "paper", "quick")', "tests/test_recorded.py"),
)]  # fmt: skip


def wrong(m: Mutant) -> str:
    """Why a mutant cannot be made, in one sentence, or nothing."""
    found = (ROOT / m.file).read_text().count(m.old) if (ROOT / m.file).is_file() else 0
    return "" if found == 1 else f"{m.name}: its old text stands {found} times in {m.file}, not once; write it anew."


def make(m: Mutant, folder: Path) -> None:
    """A copy of the checkout with the fault in it: the files that git tracks, or all but what is made; no repository."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
    else:
        made = shutil.ignore_patterns(".*", "data", "runs", "executed", "build", "test-artifacts", "__pycache__")
        shutil.copytree(ROOT, folder, ignore=made)
    text = (folder / m.file).read_text()
    (folder / m.file).write_text(text.replace(m.old, m.new))


def killer(folder: Path, tests: str, seconds: float) -> str:
    """The first test that fails in the copy, or nothing. Raises RuntimeError where it cannot be told."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("SIDAE_")}  # no mutant meets the real store or its data
    env |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, "-c", PYTEST, folder, "-x", "-q", "-p", "no:cacheprovider", "--all", *tests.split()]
    with open(folder.parent / "log", "w+") as log:
        p = subprocess.Popen(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0)
        RUNNING.add(p.pid)
        try:
            code = p.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"the limit of {seconds:g} s"
        finally:
            RUNNING.discard(p.pid)
            end(p.pid)
        log.seek(0)
        text = log.read()
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", text, re.M)
    if code not in (0, 1, 2) or bool(code) != bool(failed):
        raise RuntimeError(f"pytest {tests} ended with code {code}:\n{text[-2000:]}")
    return failed[1] if failed else ""


def end(group: int) -> None:
    """Ends a process and those that it has left behind."""
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def attempt(m: Mutant, whole: bool) -> str:
    """Tries one mutant and says in a line what killed it, which is returned; nothing: it lives."""
    began = time.monotonic()
    with TemporaryDirectory(prefix="mutant-", ignore_cleanup_errors=True) as tmp:
        make(m, folder := Path(tmp) / "copy")
        stages = (WHOLE, "notebooks") if whole else (m.tests,)
        by = next(filter(None, (killer(folder, t, SECONDS["whole" if whole else "own"]) for t in stages)), "")
    said = f"killed by {by}" if by else "lives" if whole else "survives its own tests"
    print(f"{m.name:26s} {time.monotonic() - began:6.0f} s  {said}", flush=True)
    return by


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(m.name for m in MUTANTS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="so many at once, of one thread each")
    parser.add_argument("--own", action="store_true", help="stop after each mutant's own tests")
    args = parser.parse_args(argv)
    chosen = [m for m in MUTANTS if not args.names or m.name in args.names]
    unknown = sorted({*args.names} - {m.name for m in chosen})
    if said := [f"There is no mutant {name}; --help lists them." for name in unknown] or [*filter(None, map(wrong, chosen))]:
        print(*said, sep="\n", file=sys.stderr)
        return 2
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for whole in (False,) if args.own else (False, True):
                killers = pool.map(partial(attempt, whole=whole), chosen)
                chosen = [m for m, by in zip(chosen, [*killers]) if not by]
        except (RuntimeError, KeyboardInterrupt) as e:
            pool.shutdown(wait=False, cancel_futures=True)
            for group in [*RUNNING]:
                end(group)
            print(str(e) or "Stopped.", file=sys.stderr)
            return 2 if isinstance(e, RuntimeError) else 130
    return 1 if chosen else 0


if __name__ == "__main__":
    sys.exit(main())
