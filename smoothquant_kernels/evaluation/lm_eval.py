"""`lm_eval` on quantized checkpoints.

    python -m smoothquant_kernels.evaluation.lm_eval run --model hf --model_args pretrained=DIR --tasks ...

Runs the unchanged command line of the Language Model Evaluation Harness (docs/guides/evaluation.md) in a process where
`from_pretrained` loads the folders of `save_quantized`.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

from smoothquant_kernels.checkpoint.transformers_hook import register_transformers
from smoothquant_kernels.errors import SmoothQuantError


def main() -> None:
    """Runs the command `lm_eval` with the arguments of `sys.argv`.

    Raises:
        SmoothQuantError: the package lm-eval is not installed.

    Equivalent to:
        register_transformers(); lm_eval.__main__.cli_evaluate()

    Source: https://github.com/EleutherAI/lm-evaluation-harness
    """
    if find_spec("lm_eval") is None:
        raise SmoothQuantError(
            "lm_eval is not installed: run `pip install 'smoothquant-kernels[eval]'`."
        )
    register_transformers()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    try:
        main()
    except SmoothQuantError as error:
        sys.exit(f"error: {error}")
