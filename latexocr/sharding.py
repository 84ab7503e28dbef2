"""What FSDP2 (PyTorch's `fully_shard`, after arXiv:2304.11277) is told beyond accelerate's defaults, or refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from latexocr.errors import InputError


def check_fsdp(fsdp_plugin: Any) -> None:
    """Refuse FSDP settings under which training would end with no adapter to use.

    Raises:
        InputError: FSDP's first version, which was never tried, and takes no adapters in float32 beside weights in
            16 bits; sharded checkpoints (accelerate's default for FSDP2), which hold no adapter; or FSDP's own
            activation checkpointing, which breaks the names of the adapter's tensors (accelerate 1.15).
    """
    if fsdp_plugin.fsdp_version != 2:
        raise InputError(
            "FSDP is supported in its second version: set fsdp_version: 2, see scripts/accelerate/fsdp2.yaml"
        )
    if fsdp_plugin.state_dict_type.name != "FULL_STATE_DICT":
        raise InputError(
            f"fsdp_state_dict_type is {fsdp_plugin.state_dict_type.name}, which writes no adapter; set "
            "fsdp_state_dict_type: FULL_STATE_DICT as in scripts/accelerate/fsdp2.yaml"
        )
    if fsdp_plugin.activation_checkpointing:
        raise InputError(
            "fsdp_activation_checkpointing breaks the names of the adapter's tensors; leave it out and set "
            "gradient_checkpointing: true in the training configuration"
        )


def round_as_one_process_does(fsdp_plugin: Any, *, adapters: bool) -> None:
    """Let autocast alone decide what is computed in 16 bits.

    accelerate (1.15) has FSDP2 round every weight, every input of a layer and what the model returns, too: ERNIE's
    routers, their loss, and the angles of its positions, which are in float32 for a reason. What comes into a layer is
    not rounded when it is computed again (PyTorch 2.11), and a run with checkpointing would end there.

    Args:
        fsdp_plugin: of accelerate, before the model is prepared.
        adapters: are all that is trained, and their gradients are summed in float32. In full training weights and
            gradients are rounded to 16 bits before they are sent, all the same: half the traffic.
    """
    if policy := fsdp_plugin.mixed_precision_policy:
        more = {"param_dtype": None, "reduce_dtype": torch.float32} if adapters else {}
        fsdp_plugin.mixed_precision_policy = replace(policy, cast_forward_inputs=False, output_dtype=None, **more)
