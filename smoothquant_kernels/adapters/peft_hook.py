"""Makes peft attach LoRA adapters to quantized layers."""

from __future__ import annotations

from smoothquant_kernels.errors import SmoothQuantError


def register_peft(*, folded: bool = False) -> None:
    """Lets peft attach, load, switch and train LoRA adapters on quantized layers, in this process.

    It serves `get_peft_model`, `PeftModel.from_pretrained` and the `load_adapter` of transformers, also with
    ``target_modules="all-linear"``, rsLoRA, DoRA and several adapters. Adapter files are those of the float model, in
    both directions. Float models are treated as before. Each call sets `folded` anew.

    Args:
        folded: also allow adapters on layers whose inputs or outputs are no longer those of the float model, because
            smoothing factors are folded into the parameters around them. An adapter that was trained on this very
            quantized model fits; one from the float model gives wrong results there.

    Raises:
        SmoothQuantError: peft is not installed, or too old. Later, peft raises it before it changes the model: for
            adapters on such layers without `folded`, for initializations that change the float weight (PiSSA, CorDA,
            OLoRA, LoftQ, LoRA-GA, KaSA), for layers of which tensor parallelism holds a part here, for int8 layers in
            `modules_to_save`, and for `merge_adapter` and `merge_and_unload`.

    Equivalent to:
        y = layer(x) + scaling * lora_B(lora_A(dropout(x))), in the type of layer(x)

    Source: LoRA (Hu et al., 2021); Hugging Face peft.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise SmoothQuantError(
            "register_peft needs the package peft, which is not installed: pip install 'peft>=0.21'."
        ) from error
    try:
        from smoothquant_kernels.adapters.lora import install
    except (ImportError, AttributeError) as error:
        raise SmoothQuantError(
            f"register_peft does not know this release of peft ({error}): pip install 'peft>=0.21,<0.22'."
        ) from error
    install(folded=folded)
