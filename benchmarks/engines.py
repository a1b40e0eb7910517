"""BERT evaluation side by side with the engines that people pick for speed: ONNX Runtime (fp32, int8) and OpenVINO (fp32).

    pip install -r requirements-bench.txt
    python benchmarks/engines.py --ckpt runs/bert --data dev-v1.1.json --windows 400 --rounds 5

Only the scores of the same windows are timed, the longest first; an engine takes the place of the model in BertReader. The
network is transformers' own class, exported once with dynamic sizes. The peers have their best settings: ONNX Runtime all its
optimisations and its fusions for BERT; int8 is its dynamic quantisation of the linear layers; OpenVINO two batches at a time,
one a core, or one batch on all cores; every engine the batch size that was fastest for it on the first windows. Then the
engines take turns, round after round. Also printed: by how much the scores differ from ours, and how many answers are the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.optimizer import optimize_model
from torch import nn
from transformers import AutoModelForQuestionAnswering

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from qa.bert.reader import BertReader  # noqa: E402
from qa.bert.windows import Windows, make_windows  # noqa: E402
from qa.data.splits import first_passages  # noqa: E402
from qa.data.squad import SquadData, load_squad  # noqa: E402
from qa.evaluation.scoring import unrefused_answers  # noqa: E402
from qa.reader import open_reader  # noqa: E402

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
BATCHES = (512, 1024, 2048, 4096)  # tokens, padding included


def export(folder: Path, path: Path) -> None:
    model = AutoModelForQuestionAnswering.from_pretrained(folder, attn_implementation="eager").eval()
    model.config.return_dict = False
    example = torch.ones(2, 16, dtype=torch.long)
    names = [*INPUTS, "start", "end"]
    torch.onnx.export(model, (example, example, example), str(path), input_names=names[:3], output_names=names[3:],
                      dynamic_axes={name: {0: "batch", 1: "length"} for name in names}, opset_version=17, dynamo=False)


class Engine(nn.Module):
    """In the model's place: run([B, L] of each input) gives start and end scores, [B, L] each."""

    def __init__(self, run: Callable[[list[np.ndarray]], tuple[np.ndarray, np.ndarray]]):
        super().__init__()
        self.run = run

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.from_numpy(scores) for scores in self.run([one.long().numpy() for one in inputs]))


def onnx_runtime(path: Path, threads: int) -> Engine:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Engine(lambda inputs: session.run(["start", "end"], dict(zip(INPUTS, inputs, strict=True))))


def open_vino(path: Path, threads: int, streams: int) -> Engine:
    compiled = openvino.compile_model(path, "CPU", {
        "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": streams})

    def run(inputs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        parts = [np.array_split(one, min(streams, len(one))) for one in inputs]
        requests = []
        for part in zip(*parts, strict=True):
            requests.append(compiled.create_infer_request())
            requests[-1].start_async(dict(zip(INPUTS, part, strict=True)))
        for request in requests:
            request.wait()
        start, end = (np.concatenate([request.get_output_tensor(place).data for request in requests]) for place in (0, 1))
        return start, end

    return Engine(run)


def seconds_of(reader: BertReader, windows: Windows) -> tuple[float, torch.Tensor]:
    begin = time.perf_counter()
    scores = reader._window_scores(windows)
    return time.perf_counter() - begin, scores


def best_batch(reader: BertReader, windows: Windows) -> BertReader:
    """The reader with the batch size that took least, after a first try that does not count."""
    readers = [dataclasses.replace(reader, micro_tokens=tokens) for tokens in BATCHES]
    seconds_of(readers[0], windows)
    return min(readers, key=lambda one: seconds_of(one, windows)[0])


def some(data: SquadData, reader: BertReader, num_windows: int) -> tuple[SquadData, Windows]:
    """Passages drawn with seed 0, of about as many windows; a question has one, seldom more."""
    sample = dataclasses.replace(data, passages=first_passages(data.passages, num_windows, seed=0))
    return sample, make_windows(sample.passages, reader.tokenizer, reader.settings.max_length, reader.settings.overlap)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--data", default="demo")
    parser.add_argument("--windows", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    ours = open_reader(args.ckpt, precision="fp32")
    threads, data = torch.get_num_threads(), load_squad(args.data, "dev")
    sample, windows = some(data, ours, args.windows)
    _, few = some(data, ours, args.windows // 8)
    with tempfile.TemporaryDirectory() as scratch:
        plain, fused, int8 = (Path(scratch) / f"{name}.onnx" for name in ("plain", "fused", "int8"))
        folder = Path(args.ckpt) / "model" if (Path(args.ckpt) / "model").is_dir() else Path(args.ckpt)
        export(folder, plain)
        config = ours.model.config
        optimize_model(str(plain), "bert", num_heads=config.num_attention_heads,
                       hidden_size=config.hidden_size).save_model_to_file(str(fused))
        quantize_dynamic(fused, int8, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=["MatMul"],
                         extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})
        engines = {"ONNX Runtime, fp32": onnx_runtime(fused, threads), "ONNX Runtime, int8": onnx_runtime(int8, threads),
                   "OpenVINO, fp32, one batch": open_vino(plain, threads, 1),
                   "OpenVINO, fp32, a batch a core": open_vino(plain, threads, threads)}
        readers = {"ours, fp32": ours, **{name: dataclasses.replace(ours, model=model) for name, model in engines.items()}}
        readers = {name: best_batch(reader, few) for name, reader in readers.items()}
        speeds: dict[str, list[float]] = {name: [] for name in readers}
        scores = {}
        for _ in range(args.rounds):
            for name, reader in readers.items():
                seconds, scores[name] = seconds_of(reader, windows)
                speeds[name].append(len(windows) / seconds)
        print(f"{len(windows)} windows of {windows.lengths.mean():.0f} tokens on average, {threads} threads; torch "
              f"{torch.__version__}, onnxruntime {onnxruntime.__version__}, openvino {openvino.__version__}", flush=True)
        answers = unrefused_answers(ours.answer(sample).predictions)
        for name, reader in readers.items():
            ratios = [mine / other for mine, other in zip(speeds["ours, fp32"], speeds[name], strict=True)]
            print(f"{name:<31} {statistics.median(speeds[name]):6.1f} windows/s at {reader.micro_tokens:,} tokens; ours / it "
                  f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); scores within "
                  f"{(scores[name] - scores['ours, fp32']).abs().max():.1e}", end="; ", flush=True)
            found = unrefused_answers(reader.answer(sample).predictions)
            print(f"{sum(found[id] == text for id, text in answers.items()) / len(answers):.1%} of the answers", flush=True)


if __name__ == "__main__":
    main()
