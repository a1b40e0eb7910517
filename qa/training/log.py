"""What a run says while it runs: a progress bar for people, log.jsonl for programs, and lines above the bar.

If stderr is no terminal, each line of log.jsonl is also a line of text instead of the bar. Only rank 0 speaks. Used by both
train scripts.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from qa.training.distributed import Runtime


class RunLog:
    """The progress of a run; every method does nothing on ranks other than 0.

    The steps since the last line of log.jsonl are a stretch: its next line has their means.
    """

    def __init__(self, path: Path, total_steps: int, item_name: str, runtime: Runtime) -> None:
        self.is_main, self.total_steps = runtime.is_main, total_steps
        self.item_name = item_name  # what a batch is made of: windows (BERT) or questions (LLaMA)
        self.stretch: list[dict[str, Any]] = []  # one dict per step
        self.since = time.perf_counter()  # the beginning of the stretch
        self.bar: tqdm | None = None
        if self.is_main:
            is_cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
            self.file = open(path, "a", encoding="utf-8", errors="backslashreplace")
            self.file.write("\n" * is_cut)  # a crash left half a line: the next event begins its own

    def step(self, step: int, loss: float, num_items: int, weight: int, every: int, grad_norm: float,
             padding: float | None = None, **values: Any) -> None:
        """One optimizer step is done. After `every` steps a stretch ends.

        num_items: windows (BERT) or questions (LLaMA) of the step; `every`: --log-every.
        loss: mean over the step's `weight` windows (BERT) or answer tokens (LLaMA); the stretch's mean is over all of its own.
        grad_norm, padding: the line has their means over the steps; norms that are not finite are left out.
        values: the line has them as they are at the last step (lr, skipped).
        """
        if not self.is_main:
            return
        if self.bar is None:  # opened late, so that it does not mix with what is said before the first step
            self.bar = tqdm(total=self.total_steps, initial=step - 1, unit="step", dynamic_ncols=True, smoothing=0.05,
                            disable=None)  # None: disabled if stderr is no terminal
        self.stretch.append({"step": step, "loss_sum": loss * weight, "num_items": num_items, "weight": weight,
                             "grad_norm": grad_norm, "padding": padding, "values": values})
        self.bar.update()
        if step % every == 0 or step == self.total_steps:
            self._end_stretch()

    def write(self, event: str, **values: Any) -> None:
        """One line of log.jsonl. NaN and infinity (fp16's gradient norm in a skipped step) become null: JSON has neither."""
        if self.is_main:
            values = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                      for name, value in values.items()}
            line = {"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%S"), **values}
            self.file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self.file.flush()

    def say(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text)  # above the bar, if one is open
            sys.stdout.flush()

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Leave the time of an evaluation or a checkpoint out of the speed."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.since += time.perf_counter() - begin

    def close(self) -> None:
        """End the last stretch, however short it is, and close the file."""
        if self.is_main:
            if self.stretch:
                self._end_stretch()
            if self.bar is not None:
                self.bar.close()
            self.file.close()

    def _end_stretch(self) -> None:
        now = time.perf_counter()
        steps, seconds = self.stretch, now - self.since
        self.stretch, self.since = [], now
        loss = sum(step["loss_sum"] for step in steps) / sum(step["weight"] for step in steps)
        speed = sum(step["num_items"] for step in steps) / seconds
        norms = [step["grad_norm"] for step in steps if math.isfinite(step["grad_norm"])]
        paddings = [step["padding"] for step in steps if step["padding"] is not None]
        number, values = steps[-1]["step"], steps[-1]["values"]
        self.write("step", step=number, loss=loss, **{f"{self.item_name}_per_second": speed}, **values,
                   **({"padding": fmean(paddings)} if paddings else {}),
                   grad_norm=fmean(norms) if norms else None, grad_norm_max=max(norms, default=None))
        text = f"loss {loss:.4f}, lr {values['lr']:.2e}, {speed:.1f} {self.item_name}/s"
        if self.bar.disable:
            print(f"step {number} of {self.total_steps}: {text}", file=sys.stderr)
        else:
            self.bar.set_postfix_str(text)
