"""What a run says while it runs: a progress bar for people, log.jsonl for programs, and lines above the bar.

Rank 0 alone speaks. Used by both train scripts.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from qa.training.distributed import Runtime


@dataclass
class Stretch:
    """The steps since the last line of the log."""

    since: float = field(default_factory=time.perf_counter)
    num_examples: int = 0
    loss_sum: float = 0.0
    weight: int = 0


class RunLog:
    """Progress of one process of a run; every method does nothing on ranks other than 0."""

    def __init__(self, path: Path, total_steps: int, done_steps: int, unit: str, runtime: Runtime) -> None:
        self.is_main = runtime.is_main
        self.unit = unit  # what a batch is made of: windows (BERT) or questions (LLaMA)
        self.stretch = Stretch()
        if self.is_main:
            self.file = open(path, "a", encoding="utf-8")
            self.bar = tqdm(total=total_steps, initial=done_steps, unit="step", dynamic_ncols=True, smoothing=0.05)

    def step(self, step: int, loss: float, num_examples: int, weight: int, every: int, **values: Any) -> None:
        """One optimizer step is done.

        Args:
            loss: the step's mean loss over `weight` windows or answer tokens; a stretch's mean is weighted by them.
            every: steps of a stretch, which becomes one line.
            values: written as they are at the end of a stretch (lr, grad_norm, padding...).
        """
        if not self.is_main:
            return
        stretch = self.stretch
        stretch.num_examples += num_examples
        stretch.loss_sum += loss * weight
        stretch.weight += weight
        self.bar.update()
        if step % every == 0 or step == self.bar.total:
            mean, speed = stretch.loss_sum / stretch.weight, stretch.num_examples / (time.perf_counter() - stretch.since)
            self.bar.set_postfix_str(f"loss {mean:.4f}, lr {values['lr']:.2e}, {speed:.1f} {self.unit}/s")
            self.write("step", step=step, loss=mean, **{f"{self.unit}_per_second": speed}, **values)
            self.stretch = Stretch()

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
            self.bar.write(text)

    @contextlib.contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Leave the time of an evaluation or a checkpoint out of the speed."""
        begin = time.perf_counter()
        yield
        self.stretch.since += time.perf_counter() - begin

    def close(self) -> None:
        if self.is_main:
            self.bar.close()
            self.file.close()
