"""What a run says while it runs: a progress bar for people, log.jsonl for programs, and lines above the bar.

Where stderr is no terminal there are plain lines instead of the bar, one for each of log.jsonl. Rank 0 alone speaks. Used by
both train scripts.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from qa.training.distributed import Runtime


@dataclass
class Stretch:
    """The steps since the last line of the log."""

    since: float  # of time.perf_counter()
    num_examples: int = 0
    loss_sum: float = 0.0
    weight: int = 0
    grad_norms: list[float] = field(default_factory=list)
    paddings: list[float] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)  # of its last step: the step's number, and what has no mean


class RunLog:
    """Progress of one process of a run; every method does nothing on ranks other than 0."""

    def __init__(self, path: Path, total_steps: int, unit: str, runtime: Runtime) -> None:
        self.is_main, self.total_steps = runtime.is_main, total_steps
        self.unit = unit  # what a batch is made of: windows (BERT) or questions (LLaMA)
        self.stretch = Stretch(time.perf_counter())
        self.bar: tqdm | None = None
        if self.is_main:
            is_cut = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
            self.file = open(path, "a", encoding="utf-8", errors="backslashreplace")
            self.file.write("\n" * is_cut)  # a crash left half a line: the next event begins its own

    def step(self, step: int, loss: float, num_examples: int, weight: int, every: int, grad_norm: float,
             padding: float | None = None, **values: Any) -> None:
        """One optimizer step is done.

        Args:
            loss: the step's mean loss over `weight` windows or answer tokens; a stretch's mean is weighted by them.
            every: steps of a stretch, which becomes one line.
            grad_norm, padding: the line has their means over the stretch's steps; the norm's without those that are not finite.
            values: written as they are at the end of a stretch (lr, skipped...).
        """
        if not self.is_main:
            return
        if self.bar is None:  # not earlier: what is said before the first step would collide with it
            self.bar = tqdm(total=self.total_steps, initial=step - 1, unit="step", dynamic_ncols=True, smoothing=0.05,
                            disable=None)  # None: disabled where stderr is no terminal
        stretch = self.stretch
        stretch.num_examples += num_examples
        stretch.loss_sum += loss * weight
        stretch.weight += weight
        stretch.grad_norms += [grad_norm] if math.isfinite(grad_norm) else []
        stretch.paddings += [padding] if padding is not None else []
        stretch.last = {"step": step, **values}
        self.bar.update()
        if step % every == 0 or step == self.total_steps:
            self._end_stretch()

    def write(self, event: str, **values: Any) -> None:
        """One line of log.jsonl; a number that is none (fp16's gradient norm in a skipped step) is null, as JSON has no NaN."""
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
            self.stretch.since += time.perf_counter() - begin

    def close(self) -> None:
        """The last stretch ends here, however short it is."""
        if self.is_main:
            if self.stretch.last:
                self._end_stretch()
            if self.bar is not None:
                self.bar.close()
            self.file.close()

    def _end_stretch(self) -> None:
        now = time.perf_counter()
        stretch, self.stretch = self.stretch, Stretch(now)
        mean, speed = stretch.loss_sum / stretch.weight, stretch.num_examples / (now - stretch.since)
        step, norms = stretch.last.pop("step"), stretch.grad_norms
        padding = {"padding": fmean(stretch.paddings)} if stretch.paddings else {}
        self.write("step", step=step, loss=mean, **{f"{self.unit}_per_second": speed}, **stretch.last, **padding,
                   grad_norm=fmean(norms) if norms else None, grad_norm_max=max(norms, default=None))
        text = f"loss {mean:.4f}, lr {stretch.last['lr']:.2e}, {speed:.1f} {self.unit}/s"
        if self.bar.disable:
            print(f"step {step} of {self.total_steps}: {text}", file=sys.stderr)
        else:
            self.bar.set_postfix_str(text)
