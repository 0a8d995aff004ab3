"""Who turns texts into vectors: ours, sentence-transformers and ONNX Runtime, on one model.

Each is a function from texts to [texts, width] vectors of length 1, tokenising included. Peers that
pad sort by length first, and get the batch size that serves them best of `BATCH_SIZES`.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastbert
from fastbert.tasks.registry import make_task
from fastbert.tasks.saved import Saved
from fastbert.tokenizer import Tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
BATCH_SIZES = (8, 16, 32)
# a quarter of the texts is enough to choose among them
TRIED = 4
LONGEST = 256
Encode = Callable[[Sequence[str]], np.ndarray]


def ours(folder: str, dtype: str, device: torch.device) -> Encode:
    """What `fastbert embed` runs: packed batches under a token budget."""
    task: Any = make_task("embed")
    task.max_seq_len = LONGEST
    model = task.restore_model(Path(folder)).to(device).eval()
    if dtype == "int8":
        from fastbert.int8 import quantize

        model = quantize(model)
    saved = Saved(task, [model], Tokenizer.from_pretrained(folder))
    compute = DTYPES.get(dtype, torch.float32)

    def encode(texts: Sequence[str]) -> np.ndarray:
        units = saved.build(task.rows_of(texts, texts))
        vectors = saved.run(units, dtype=compute).sequences
        assert vectors is not None
        return vectors

    return encode


def sentence_transformers(
    folder: str,
    dtype: str,
    device: torch.device,
    texts: Sequence[str] = (),
    *,
    accelerated: bool = False,
) -> Encode:
    """SentenceTransformer.encode, its model in the dtype throughout; `accelerated` by us. The size
    of its batches is tried on `texts`; the largest where there are none."""
    from sentence_transformers import SentenceTransformer

    options = {"dtype": DTYPES[dtype], "attn_implementation": "sdpa"}
    with contextlib.redirect_stderr(io.StringIO()):
        model: Any = SentenceTransformer(
            folder, device=str(device), model_kwargs=options, local_files_only=True
        )
    model.max_seq_length = LONGEST
    if accelerated:
        fastbert.accelerate(model)

    def encode(texts: Sequence[str], batch_size: int) -> np.ndarray:
        vectors = model.encode(
            list(texts),
            batch_size=batch_size,
            show_progress_bar=False,
            convert_to_tensor=True,
        )
        # numpy has no bf16
        return vectors.to(torch.promote_types(vectors.dtype, torch.float32)).cpu().numpy()

    return _fastest(encode, texts)


def onnx_runtime(
    folder: str, kind: str, threads: int, texts: Sequence[str], cache: dict[str, Path]
) -> Encode:
    """ONNX Runtime on the exported model: plain, `optimised` (its transformer optimiser's fused
    operators), or `int8` (its dynamic quantisation on top of that).

    The export is sentence-transformers' graph; its own ONNX backend needs optimum-onnx, which takes
    no transformers 5. Running the graph bare costs less than its encode does.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(_graph(folder, kind, cache)), options, providers=["CPUExecutionProvider"]
    )
    inputs = {value.name for value in session.get_inputs()}
    tokenizer = Tokenizer.from_pretrained(folder)

    def encode(texts: Sequence[str], batch_size: int) -> np.ndarray:
        parts = tokenizer.encode_batch(list(texts), literal=True)
        ids = [[tokenizer.cls_id, *part[: LONGEST - 2], tokenizer.sep_id] for part in parts]
        order = sorted(range(len(ids)), key=lambda number: -len(ids[number]))
        vectors: list[np.ndarray] = [np.empty(0)] * len(ids)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            fed = _padded([ids[number] for number in chosen])
            (states,) = session.run(None, {n: v for n, v in fed.items() if n in inputs})
            mask = fed["attention_mask"][..., None].astype(np.float32)
            means = (states * mask).sum(axis=1) / mask.sum(axis=1)
            means /= np.linalg.norm(means, axis=1, keepdims=True)
            for number, vector in zip(chosen, means, strict=True):
                vectors[number] = vector
        return np.stack(vectors)

    return _fastest(encode, texts)


@contextlib.contextmanager
def graphs() -> Iterator[dict[str, Path]]:
    """A folder for exported graphs, made once for all kinds, by name."""
    with tempfile.TemporaryDirectory() as folder:
        yield {"folder": Path(folder)}


def _graph(folder: str, kind: str, cache: dict[str, Path]) -> Path:
    if "plain" not in cache:
        cache["plain"] = cache["folder"] / "plain.onnx"
        _export(folder, cache["plain"])
    if kind != "plain" and "optimised" not in cache:
        from onnxruntime.transformers import optimizer

        config = fastbert.EncoderConfig.from_pretrained(folder)
        heads, width = config.num_attention_heads, config.hidden_size
        model = optimizer.optimize_model(
            str(cache["plain"]), "bert", num_heads=heads, hidden_size=width, opt_level=1
        )
        cache["optimised"] = cache["folder"] / "optimised.onnx"
        model.save_model_to_file(str(cache["optimised"]))
    if kind == "int8" and "int8" not in cache:
        import onnx
        from onnxruntime.quantization import quantize_dynamic

        cache["int8"] = cache["folder"] / "int8.onnx"
        # onnx knows no types behind the optimiser's fused operators
        quantize_dynamic(
            cache["optimised"],
            cache["int8"],
            per_channel=True,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    return cache[kind]


class _States(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        output = self.model(input_ids, attention_mask, token_type_ids)
        return output.last_hidden_state  # type: ignore[no-any-return]


def _export(folder: str, path: Path) -> None:
    from fastbert.bench import peers

    package = peers.transformers()
    package.utils.logging.disable_progress_bar()
    model = package.AutoModel.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, local_files_only=True
    )
    ids = torch.randint(5, 1000, (2, 16))
    names = ["input_ids", "attention_mask", "token_type_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # ONNX Runtime's optimiser knows BERT by what this exporter writes, not by the newer one's
        torch.onnx.export(
            _States(model.eval()),
            (ids, torch.ones_like(ids), torch.zeros_like(ids)),
            str(path),
            input_names=names,
            output_names=["last_hidden_state"],
            dynamic_axes={name: {0: "sequences", 1: "tokens"} for name in names},
            opset_version=17,
            dynamo=False,
        )


def _padded(sequences: Sequence[list[int]]) -> dict[str, np.ndarray]:
    shape = (len(sequences), max(map(len, sequences)))
    ids, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = 1
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def _fastest(encode: Callable[[Sequence[str], int], np.ndarray], texts: Sequence[str]) -> Encode:
    """With the batch size that took least on some of these texts; the largest where there are
    none."""
    tried = texts[::TRIED]
    took = {BATCH_SIZES[-1]: 0.0}
    for batch_size in BATCH_SIZES if texts else ():
        # the first pass of a size pays for memory and threads
        for _ in range(2):
            start = time.perf_counter()
            encode(tried, batch_size)
            took[batch_size] = time.perf_counter() - start
    best = min(took, key=lambda size: took[size])
    return lambda texts: encode(texts, best)
