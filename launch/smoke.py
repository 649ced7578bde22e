"""What a machine with an accelerator says of this project, in ten minutes and one JSON file.

    python launch/smoke.py --platform tpu|cuda|cpu --out FILE.json [--work DIR] [--batch N] [--only PART ...]

  numerics    towers and losses, forward and backward, in float32 at the highest precision, against the same on the CPU
  stages      ingest, stage 1, emission with the student as teacher, stage 2: `mmkd` as a user runs it
  resume      a run that gets SIGTERM, goes on, is killed, and goes on, against one that nothing happened to
  throughput  the full-size step of stage 1: pairs/s and MFU

Each part runs in processes of its own, one at a time: an accelerator serves one. To be started by tpu_smoke.sh or
gpu_smoke.sh, which bring the packages. Exit code 0 when all parts pass, else 1; the file is written either way.
"""

import argparse
import json
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
PARTS = ("numerics", "stages", "resume", "throughput")
# Largest relative errors in float32: of towers' and losses' values, and of gradients.
VALUES, GRADIENTS = 2e-5, 2e-4
STEPS = 120  # of the run that is disturbed


class FailedError(Exception):
    """A part did not do what it should; the text says what."""


class Machine:
    """Where commands run, and where their files go."""

    def __init__(self, name, work):
        self._name, self.work = name, work

    def start(self, words, on=None):
        """A Python process with these words, on the accelerator unless told otherwise; its output goes to a log."""
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": on or self._name,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }
        with (self.work / "log").open("ab") as log:
            log.write(f"\n$ {' '.join(map(str, words))}\n".encode())
            log.flush()
            return subprocess.Popen(
                [sys.executable, *map(str, words)], env=environment, cwd=ROOT, stdout=log, stderr=log
            )

    def run(self, *words, on=None):
        """Runs to the end.

        Raises:
          FailedError: it ended with an error; the last line of the log is told.
        """
        code = self.start(words, on).wait()
        if code:
            raise FailedError(f"{' '.join(map(str, words[:4]))} ended with exit code {code}: {self.last_line()}")

    def last_line(self):
        """What the log ends with."""
        lines = (self.work / "log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def part(self, name, out, *words, on=None):
        """What a function of smoke_parts.py finds, which it writes as JSON."""
        self.run(ROOT / "launch" / "smoke_parts.py", name, out, *words, on=on)
        return json.loads(pathlib.Path(out).read_text())

    def mmkd(self, *words):
        """One command of the project."""
        self.run("-m", "mmkd_jax", *words)


def numerics(machine, args):
    """Relative errors of each tower and loss; `default` is a control: the same at the default precision."""
    golden = machine.work / "golden.npz"
    machine.part("golden", machine.work / "golden.json", golden, on="cpu")
    found = machine.part("compare", machine.work / "numerics.json", golden)
    wrong = [k for k, v in found["errors"].items() if not v <= (GRADIENTS if k.endswith("gradient") else VALUES)]
    return {"passed": not wrong, "wrong": wrong, "limits": {"value": VALUES, "gradient": GRADIENTS}, **found}


def stages(machine, args):
    """Both stages from pictures, and their losses."""
    work = machine.work
    data = data_of(machine)
    stage1 = train(machine, "stage1_clip.py:smoke", work / "stage1", data)
    machine.mmkd("emit", "--teacher", f"student={stage1}", "--pairs", data["pairs"], "--out", work / "features")
    features = [f"--config.init={stage1}", f"--config.features={work / 'features'}"]
    stage2 = train(machine, "stage2_mmkd.py:smoke,recipe=plus", work / "stage2", data, *features)
    losses = {folder.name: [line["loss"] for line in lines(folder)] for folder in (stage1, stage2)}
    whole = all(len(found) == 4 and all(abs(x) < 1e4 for x in found) for found in losses.values())
    return {"passed": whole, "losses": losses}


def resume(machine, args):
    """Losses of a run that was stopped twice beside those of one that was not."""
    data = data_of(machine)
    fields = [f"--config.steps={STEPS}", "--config.save_every=10", "--config.log_every=1"]
    calm = train(machine, "stage1_clip.py:smoke", machine.work / "calm", data, *fields)
    words = train_words("stage1_clip.py:smoke", machine.work / "disturbed", data, *fields)
    codes = [disturb(machine, words, number, after) for number, after in ((signal.SIGTERM, 30), (signal.SIGKILL, 70))]
    machine.run(*words)
    expected, found = ([(line["step"], line["loss"]) for line in lines(f)] for f in (calm, machine.work / "disturbed"))
    steps = [step for step, _ in found] == list(range(1, STEPS + 1))
    apart = max((abs(a - b) / abs(b) for (_, a), (_, b) in zip(found, expected)), default=float("nan"))
    passed = steps and codes == [75, -signal.SIGKILL] and apart <= 1e-3
    return {"passed": passed, "exit_codes": codes, "all_steps": steps, "identical": found == expected, "apart": apart}


def throughput(machine, args):
    """Pairs/s and MFU of the full-size step, the input left out."""
    found = machine.part("throughput", machine.work / "throughput.json", args.batch, args.config)
    return {"passed": found["pairs_per_second"] > 0, **found}


def disturb(machine, words, number, after):
    """Exit code of a run that gets a signal once it has logged so many steps."""
    process = machine.start(words)
    while process.poll() is None and len(lines(machine.work / "disturbed")) < after:
        time.sleep(0.01)
    if process.poll() is None:
        process.send_signal(number)
    return process.wait()


def data_of(machine):
    """Made once: {"pairs": DIR, "vocabulary": DIR, "tokens": N}."""
    path = machine.work / "data.json"
    if path.exists():
        return json.loads(path.read_text())
    return machine.part("data", path, machine.work / "data", on="cpu")


def train_words(config, folder, data, *fields):
    """The words of one training."""
    given = {"data.pairs": data["pairs"], "tokenizer": data["vocabulary"], "model.text.vocab_size": data["tokens"]}
    fields = [*(f"--config.{name}={value}" for name, value in given.items()), *fields]
    return ["-m", "mmkd_jax", "train", "--config", f"configs/{config}", "--workdir", folder, *fields]


def train(machine, config, folder, data, *fields):
    """Trains; returns the run's folder."""
    machine.run(*train_words(config, folder, data, *fields))
    return folder


def lines(folder):
    """The run's numbers by step, but for a line that is being written."""
    path = folder / "metrics.jsonl"
    found = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in found if line.endswith("\n")]


def measure(name, machine, args):
    """What one part finds, its seconds, and its error if it has one."""
    say(f"{name} ...")
    begin = time.monotonic()
    try:
        found = globals()[name](machine, args)
    except FailedError as error:
        found = {"passed": False, "error": str(error)}
    found["seconds"] = round(time.monotonic() - begin, 1)
    say(f"{name} {'passed' if found['passed'] else 'FAILED'} in {found['seconds']} s")
    return found


def say(text):
    """A line for whoever waits."""
    print(f"smoke: {text}", file=sys.stderr, flush=True)


def commit():
    """The checkout's commit; "" where it is none."""
    try:
        asked = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return ""
    return asked.stdout.strip()


def main(argv):
    """Runs the parts and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=("tpu", "cuda", "cpu"), required=True)
    parser.add_argument("--out", required=True, metavar="FILE.json", type=pathlib.Path)
    parser.add_argument("--work", metavar="DIR", type=pathlib.Path, help="keeps runs and the log there")
    parser.add_argument("--batch", type=int, default=256, metavar="N", help="pairs a device, halved until it fits")
    parser.add_argument("--config", default="stage1_clip.py", help="of throughput (default: stage1_clip.py)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    work = args.work or pathlib.Path(tempfile.mkdtemp(prefix="mmkd-smoke-"))
    work.mkdir(parents=True, exist_ok=True)
    machine = Machine(args.platform, work.resolve())
    result = {"schema": 1, "commit": commit(), "host": platform.platform(), "parts": {}}
    try:
        result["machine"] = machine.part("machine", machine.work / "machine.json")
        for name in args.only:
            result["parts"][name] = measure(name, machine, args)
    except FailedError as error:
        result["error"] = str(error)
        say(error)
    result["passed"] = "error" not in result and all(part["passed"] for part in result["parts"].values())
    if not result["passed"]:
        result["log"] = (machine.work / "log").read_text(errors="replace")[-20000:]
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    say(f"{'passed' if result['passed'] else 'FAILED'}; send back {args.out}")
    if not args.work:
        shutil.rmtree(work, ignore_errors=True)
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
