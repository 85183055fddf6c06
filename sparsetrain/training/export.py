"""A trained model as one file of weights, zeros in place, for whatever reads safetensors."""

from pathlib import Path
from typing import Literal

from safetensors.torch import save_file

from sparsetrain.errors import RunFolderError
from sparsetrain.models.hugging_face import to_hugging_face
from sparsetrain.training.trained import TrainedRun

Names = Literal["hugging-face", "ours"]


def export_run(folder: Path, to: Path, *, names: Names = "hugging-face") -> tuple[int, int]:
    """Write the weights of a run's newest intact checkpoint, dense and float32; pruned ones are zeros.

    Args:
        folder: The run.
        to: The file, FILE.safetensors, which must not exist.
        names: Those of LlamaForCausalLM or GPT2LMHeadModel, or our own.

    Returns:
        Weights in the file, and how many of them are not zero.

    Raises:
        RunFolderError: It is not a run folder, or the file exists or cannot be written.
        CheckpointError: The run has no intact checkpoint.
        ConfigError: The model has no counterpart with such names.
    """
    to = Path(to)
    if to.suffix != ".safetensors":
        raise RunFolderError(f"{to}: name a file that ends in .safetensors")
    if to.exists():
        raise RunFolderError(f"{to}: exists already; name another file, or delete it")
    run = TrainedRun.load(folder)
    weights = {name: weight.cpu() for name, weight in run.model.state_dict().items()}
    if names == "hugging-face":
        weights = to_hugging_face(run.config.model, weights)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: weight.contiguous() for name, weight in weights.items()}, to, metadata={"format": "pt"})
    except OSError as error:
        raise RunFolderError(f"{to}: cannot be written ({error.strerror})") from error
    return (
        sum(weight.numel() for weight in weights.values()),
        sum(int(weight.count_nonzero()) for weight in weights.values()),
    )
