"""OPD, F2B and B2F compared: the same students, teacher, games, batch and number of updates, several seeds per arm.

    bash benchmarks/run.sh study                 # the curricula: every job that has no result yet, then the report
    bash benchmarks/run.sh study --losses        # the second part: what the loss is a mean over, and the curricula
    bash benchmarks/run.sh study --baselines     # the third part: imitation, reward, and OPD before or beside them
    bash benchmarks/run.sh study --notes         # the fourth part: what the teacher is shown
    bash benchmarks/run.sh study --report        # the figures and the tables of all parts from results/study/*.json

A job is one arm and one seed. It goes through the smoke run's train_arm.py, so through the recipe's hooks, the real
SGLang and the real ALFWorld engine. Its result is a JSON file that appears when the job has ended, so the command may
be killed at any point and started again: no finished job is repeated. STUDY.md describes the setting.
"""

import argparse
import fcntl
import os
import shutil
import signal
import sys
import time
from argparse import Namespace
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from benchmarks import SLIME, report, study_data, study_report, study_results
from benchmarks.study_arms import RESPONSE_LEN, RESULTS, Job, baseline_jobs, curriculum_jobs, loss_jobs, note_jobs
from examples.tcod.tools.plot_runs import read_run
from smoke import make_models, plays
from smoke.servers import DEVICE, HERE, Process, SGLangServer
from smoke.train_arm import push_weights


@dataclass(frozen=True)
class Place:
    """What a job has for itself: a student's server, and in the fourth part that of a teacher which reads notes."""

    student: SGLangServer
    reader: SGLangServer | None


class Running:
    """A job under way, on a place that it has until `stop`."""

    def __init__(self, job: Job, out: Path, teacher: SGLangServer, place: Place) -> None:
        self.job, self.place, self.folder = job, place, study_data.run_folder(out, job.games, job.name)
        self._started = time.monotonic()
        shutil.rmtree(self.folder, ignore_errors=True)  # of an attempt that was killed
        config = plays.write_settings(self.folder / "config.yaml", job.recipe)
        arm, student = job.arm, study_data.student_of(out, job)
        if arm.teacher == "reader":
            push_weights(place.reader.port, student, version=f"{job.seed}")
        scores = {"reader": place.reader, "self": place.student}.get(arm.teacher, teacher)
        command = [sys.executable, "-m", "benchmarks.study_arm"]
        command += ["--control", arm.control] if arm.control else []
        command += ["--config", config, "--student", student, "--data", out / job.games]
        command += ["--run-dir", self.folder, "--seed", job.seed, "--lr", job.rate, "--loss", arm.loss]
        command += ["--student-port", place.student.port, "--teacher-port", scores.port]
        command += ["--batch", arm.batch // arm.samples, "--samples", arm.samples]
        command += ["--updates", arm.updates, "--eval-interval", arm.every, "--keep", arm.keep]
        command += ["--response-len", RESPONSE_LEN, "--context-len", arm.context_len]
        command += [] if arm.evaluate_first else ["--skip-first-evaluation"]
        command += [] if arm.teacher else ["--no-teacher"]
        log, env = self.folder / "train.log", study_data.child_environment(out)
        self._process = Process(job.name, [*map(str, command)], log, env)

    def stop(self) -> None:
        self._process.stop()

    def ended(self) -> bool:
        return self._process.popen.poll() is not None

    def save(self, circumstances: dict[str, str]) -> str:
        """Write the result and say it in a line. Raises RuntimeError when the training ended with an error."""
        self._process.check()
        result = study_results.result(read_run(self.folder), self.job.arm.batch)
        if self.job.arm.family == "note":
            study_results.add_episodes(result, self.folder / "rollouts")
        if self.job.arm.family == "sft":  # what it learns from had to be played once
            result["updates"][0] |= study_data.cost_of_demonstrations(self.folder.parents[2])
        minutes = round((time.monotonic() - self._started) / 60, 1)
        about = {"arm": self.job.arm_name, "settings": self.job.settings, "minutes": minutes}
        report.save(self.job.path, {**about, **circumstances, **result})
        return f"{self.job.name}, {minutes} minutes: {study_results.one_line(result)}"


def run_jobs(jobs: list[Job], out: Path, parallel: int) -> None:
    """Run the jobs that have no result, `parallel` of them at once.

    Raises:
        SystemExit: jobs failed; the others were run.
    """
    waiting = [job for job in jobs if not job.done()]
    print(f"{len(waiting)} of {len(jobs)} jobs to do, {parallel} at once; working folder {out}", flush=True)
    if not waiting:
        return
    with ExitStack() as stack:
        out.mkdir(parents=True, exist_ok=True)
        try:
            fcntl.flock(stack.enter_context((out / "lock").open("w")), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"another study runs in {out}: wait for its end, or choose another --out")

        def server(name: str) -> SGLangServer:
            log = out / "logs" / f"{name}.log"
            return stack.enter_context(SGLangServer(f"{name} server", make_models.SHIPPED, log))

        teacher = server("teacher")
        # Also of the teacher's weights at first: a job pushes its student's.
        reads = any(job.arm.teacher == "reader" for job in waiting)
        places = [
            Place(server(f"student {i}"), server(f"reader {i}") if reads else None)
            for i in range(min(parallel, len(waiting)))
        ]
        for one in servers_of(teacher, places):
            one.wait_ready()
        if any(job.arm.family == "note" for job in waiting):
            study_data.make_note_data(out)
        else:
            study_data.make_data(out, teacher)
        failed = work_off(waiting, out, teacher, places)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the same command runs what has no result")


def servers_of(teacher: SGLangServer, places: list[Place]) -> list[SGLangServer]:
    return [teacher, *(server for place in places for server in (place.student, place.reader) if server)]


def work_off(waiting: list[Job], out: Path, teacher: SGLangServer, places: list[Place]) -> list[str]:
    """Run these jobs, as many at once as there are places. Returns the names of those that failed."""
    free = list(places)
    running: list[Running] = []
    failed: list[str] = []
    circumstances = {**report.circumstances("study"), "slime": SLIME}
    if DEVICE == "cuda":
        circumstances["machine"] += f", engines on one {torch.cuda.get_device_name()}"

    def fail(job: Job, error: Exception) -> None:
        failed.append(job.name)
        print(f"{job.name} failed: {error}", flush=True)

    try:
        while waiting or running:
            for server in servers_of(teacher, places):
                server.check_running()
            for one in [one for one in running if one.ended()]:
                one.stop()
                running.remove(one)
                free.append(one.place)
                try:
                    print(one.save(circumstances), flush=True)
                except RuntimeError as error:
                    fail(one.job, error)
            while free and (ready := [job for job in waiting if not job.waits]):
                waiting.remove(job := ready[0])
                try:
                    running.append(Running(job, out, teacher, free[-1]))
                    free.pop()
                except RuntimeError as error:
                    fail(job, error)
            while waiting and not running:
                job = waiting.pop()
                fail(job, RuntimeError(f"it goes on with {job.first}, which has no result"))
            time.sleep(0.5)
    finally:
        for one in running:
            one.stop()
    return failed


def main() -> None:
    options = parse_options()
    jobs = options.jobs()
    names = [job.name for job in jobs]
    if unknown := set(options.only) - set(names):
        sys.exit(f"--only: no such job: {', '.join(sorted(unknown))}; jobs are {', '.join(names)}")
    if not options.report:
        for number in (signal.SIGINT, signal.SIGTERM):  # either takes the servers down
            signal.signal(number, lambda number, _: sys.exit(128 + number))
        transformers.utils.logging.disable_progress_bar()
        chosen = [job for job in jobs if job.name in options.only or not options.only]
        run_jobs(chosen, options.out.resolve(), options.parallel)
    study_report.publish(RESULTS)


def parse_options() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, jobs in {"losses": loss_jobs, "baselines": baseline_jobs, "notes": note_jobs}.items():
        parser.add_argument(f"--{name}", action="store_const", dest="jobs", const=jobs, help="run this part")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--only", nargs="+", default=[], metavar="JOB", help="jobs by name, such as f2b-1")
    parser.add_argument("--parallel", type=int, default=max((os.cpu_count() or 1) // 2, 1), help="jobs at once")
    out = HERE.parent / "benchmarks" / "out" / "study"
    parser.add_argument("--out", type=Path, default=out, help="games, students, logs")
    parser.set_defaults(jobs=curriculum_jobs)
    return parser.parse_args()


if __name__ == "__main__":
    main()
