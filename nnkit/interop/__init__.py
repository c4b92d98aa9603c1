"""Trees out and in: parameters and state to and from Flax, PyTorch and safetensors files."""

from nnkit.interop.export import export_predict
from nnkit.interop.flax import flax_names, from_flax, to_flax
from nnkit.interop.pytorch import from_torch, to_torch, torch_names
from nnkit.interop.safetensors import load_safetensors, safetensors_metadata, save_safetensors

__all__ = [
    "export_predict",
    "flax_names",
    "from_flax",
    "from_torch",
    "load_safetensors",
    "safetensors_metadata",
    "save_safetensors",
    "to_flax",
    "to_torch",
    "torch_names",
]
