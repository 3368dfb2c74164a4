"""The CPU platform: unpatched megatron-core 0.16.1 on gloo, without a GPU.

megatron-core is written for one device, "cuda". `install` puts a stand-in where its calls would reach for a GPU, before
the first model or optimizer is built (megatron-core may be imported before or after). Where there is a GPU it does
nothing. Each stand-in is a row of `PIECES`, with the call of megatron-core that needs it.

Functions are wrapped one by one; a `TorchFunctionMode` would be shorter, but is off in backward and in other threads.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._device import _device_constructors


@dataclass(frozen=True)
class Piece:
    """One stand-in: its name, the call (file:line under megatron/core) that needs it, and what puts it in place."""

    name: str
    needed_by: str
    apply: Callable[[], None]


def _replace(owner: Any, attribute: str, make: Callable[[Any], Any]) -> Callable[[], None]:
    """What sets owner.attribute to make(its present value)."""
    return lambda: setattr(owner, attribute, make(getattr(owner, attribute)))


def _instead(stand_in: Any) -> Callable[[Any], Any]:
    return lambda original: stand_in


def _is_cuda(device: Any) -> bool:
    return str(device).partition(":")[0] == "cuda"


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor factory for which device="cuda" means the CPU."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return make


class _HereAsZero(str):
    """The CPU as a device's name, and its number in f"cuda:{current_device()}"."""

    def __format__(self, spec: str) -> str:
        return "0"


class _Done:
    """A stream on which everything is done already, and the event that says so."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> _Done:
        return self

    def wait(self, stream: Any = None) -> None:
        pass


def _unpinned(factory: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor factory that ignores pin_memory: pinning memory takes a GPU driver."""

    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> Any:
        return factory(*args, **{k: v for k, v in kwargs.items() if k != "pin_memory"})

    return make


def _spelled_cuda(type_: Callable[..., Any]) -> Callable[..., Any]:
    """Tensor.type with its name for the CPU's floating tensors spelled as the GPU's."""
    names = {f"torch.{kind}Tensor": f"torch.cuda.{kind}Tensor" for kind in ("Float", "Half", "BFloat16")}

    @functools.wraps(type_)
    def spelled(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_(self, *args, **kwargs)
        return names.get(answer, answer) if isinstance(answer, str) else answer

    return spelled


def _mesh_on_cpu(from_group: Callable[..., DeviceMesh]) -> Any:
    def build(group: Any, device_type: str, *args: Any, **kwargs: Any) -> DeviceMesh:
        return from_group(group, "cpu" if _is_cuda(device_type) else device_type, *args, **kwargs)

    return staticmethod(build)


def _import_uncompiled() -> None:
    """Import megatron-core with its fusions (megatron/core/jit.py) as plain functions.

    A CPU run calls none of them, but decorating them with torch.compile imports all of inductor: 2.5 of the 6.5 seconds
    that a worker takes to start.
    """
    compile_ = torch.compile
    torch.compile = lambda function, *args, **kwargs: function  # type: ignore[assignment]
    try:
        import megatron.core  # noqa: F401
    finally:
        torch.compile = compile_  # type: ignore[assignment]


def _tracker_reads() -> None:
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()


def _tracker_writes() -> None:
    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


def _shards_on_cpu() -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    init_data = ShardedTensor.init_data

    def init_on_cpu(self: ShardedTensor, device: Any, init_fn: Callable[..., Any] = torch.empty) -> None:
        init_data(self, "cpu" if _is_cuda(device) else device, init_fn)

    ShardedTensor.init_data = init_on_cpu


def _quiet(name: str, alarm: str) -> Callable[[], None]:
    """What keeps the logger `name` of megatron-core from saying what has `alarm` in it."""
    logger = logging.getLogger(f"megatron.core.{name}")
    return lambda: logger.addFilter(lambda record: alarm not in record.getMessage())


def _exact_norm() -> None:
    from megatron.core.optimizer import clip_grads

    clip_grads.l2_norm_impl = _l2_norm


def _l2_norm(chunk_size: Any, noop_flag: Any, tensor_lists: Any, *args: Any) -> tuple[torch.Tensor, None]:
    """Apex's multi_tensor_l2norm over one list of tensors, in blocks that are short enough to be added up in FP32."""
    total = torch.zeros((), dtype=torch.float64)
    for tensor in tensor_lists[0]:
        flat = tensor.detach().reshape(-1)
        whole = flat.numel() // _BLOCK * _BLOCK
        for part in (flat[:whole].view(-1, _BLOCK), flat[whole:].view(1, -1)):
            total += torch.linalg.vector_norm(part, dim=1, dtype=torch.float32).double().square().sum()
    return total.sqrt().float().reshape(1), None


_BLOCK = 4096


# A GPU has a random generator beside the CPU's. Here both are the CPU's, so what megatron-core says of "the CUDA
# generator" is said of that one.
#
# Not replaced: torch.cuda.manual_seed_all, which torch.manual_seed itself calls; torch.cuda.set_rng_state, which does
# nothing by itself and always follows torch.set_rng_state; events, memory figures and nvtx, which dense models reach
# only by options that are off on a CPU; the fusions, which are switched off instead.
_FSDP = "distributed/fsdp/src/megatron_fsdp"
PIECES: tuple[Piece, ...] = (
    Piece(
        "torch.cuda.current_device",
        "models/common/embeddings/rotary_pos_embedding.py:78 and :162, distributed/param_and_grad_buffer.py:783, "
        "tensor_parallel/mappings.py:91 (TP, SP), pipeline_parallel/p2p_communication.py:313 (PP)",
        _replace(torch.cuda, "current_device", _instead(lambda: _HereAsZero("cpu"))),
    ),
    Piece(
        "torch.cuda.synchronize",
        "pipeline_parallel/p2p_communication.py:398, dist_checkpointing/strategies/filesystem_async.py:230, "
        "timers.py:152",
        _replace(torch.cuda, "synchronize", _instead(lambda device=None: None)),
    ),
    Piece(
        "torch.cuda.Stream",
        f"{_FSDP}/megatron_fsdp.py:361, {_FSDP}/param_and_grad_buffer.py:3020",
        _replace(torch.cuda, "Stream", _instead(_Done)),
    ),
    Piece(
        "torch.cuda.current_stream",
        f"{_FSDP}/param_and_grad_buffer.py:3205 and :3582",
        _replace(torch.cuda, "current_stream", _instead(lambda device=None: _Done())),
    ),
    Piece(
        "torch.cuda.device_count",
        "dist_checkpointing/strategies/async_utils.py:488, rank % device_count() in the persistent checkpoint worker; "
        "with 0 the worker dies and the job hangs",
        _replace(torch.cuda, "device_count", _instead(lambda: 1)),
    ),
    Piece(
        "torch.cuda.set_device",
        "dist_checkpointing/strategies/async_utils.py:488",
        _replace(torch.cuda, "set_device", _instead(lambda device: None)),
    ),
    Piece(
        "torch.cuda.get_rng_state",
        "tensor_parallel/random.py:235, rerun_state_machine.py:957",
        _replace(torch.cuda, "get_rng_state", _instead(lambda device="cuda": torch.get_rng_state())),
    ),
    Piece(
        "torch.cuda.manual_seed",
        "tensor_parallel/random.py:237; without it all states of the RNG tracker are the same",
        _replace(torch.cuda, "manual_seed", _instead(lambda seed: torch.default_generator.manual_seed(seed))),
    ),
    Piece(
        "rng tracker reads",
        "tensor_parallel/random.py:250 (fork) and :447 (recompute)",
        _tracker_reads,
    ),
    Piece(
        "rng tracker writes",
        "tensor_parallel/random.py:240 (add), :255 (fork) and :457 (recompute)",
        _tracker_writes,
    ),
    Piece(
        "rng tracker is quiet",
        "tensor_parallel/random.py:265 warns at each dropout that the CPU's generator moved, which is meant here",
        _quiet("tensor_parallel.random", "CPU RNG state changed within GPU RNG context"),
    ),
    Piece(
        "Megatron-FSDP is quiet",
        f"{_FSDP}/megatron_fsdp.py:185 warns that its device, the CPU, is not cuda:0",
        _quiet("distributed.fsdp.src.megatron_fsdp.megatron_fsdp", "Megatron-FSDP is using device cpu"),
    ),
    Piece(
        "torch.tensor",
        "optimizer/optimizer.py:907, optimizer/grad_scaler.py:15, tensor_parallel/data.py:37",
        _replace(torch, "tensor", _on_cpu),
    ),
    Piece(
        "torch.tensor is not pinned",
        "models/common/embeddings/rope_utils.py:63 (CP)",
        _replace(torch, "tensor", _unpinned),
    ),
    Piece(
        "torch.zeros",
        "pipeline_parallel/schedules.py:596, optimizer/clip_grads.py:103",
        _replace(torch, "zeros", _on_cpu),
    ),
    Piece(
        "torch.ones",
        "transformer/utils.py:35, the causal mask of megatron-core's own attention",
        _replace(torch, "ones", _on_cpu),
    ),
    Piece(
        "ShardedTensor.init_data",
        "dist_checkpointing/exchange_utils.py:98 and :106 (fully parallel load); torch.empty is bound as its default",
        _shards_on_cpu,
    ),
    Piece(
        "torch.empty_like",
        "dist_checkpointing/exchange_utils.py:104 and :110 (fully parallel load)",
        _replace(torch, "empty_like", _on_cpu),
    ),
    Piece(
        "Tensor.cuda",
        "models/common/embeddings/rope_utils.py:64 (CP), models/common/language_module/language_module.py:244 (PP with "
        "tied embeddings), optimizer/grad_scaler.py:140, dist_checkpointing/exchange_utils.py:336",
        _replace(torch.Tensor, "cuda", _instead(lambda self, *args, **kwargs: self)),
    ),
    Piece(
        "Tensor.type",
        "optimizer/clip_grads.py:167, optimizer/optimizer.py:671, optimizer/distrib_optimizer.py:361 check the name",
        _replace(torch.Tensor, "type", _spelled_cuda),
    ),
    Piece(
        "gradient norm",
        "optimizer/clip_grads.py:109: on a CPU torch.norm adds up in FP32 one after the other, and is off by 1e-5 at "
        "10^6 elements and 7e-4 at 10^7, otherwise in each layout",
        _exact_norm,
    ),
    Piece(
        "DeviceMesh.from_group",
        "distributed/torch_fully_sharded_data_parallel.py:81",
        _replace(DeviceMesh, "from_group", _mesh_on_cpu),
    ),
)

_installed = False


def install(_skip: Collection[str] = ()) -> bool:
    """Make megatron-core run on this machine's CPU; do nothing and answer False where torch sees a GPU.

    `with torch.device(…)` goes on working: it caches the functions it applies to at first use, so they are cached
    before some are replaced. A second call changes nothing. `_skip` leaves out pieces by name: the tests show with it
    what each is for.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if not _installed:
        _device_constructors()
        _import_uncompiled()
        for piece in PIECES:
            if piece.name not in _skip:
                piece.apply()
        _installed = True
    return True
