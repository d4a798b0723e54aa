"""A backbone as a file: tensors by name (safetensors, torch), or the whole computation (ONNX, torch.export).

Files of the whole computation take images float32 [N, C, H, W] of the card's side, normalised as it says, N free, and
give features float32 [N, D]; both are run once before they count as written.
"""

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geokr.checkpoint import write_tensors
from geokr.config import ConfigError

SUFFIXES = {
    ".safetensors": "safetensors", ".pth": "torch", ".pt": "torch", ".onnx": "onnx", ".pt2": "torch-export",
}  # fmt: skip
WEIGHTS, GRAPHS = ("safetensors", "torch"), ("onnx", "torch-export")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ONNX_MODULES = ("onnx", "onnxscript")
# How far the features of a written graph may be from torch's, in shares of the largest: rounding, in another order.
TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
BATCHES = (1, 3)  # that a written graph is tried with; it was traced with 2

Run = Callable[[Tensor], Tensor]  # images [N, C, H, W] to features [N, D]


class InDtype(nn.Module):
    """A backbone that computes in another precision, with images and features in float32."""

    def __init__(self, backbone: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.backbone, self.dtype = backbone.to(dtype), dtype

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return self.backbone(images_NCHW.to(self.dtype)).float()


def check(form: str, dtype: str) -> None:
    """Raises ConfigError for what cannot be written here, before anything is computed."""
    if form != "onnx":
        return
    if missing := [name for name in ONNX_MODULES if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"--format onnx needs {' and '.join(missing)}: pip install -e '.[onnx]' in geokr's folder")
    if dtype == "bfloat16":
        raise ConfigError("--dtype bfloat16: ONNX Runtime does not compute in it on a CPU; take float16 for onnx")


def rounded(state: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Floating-point tensors in a dtype, the others as they are. Raises ConfigError for values beyond its range."""
    wanted = DTYPES[dtype]
    made = {key: tensor.to(wanted) if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    for key, tensor in made.items():
        if tensor.is_floating_point() and not tensor.isfinite().all() and state[key].isfinite().all():
            raise ConfigError(f"--dtype {dtype}: {key} holds {state[key].abs().max():.3g}, beyond it; take bfloat16")
    return made


def write_state(path: Path, state: dict[str, Tensor], form: str) -> None:
    if form == "safetensors":
        write_tensors(path, state, {"format": "pt"})
    else:
        torch.save(state, path)


def write_graph(path: Path, backbone: nn.Module, images_NCHW: Tensor, form: str, dtype: str) -> dict[str, Any]:
    """Writes the computation and tries it with other batches. Returns what the card says of that.

    Raises ConfigError if the file does not give torch's features.
    """
    model = backbone if dtype == "float32" else InDtype(backbone, DTYPES[dtype])
    write = _write_onnx if form == "onnx" else _write_torch
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # exporters speak of their own future
        try:
            write(path, model.eval(), images_NCHW[:2])
        except Exception as error:  # of many kinds, for what an exporter does not know
            first = (str(error).splitlines() or [""])[0]
            raise ConfigError(
                f"--format {form}: torch cannot write this backbone so ({type(error).__name__}: {first}); "
                "take safetensors, or another precision"
            ) from error
        written = _run_onnx(path) if form == "onnx" else _run_torch(path)
        if written is None:
            return {"tried": "no: onnxruntime is not installed here"}
        by, run = written
        return {"tried": by, "trial_difference": _largest_difference(run, model, images_NCHW, dtype, path.name)}


def _largest_difference(run: Run, model: nn.Module, images_NCHW: Tensor, dtype: str, where: str) -> float:
    worst = 0.0
    for batch in BATCHES:
        images = images_NCHW[:1].expand(batch, -1, -1, -1).contiguous() * torch.linspace(0.5, 1, batch).view(
            -1, 1, 1, 1
        )
        expected = model(images)
        difference = float((run(images) - expected).abs().max())
        if not difference <= TOLERANCES[dtype] * float(expected.abs().max()):
            raise ConfigError(f"{where}: gives features that are off by {difference:.3g} for {batch} images")
        worst = max(worst, difference)
    return worst


def _write_onnx(path: Path, model: nn.Module, images_NCHW: Tensor) -> None:
    torch.onnx.export(
        model,
        (images_NCHW,),
        str(path),
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def _run_onnx(path: Path) -> tuple[str, Run] | None:
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    by = f"onnxruntime {onnxruntime.__version__}"
    return by, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_torch(path: Path, model: nn.Module, images_NCHW: Tensor) -> None:
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (images_NCHW,), dynamic_shapes=shapes)
    torch.export.save(program, path)


def _run_torch(path: Path) -> tuple[str, Run]:
    module = torch.export.load(path).module()
    return f"torch {torch.__version__}", lambda images: module(images)
