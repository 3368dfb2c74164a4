"""What people type and what a run is: the schema, the Llama presets, the request. Imports no other room."""

from megatron_rocm.config.presets import PRESETS, Preset
from megatron_rocm.config.request import RunRequest, Said, read
from megatron_rocm.config.schema import RunConfig

__all__ = ["PRESETS", "Preset", "RunConfig", "RunRequest", "Said", "read"]
